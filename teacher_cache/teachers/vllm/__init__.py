"""One pass under vLLM: answers and captured states together."""
