"""Sequence policies: what a running request keeps."""
