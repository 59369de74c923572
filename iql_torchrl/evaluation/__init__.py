"""Policies and their vectorised rollouts; what a loss says of held-out data."""
