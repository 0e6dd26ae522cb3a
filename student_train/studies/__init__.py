"""Many students of one cache: arms, tables, reports."""
