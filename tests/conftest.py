"""Fixtures for all tests."""

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
