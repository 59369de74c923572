"""Datasets that a policy makes in its environment: trained for it, or given."""
