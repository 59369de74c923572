"""What every source of data is: an object that opens its log and tells where that comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from iql_torchrl.configuration.declaring import Options, option
from iql_torchrl.data.joining import join_parts
from iql_torchrl.data.log import Column, Log
from iql_torchrl.data.storage import Allocate, Storage
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import ConfigurationError


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("empty")
    return text


def _as_text(path: object) -> object:
    return str(path) if isinstance(path, Path) else path


def different_names(keys: list[str]) -> list[str]:
    """Of an option that is a list of names.

    Raises:
        ValueError: one is there twice.
    """
    if len(set(keys)) < len(keys):
        raise ValueError("a key is there twice")
    return keys


# A file or folder: on the command line a text.
PathText = Annotated[str, BeforeValidator(_as_text), AfterValidator(_not_empty)]

_Finite = Annotated[float, Field(allow_inf_nan=False)]
# One number for all dimensions of the actions, or one a dimension.
Bound = _Finite | Annotated[list[_Finite], Field(min_length=1)] | None
_BOUND = "null, a finite number, or a list of them, one a dimension, such as [-5,-0.4]"


class Namesake(NamedTuple):
    """A dataset of D4RL's that others are taken for: whose those are, D4RL's name, and where D4RL's was recorded."""

    owner: str
    name: str
    recorded_in: str


class Source(Options, ABC):
    """A dataset: its options as checked values, and what they lead to.

    A subclass is one kind of source. Its options are declared as the fields of its class, and named in a YAML file of
    ``configs/dataset`` that is called like the literal of :attr:`source`.
    """

    source: Any
    validation_fraction: float | None = option(
        "share of the episodes that is held out; null: 0.1 without a simulator, else 0", ge=0, lt=1, default=None
    )
    normalised_actions: bool = option(
        "the actions are in [-1, 1] already, whatever the environment's bounds", default=False
    )
    action_low: Bound = option("lower bounds of the actions, without a simulator", expected=_BOUND, default=None)
    action_high: Bound = option(
        "upper bounds of the actions; both null: the simulator's, else [-1, 1] or the data's range",
        expected=_BOUND,
        default=None,
    )
    storage: Storage = option(
        "where the transitions lie: in RAM, in mapped files that are gone with the process, or on the training device",
        learnt=False,
        default="device",
    )
    storage_folder: PathText | None = option(
        "folder of the mapped files; null: ~/.cache/iql_torchrl/memmap",
        learnt=False,
        expected="a folder, or null",
        default=None,
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Source:
        low, high = self.action_low, self.action_high
        if (low is None) != (high is None):
            missing, given = ("low", "high") if low is None else ("high", "low")
            raise ConfigurationError(f"dataset.action_{given} is of no use alone; give dataset.action_{missing} too.")
        if low is None or high is None:
            return self
        lengths = [len(bound) for bound in (low, high) if isinstance(bound, list)]
        if len(set(lengths)) > 1:
            raise ConfigurationError(
                f"dataset.action_low has {lengths[0]} numbers but dataset.action_high has {lengths[1]}; give one a "
                "dimension."
            )
        lows, highs = np.broadcast_arrays(np.atleast_1d(low), np.atleast_1d(high))
        wrong = np.flatnonzero(~(lows < highs))
        if len(wrong):
            where = f" in dimension {wrong[0]}" if lengths else ""
            raise ConfigurationError(
                f"dataset.action_low must be below dataset.action_high, got {lows[wrong[0]]:g} and "
                f"{highs[wrong[0]]:g}{where}."
            )
        return self

    @property
    @abstractmethod
    def label(self) -> str:
        """Names the task: the preset of its domain is picked by it."""

    @property
    def preset(self) -> str | None:
        """The preset that suits whatever the label, where there is one."""
        return None

    @property
    def title(self) -> str:
        """Names the data for a reader."""
        return self.label

    @property
    def own_next_observations(self) -> bool:
        """Whether its rows carry their own next observations, so that those at timeouts are kept."""
        return False

    def environment(self) -> tuple[EnvironmentSpec | None, str]:
        """The environment that the data come from, with its reference scores, or why there is none."""
        return None, "the data name none; set env.name=ID"

    def recorded_in(self) -> str | None:
        """Gymnasium id of the environment that the data were recorded in, where they tell."""
        spec, _ = self.environment()
        return None if spec is None else spec.name

    @property
    def d4rl_name(self) -> str | None:
        """D4RL's name of the data, where they are D4RL's."""
        return None

    @property
    def namesake(self) -> Namesake | None:
        """D4RL's dataset that they are taken for and are not."""
        return None

    def environment_named(self, name: str) -> EnvironmentSpec:
        """Another environment, chosen by its Gymnasium id, laid out as the data are."""
        return EnvironmentSpec.of(name)

    def action_bounds(self, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Lower and upper bounds ``[size]`` of the actions, float32, where the options give them.

        Raises:
            ConfigurationError: as many numbers as the actions do not have dimensions.
        """
        if self.action_low is None or self.action_high is None:
            return None
        for name, bound in (("low", self.action_low), ("high", self.action_high)):
            if isinstance(bound, list) and len(bound) != size:
                raise ConfigurationError(
                    f"dataset.action_{name} has {len(bound)} number{'s' * (len(bound) > 1)} but the data's actions "
                    f"have {size} dimension{'s' * (size > 1)}; give one number, or one a dimension."
                )
        low, high = (np.asarray(bound, np.float32) for bound in (self.action_low, self.action_high))
        return np.broadcast_to(low, size).copy(), np.broadcast_to(high, size).copy()

    @abstractmethod
    def open(self, allocate: Allocate = np.empty) -> AbstractContextManager[Log]:
        """The rows, before the rule that makes transitions of them.

        Args:
            allocate: where a source that reads everything at once puts it.

        Raises:
            DatasetError: a dataset that cannot be opened.
        """


class LogSource(Source):
    """A log of the user's own, in D4RL's layout."""

    keep_timeouts: bool = option("keep the rows at timeouts, with the log's own next_observations", default=False)
    max_episode_steps: int | None = option(
        "where episodes were cut, for a log without timeouts; null: the environment's limit", ge=1, default=None
    )

    @property
    def own_next_observations(self) -> bool:
        return self.keep_timeouts

    def log_of(self, columns: Mapping[str, Column], origin: str) -> Log:
        """Columns that were read, as a log of this source's options; ``origin`` names it in errors.

        Raises:
            DatasetError: parts of observations that do not belong together.
        """
        return Log(
            origin,
            join_parts(columns, origin),
            own_next_observations=self.own_next_observations,
            max_episode_steps=self.max_episode_steps,
        )


class FileSource(LogSource):
    """Such a log in one file or folder."""

    path: PathText = option("of the log", expected="a file or folder", example="FILE")

    @property
    def label(self) -> str:
        """The last part of the path."""
        return Path(self.path).name
