"""A set of steps as a Minari dataset, with D4RL's layout beside it, there as a whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
from gymnasium.wrappers import TransformObservation

from iql_torchrl.atomic import write_text_atomically
from iql_torchrl.collecting.steps import Steps
from iql_torchrl.environments.simulators import make_environment
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import ConfigurationError, RunError, first_line

D4RL_FILE = "d4rl.hdf5"


class Place:
    """Where one set is, in a folder of Minari datasets.

    Args:
        root: the folder, as ``MINARI_DATASETS_PATH`` names it.
        name: the dataset's id.

    Raises:
        ConfigurationError: the id is none for Minari.
    """

    def __init__(self, root: Path, name: str) -> None:
        from minari.dataset.minari_dataset import parse_dataset_id

        try:
            parse_dataset_id(name)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"{name} is no id of a Minari dataset: letters, digits, - and _ alone.") from error
        self.root, self.name = root, name
        self.folder = root / name

    def holds(self, options: Mapping[str, Any]) -> bool:
        """Whether the set is there, and was made with these options."""
        try:
            return json.loads((self.folder / "data" / "metadata.json").read_text()).get("options") == options
        except (OSError, ValueError, AttributeError):
            return False

    def refuse(self, options: Mapping[str, Any] | None) -> None:
        """Refuse a set that is there, unless it was made with these options.

        Raises:
            ConfigurationError: saying so.
        """
        if self.folder.exists() and (options is None or not self.holds(options)):
            raise ConfigurationError(
                f"the dataset {self.name} is in {self.root} already, and is left as it is; name another output, or set "
                "overwrite=true to replace it."
            )

    def read(self) -> Steps:
        """The steps of the set, from its file in D4RL's layout.

        Raises:
            ConfigurationError: it cannot be read.
        """
        path = self.folder / D4RL_FILE
        try:
            with h5py.File(path, "r") as file:
                columns = {name: np.asarray(file[name]) for name in _COLUMNS}
                return Steps(**columns, cut=bool(file.attrs["cut"]))
        except (OSError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path} cannot be read ({first_line(error)}); delete {self.folder} and run the same command again."
            ) from error

    def write(self, steps: Steps, environment: EnvironmentSpec, metadata: Mapping[str, Any]) -> None:
        """Write the set in a folder beside its own, have it on the disk, and rename it; a set that is there goes.

        Minari's own functions that create datasets start environments and take their folder from the process's
        variables, write at once where the dataset is to be, and warn of every field that is not given: its storage is
        written directly.

        Args:
            steps: all of them.
            environment: that they were made in.
            metadata: of Minari's kinds, and plain values of any other name.

        Raises:
            RunError: the folder cannot be written; nothing of the set is there then.
        """
        unfinished = self.folder.with_name(f".{self.folder.name}.unfinished")
        before = self.folder.with_name(f".{self.folder.name}.before")
        try:
            self._prepare_namespace()
            for left in (unfinished, before):
                shutil.rmtree(left, ignore_errors=True)
            unfinished.mkdir()
            write_minari(unfinished / "data", steps, environment, {"dataset_id": self.name, **metadata})
            write_d4rl(unfinished / D4RL_FILE, steps, environment, metadata)
            _sync(unfinished)
            if self.folder.exists():
                self.folder.rename(before)
            unfinished.rename(self.folder)
            _sync_entry(self.folder.parent)
            shutil.rmtree(before, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise RunError(
                f"the dataset {self.name} cannot be written to {self.root}: {error.strerror or error}. What was "
                "complete stays; once the folder can be written, run the same command again."
            ) from error

    def _prepare_namespace(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for folder in [self.folder.parent, *self.folder.parent.parents]:
            if folder == self.root:
                break
            if not (folder / "namespace_metadata.json").exists():
                write_text_atomically(folder / "namespace_metadata.json", "{}")


_COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


def write_minari(folder: Path, steps: Steps, environment: EnvironmentSpec, metadata: Mapping[str, Any]) -> None:
    """The data of a Minari dataset, in HDF5.

    Args:
        folder: ``data`` of the dataset; new.
        steps, metadata: of the set.
        environment: whose spaces and specification go into the metadata; observations with parts are those of
            ``make_environment``, one vector.
    """
    import minari
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    made = make_environment(environment)
    spaces = (made.observation_space, made.action_space)
    spec = made.env.spec if isinstance(made, TransformObservation) else made.spec
    made.close()
    storage = MinariStorage.new(folder, *spaces, env_spec=spec, data_format="hdf5")
    assert spec is not None
    own = {"minari_version": minari.__version__, "eval_env_spec": spec.to_json()}
    storage.update_metadata({**metadata, **own})
    episodes = []
    for rows in steps.episodes:
        observations = np.concatenate([steps.observations[rows], steps.next_observations[rows][-1:]])
        arrays: dict[str, Any] = {
            "observations": observations.astype(spaces[0].dtype, copy=False),
            "actions": steps.actions[rows].astype(spaces[1].dtype, copy=False),
            "rewards": steps.rewards[rows],
            "terminations": steps.terminals[rows],
            "truncations": steps.timeouts[rows],
        }
        episodes.append(EpisodeBuffer(**arrays))
    storage.update_episodes(episodes)


def write_d4rl(path: Path, steps: Steps, environment: EnvironmentSpec, metadata: Mapping[str, Any]) -> None:
    """The same in D4RL's layout; texts of the metadata are in its group, and all else as JSON."""
    with h5py.File(path, "w") as file:
        for name in _COLUMNS:
            file[name] = getattr(steps, name)
        file.attrs["env_id"], file.attrs["cut"] = environment.name, steps.cut
        group = file.create_group("metadata")
        for name, value in metadata.items():
            plain = sorted(value) if isinstance(value, set) else value
            group[name] = plain if isinstance(plain, str | int | float) else json.dumps(plain)


def environment_versions() -> list[str]:
    """What an environment needs, as pip is told it."""
    from importlib.metadata import version

    return [f"gymnasium[mujoco]=={gymnasium.__version__}", f"mujoco=={version('mujoco')}"]


def _sync(folder: Path) -> None:
    """Have all below a folder on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
