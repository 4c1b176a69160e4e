"""Measures reuse: scenarios, checks and explanations."""
