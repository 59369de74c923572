"""The training step, how it is built and run, and its checkpoints."""
