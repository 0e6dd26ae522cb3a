"""A cache in other people's loops, each in under 40 lines, each with the weights of ``student-train fit`` (a test)."""
