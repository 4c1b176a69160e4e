"""KV outside the engine's pool: its form there, and the books of what is where."""
