"""Environments of the tests' own."""

import gymnasium
import pytest


@pytest.fixture
def register():
    """Register an environment for the length of a test."""
    names = []

    def add(name, entry_point, **options):
        gymnasium.register(name, entry_point=entry_point, **options)
        names.append(name)
        return name

    yield add
    for name in names:
        gymnasium.registry.pop(name)
