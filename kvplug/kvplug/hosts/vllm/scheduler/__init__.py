"""Policies in the scheduler process, one file a kind."""
