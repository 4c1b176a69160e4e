"""``kvplug tune``: from recorded requests to a deployment that was measured against stock."""
