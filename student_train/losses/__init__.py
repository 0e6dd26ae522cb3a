"""Every loss, what it reads, and its memory."""
