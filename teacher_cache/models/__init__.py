"""How a model folder is read: its configuration, weights, tokenizer and processor, and what does not fit."""
