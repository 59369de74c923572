"""The dataset inside the package: part of a Hopper-v5 replay buffer.

Whole episodes, spread over the whole training history, of the replay buffer of an SAC agent (SBX 0.28.0, default
settings, batch 256, 5,000 random steps first, seed 7) learning Hopper-v5 (Gymnasium 1.4, MuJoCo 4.0) from scratch: the
recipe of D4RL's medium-replay. Collected for this project and free to redistribute with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from iql_torchrl.data.log import Log
from iql_torchrl.data.sources import hdf5
from iql_torchrl.data.sources.source import Source
from iql_torchrl.data.storage import Allocate
from iql_torchrl.environments.specification import EnvironmentSpec

PATH = Path(__file__).parent / "hopper-replay-v5-part.hdf5"


class Embedded(Source):
    """Observations ``[N, 11]``, actions ``[N, 3]`` in [-1, 1], of Hopper-v5."""

    source: Literal["embedded"] = "embedded"

    @property
    def label(self) -> str:
        return "embedded"

    @property
    def title(self) -> str:
        return "the embedded Hopper-v5 replay"

    def environment(self) -> tuple[EnvironmentSpec | None, str]:
        """Hopper-v5, which the file names."""
        return EnvironmentSpec.of(str(hdf5.environment_of(PATH))), ""

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        with hdf5.open_columns(PATH) as (columns, origin):
            yield Log(origin, columns)
