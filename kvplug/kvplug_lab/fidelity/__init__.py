"""Measures what policies cost in answers."""
