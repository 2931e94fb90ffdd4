"""Studies: what one is, its runs, and their results."""
