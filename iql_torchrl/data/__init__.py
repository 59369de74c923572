"""Dataset source -> transitions -> replay buffer."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict

from iql_torchrl.data import d4rl, embedded, hdf5
from iql_torchrl.data.actions import normalise_actions
from iql_torchrl.data.buffer import make_buffer, split_episodes
from iql_torchrl.data.observations import ObservationNormaliser
from iql_torchrl.data.rewards import transform_rewards
from iql_torchrl.data.transitions import episode_returns, fingerprint
from iql_torchrl.errors import DatasetError
from iql_torchrl.suggestions import nearest

__all__ = [
    "ObservationNormaliser",
    "episode_returns",
    "fingerprint",
    "load_transitions",
    "make_buffer",
    "normalise_actions",
    "split_episodes",
    "transform_rewards",
]

SOURCES = {"embedded": embedded.load, "hdf5": hdf5.load, "d4rl": d4rl.load}


def load_transitions(source: str, **options: Any) -> TensorDict:
    """The transitions of a dataset, checked, by the rule of D4RL's ``qlearning_dataset``.

    Args:
        source: ``"embedded"`` (no options), ``"hdf5"`` (:func:`iql_torchrl.data.hdf5.load`) or ``"d4rl"``
            (:func:`iql_torchrl.data.d4rl.load`).
        **options: of the source.

    Returns:
        a TensorDict of batch shape ``[N]``: ``observation`` ``[N, O]`` and ``action`` ``[N, A]`` (float32; ``[N]``,
        int64, where they are discrete), ``episode`` ``[N]`` (int64), and under ``"next"`` ``observation`` ``[N, O]``,
        ``reward`` ``[N, 1]`` (float32), ``done``, ``terminated`` and ``truncated`` ``[N, 1]`` (bool).

    Raises:
        DatasetError: an unknown source, or whatever is wrong with the data.
    """
    if source not in SOURCES:
        raise DatasetError(f"unknown dataset source {source!r}{nearest(source, SOURCES)}")
    return SOURCES[source](**options)
