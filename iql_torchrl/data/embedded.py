"""The dataset inside the package: part of a Hopper-v5 replay buffer.

Whole episodes, spread over the whole training history, of the replay buffer of an SAC agent (SBX 0.28.0, default
settings, batch 256, 5,000 random steps first, seed 7) learning Hopper-v5 (Gymnasium 1.4, MuJoCo 4.0) from scratch: the
recipe of D4RL's medium-replay. Collected for this project and free to redistribute with it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from iql_torchrl.data import hdf5
from iql_torchrl.data.log import Log

PATH = Path(__file__).parent / "hopper-replay-v5-part.hdf5"


def open_log() -> AbstractContextManager[Log]:
    """Its rows: observations ``[N, 11]``, actions ``[N, 3]`` in [-1, 1]."""
    return hdf5.open_log(PATH)


def environment_of() -> str | None:
    """Hopper-v5."""
    return hdf5.environment_of(PATH)
