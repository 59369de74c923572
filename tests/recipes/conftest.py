"""Data for the recipes."""

import gymnasium
import h5py
import numpy as np
import pytest


@pytest.fixture(scope="session")
def pendulum(tmp_path_factory):
    """Random episodes of Pendulum-v1, whose actions lie in [-2, 2]."""
    environment = gymnasium.make("Pendulum-v1")
    environment.action_space.seed(0)
    log = {key: [] for key in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")}
    for episode in range(4):
        observation, _ = environment.reset(seed=episode)
        truncated = False
        while not truncated:
            action = environment.action_space.sample()
            following, reward, terminated, truncated, _ = environment.step(action)
            for key, value in zip(log, (observation, action, reward, following, terminated, truncated), strict=True):
                log[key].append(value)
            observation = following
    path = tmp_path_factory.mktemp("data") / "pendulum.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in log.items():
            array = np.array(values)
            file[key] = array.astype(bool if key in ("terminals", "timeouts") else np.float32)
    return path
