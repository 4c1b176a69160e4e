"""Hosts run policies: each adapts one engine (or a simulator) to the contract."""
