"""Format policies: how K and V are stored."""
