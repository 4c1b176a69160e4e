"""Reuse checks: decide whether stored KV may be used in place of a computation."""
