"""A run from its settings to its model: the loop, its checkpoints, its stages."""
