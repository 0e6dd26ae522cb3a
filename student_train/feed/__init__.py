"""How samples reach a student."""
