"""Policies of checkpoints against each other, by data alone, and how far a simulator says that this can be trusted."""
