"""Whether a cache is whole, and how good it is."""
