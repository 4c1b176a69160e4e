"""Reports of what policies did: events and the closing summary."""
