"""A trained policy on its way out of this package: files that act without it."""
