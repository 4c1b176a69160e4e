"""The scheduler process: one object per kind, and what they share."""
