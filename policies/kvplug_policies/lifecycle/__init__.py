"""Lifecycle policies: what is stored on its way out of the pool, and when it moves."""
