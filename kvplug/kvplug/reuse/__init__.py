"""Stored KV beyond the exact prefix: segments, what is known of them, and plans to use them."""
