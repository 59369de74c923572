"""Small problems that several tests train on."""

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from iql_torchrl import IQLLoss, build_actor, build_qvalues, build_value

OBSERVATION_DIM, ACTION_DIM = 5, 2
# Of several runs in one step.
both_ways = pytest.mark.parametrize("stacked", [False, True], ids=["one after another", "stacked"])
# Compiled, one after another: test_beside.py.
stacked_compiled_too = pytest.mark.parametrize(
    ("stacked", "compile"),
    [(False, False), (True, False), pytest.param(True, True, marks=pytest.mark.slow)],
    ids=["one after another", "stacked", "stacked, compiled"],
)


def random_transitions(count: int = 500, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    terminated = torch.rand(count, 1, generator=generator) < 0.1
    return TensorDict(
        {
            "observation": torch.randn(count, OBSERVATION_DIM, generator=generator),
            "action": torch.rand(count, ACTION_DIM, generator=generator) * 1.9 - 0.95,
            "episode": torch.arange(count) // 50,
            "next": {
                "observation": torch.randn(count, OBSERVATION_DIM, generator=generator),
                "reward": torch.randn(count, 1, generator=generator),
                "done": terminated.clone(),
                "terminated": terminated,
                "truncated": torch.zeros_like(terminated),
            },
        },
        batch_size=[count],
    )


def small_loss(seed: int = 0, dropout: float | None = None, critics: int = 2, **options) -> IQLLoss:
    torch.manual_seed(seed)
    sizes = {"hidden_dims": (16, 16)}
    return IQLLoss(
        build_actor(OBSERVATION_DIM, ACTION_DIM, dropout=dropout, **sizes),
        build_qvalues(OBSERVATION_DIM, ACTION_DIM, num_qvalue_nets=critics, **sizes),
        build_value(OBSERVATION_DIM, **sizes),
        num_qvalue_nets=critics,
        **options,
    )


def write_pendulum(path):
    """Random episodes of Pendulum-v1 as D4RL's HDF5."""
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
    with h5py.File(path, "w") as file:
        for key, values in log.items():
            array = np.array(values)
            file[key] = array.astype(bool if key in ("terminals", "timeouts") else np.float32)
    return path
