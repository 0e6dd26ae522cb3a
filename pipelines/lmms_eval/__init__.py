"""Local tasks for lmms-eval: a folder of questions and images that it scores without a network."""
