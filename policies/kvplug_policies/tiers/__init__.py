"""Built-in tiers."""
