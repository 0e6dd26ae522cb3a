"""Phase one, step by step: read, answer, score, write; what is left out and why."""
