"""Models that answer and score."""
