"""Attention memory: decode rows that reuse the far part of their attention."""
