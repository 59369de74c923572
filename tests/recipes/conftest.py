"""Data for the recipes."""

import pytest
from problems import write_pendulum


@pytest.fixture(scope="session")
def pendulum(tmp_path_factory):
    """Random episodes of Pendulum-v1, whose actions lie in [-2, 2]."""
    return write_pendulum(tmp_path_factory.mktemp("data") / "pendulum.hdf5")
