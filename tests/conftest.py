"""Fixtures for all tests."""

import gymnasium
import pytest
from problems import random_transitions
from tensordict import TensorDict

from iql_torchrl import make_buffer


@pytest.fixture
def transitions() -> TensorDict:
    return random_transitions()


@pytest.fixture
def buffer(transitions):
    return make_buffer(transitions, batch_size=32, seed=0)


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
