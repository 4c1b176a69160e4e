"""Tensor operations behind the KV-cache policies, one sub-package per operation."""
