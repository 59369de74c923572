"""One page over any number of runs."""
