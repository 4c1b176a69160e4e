"""What policies did, and how it is told: counters, events and the closing summary."""
