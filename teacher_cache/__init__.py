"""Run a multimodal teacher once and cache what its students need: answers, top-k log-probabilities, hidden states."""

__version__ = "0.1.0"
