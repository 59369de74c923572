"""What a run leaves behind: rows, curves and a summary; and what a dataset looks like."""
