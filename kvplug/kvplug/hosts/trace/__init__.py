"""The trace host: prefix-cache policies without an engine, on recorded or published traces."""
