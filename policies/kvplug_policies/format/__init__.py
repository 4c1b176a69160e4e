"""How K and V are stored."""
