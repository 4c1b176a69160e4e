"""Prefix-cache policies: which cached block is evicted first."""
