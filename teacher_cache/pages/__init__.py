"""Pages to look at a cache by."""
