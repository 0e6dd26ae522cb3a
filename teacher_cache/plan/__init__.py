"""Prices before anything runs: bytes, memory, hours."""
