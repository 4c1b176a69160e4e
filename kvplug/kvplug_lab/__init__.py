"""Measures kvplug on real engines, models and texts. The product never imports it."""
