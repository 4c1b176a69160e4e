"""Policies in a worker process, one file a kind."""
