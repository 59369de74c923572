"""The kinds of source, by the name of their file in ``configs/dataset``: one more is a module here and that file."""

from __future__ import annotations

from iql_torchrl.data.sources.arrays import Arrays
from iql_torchrl.data.sources.d4rl import D4RL
from iql_torchrl.data.sources.embedded import Embedded
from iql_torchrl.data.sources.hdf5 import HDF5
from iql_torchrl.data.sources.lerobot import LeRobot
from iql_torchrl.data.sources.minari import Minari
from iql_torchrl.data.sources.minari_object import MinariObject
from iql_torchrl.data.sources.numpy_arrays import NumpyArrays
from iql_torchrl.data.sources.ogbench import OGBench
from iql_torchrl.data.sources.parquet import Parquet
from iql_torchrl.data.sources.replay_buffer import ReplayBufferContent
from iql_torchrl.data.sources.robomimic import Robomimic
from iql_torchrl.data.sources.source import Source

KINDS: tuple[type[Source], ...] = (Embedded, D4RL, Minari, HDF5, Parquet, NumpyArrays, Robomimic, OGBench, LeRobot)
# What a program holds already, which no command line can name.
HELD: tuple[type[Source], ...] = (Arrays, MinariObject, ReplayBufferContent)
