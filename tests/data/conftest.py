"""Logs in D4RL's layout, and D4RL's rule written as a loop over their rows."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

FIELDS = ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "done"))
FLAGS = (("next", "terminated"), ("next", "truncated"))


def _log_arrays(rows=40, *, seed=0, observation_dim=3, action_dim=2, terminals=(), timeouts=()):
    """Random arrays of a log; ``terminals`` and ``timeouts`` are the flagged rows, ``timeouts=None`` no array."""
    random = np.random.default_rng(seed)
    arrays = {
        "observations": random.normal(size=(rows, observation_dim)).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(rows, action_dim)).astype(np.float32),
        "rewards": random.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, dtype=bool),
    }
    arrays["terminals"][list(terminals)] = True
    if timeouts is not None:
        arrays["timeouts"] = np.zeros(rows, dtype=bool)
        arrays["timeouts"][list(timeouts)] = True
    return arrays


def _with_next_observations(arrays, *, seed=100):
    """The arrays with the simulator's own next observations: at ends, and after the last row, no row repeats them."""
    rows, size = arrays["observations"].shape
    following = np.random.default_rng(seed).normal(size=(rows, size)).astype(np.float32)
    ends = arrays["terminals"] | arrays.get("timeouts", np.zeros(rows, dtype=bool))
    for row in range(rows - 1):
        if not ends[row]:
            following[row] = arrays["observations"][row + 1]
    return {**arrays, "next_observations": following}


def _qlearning_dataset(arrays, max_episode_steps=None, count_after_terminal=0):
    """D4RL's rule, one row after the other, as float32 arrays keyed like the TensorDict.

    D4RL's own counter starts at 1 after a terminal row; ours of a user's log at 0.
    """
    picked = {key: [] for key in (*FIELDS, *FLAGS, "episode")}
    episode_step, episode = 0, 0
    for i in range(len(arrays["observations"]) - 1):
        terminal = bool(arrays["terminals"][i])
        if "timeouts" in arrays:
            final_step = bool(arrays["timeouts"][i])
        else:
            final_step = max_episode_steps is not None and episode_step == max_episode_steps - 1
        if not final_step:
            picked["observation"].append(arrays["observations"][i])
            picked["action"].append(arrays["actions"][i])
            picked["next", "observation"].append(arrays["observations"][i + 1])
            picked["next", "reward"].append([arrays["rewards"][i]])
            picked["next", "done"].append([terminal])
            picked["next", "terminated"].append([terminal])
            picked["next", "truncated"].append([False])
            picked["episode"].append(episode)
        if terminal or final_step:
            episode_step = 0 if final_step else count_after_terminal
            episode += 1
        else:
            episode_step += 1
    return {key: np.array(value) for key, value in picked.items()}


def _assert_transitions_equal(transitions, expected):
    """Value for value; ``expected`` is another TensorDict or what ``qlearning_dataset`` returns."""
    length = len(expected["observation"])
    assert len(transitions) == length
    for key in (*FIELDS, *FLAGS):
        found, wanted = transitions[key].numpy(), np.asarray(expected[key])
        np.testing.assert_array_equal(found, wanted.astype(found.dtype), err_msg=str(key))
    # The numbers of the episodes are free; which rows belong together, and their order, are not.
    relabelled = [np.unique(np.asarray(td["episode"]), return_inverse=True)[1] for td in (transitions, expected)]
    np.testing.assert_array_equal(*relabelled, err_msg="episode")


@pytest.fixture
def log_arrays():
    return _log_arrays


@pytest.fixture
def with_next_observations():
    return _with_next_observations


@pytest.fixture
def qlearning_dataset():
    return _qlearning_dataset


@pytest.fixture
def assert_transitions_equal():
    return _assert_transitions_equal


@pytest.fixture
def write_log(tmp_path):
    """Write arrays as an HDF5 file; keys with slashes make groups."""

    def write(arrays, name="log.hdf5", **attributes):
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
            file.attrs.update(attributes)
        return path

    return write
