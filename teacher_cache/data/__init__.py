"""What a sample is: its conversation, its tokens, its picture."""
