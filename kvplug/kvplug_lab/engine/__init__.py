"""Runs requests on real engines and measures them."""
