"""A ``minari.MinariDataset`` that a program holds: all of its episodes, or those that it was filtered to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from pydantic import Field

from iql_torchrl.data.log import Log
from iql_torchrl.data.sources import minari
from iql_torchrl.data.sources.source import Namesake, Source
from iql_torchrl.data.storage import Allocate
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import DatasetError, first_line


class MinariObject(Source):
    """Its steps, each with its own next observation."""

    source: Literal["minari_object"] = "minari_object"
    dataset: Any = Field(exclude=True, repr=False)

    @property
    def label(self) -> str:
        return str(self.dataset.spec.dataset_id)

    @property
    def own_next_observations(self) -> bool:
        return True

    def environment(self) -> tuple[EnvironmentSpec | None, str]:
        """As for :class:`iql_torchrl.data.sources.minari.Minari`."""
        return minari.of_minari(self.label, self._recorded())

    def recorded_in(self) -> str | None:
        return minari.place_of(self._recorded())

    @property
    def namesake(self) -> Namesake | None:
        return minari.namesake_of(self.label)

    def _recorded(self) -> minari.RecordedEnvironment | None:
        try:
            return minari.recorded_environment(self.dataset.storage.metadata)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The steps, read at once, straight to where they stay.

        Raises:
            DatasetError: spaces that are not supported, or data that are damaged.
        """
        try:
            log = minari.log_of(self.dataset, f"Minari dataset {self.label}", allocate)
        except (DatasetError, MemoryError):
            raise
        except Exception as error:  # as for the source of that name
            raise self._damaged(error) from error
        yield log

    def _damaged(self, error: Exception) -> DatasetError:
        return DatasetError(f"Minari dataset {self.label} is damaged ({type(error).__name__}: {first_line(error)}).")
