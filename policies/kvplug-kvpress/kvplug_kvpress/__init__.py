"""Presses of kvpress as scoring policies of kvplug."""
