"""A run around a training step, offline and later online, and what each recipe can be told."""
