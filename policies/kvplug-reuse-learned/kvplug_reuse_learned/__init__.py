"""Learned checks of reuse, and the command that fits them."""
