"""What reads a damaged file, and which damage suits it."""

from __future__ import annotations

import importlib.util
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz import mutations
from fuzz.mutations import BYTES, Mutation, replace_by_something_else
from fuzz.samples import D4RL_NAME, MINARI_NAMES

from iql_torchrl import load_transitions
from iql_torchrl.configuration.options import EnvironmentOptions
from iql_torchrl.configuration.rlinf import read_overrides
from iql_torchrl.data.loading import source_named
from iql_torchrl.data.sources.minari import environment_of
from iql_torchrl.reporting.dataset_report import inspect_dataset
from iql_torchrl.training.checkpoints import load_checkpoint


@dataclass(frozen=True)
class Target:
    """A healthy sample, the damage done to it, and how it is read.

    Args:
        sample: file or folder among the samples.
        damage: mutations by the end of the path of the files that they are for; one of these files is taken.
        read: gets the damaged copy.
        names: what an error has to name, besides the path of the copy.
    """

    sample: str
    damage: dict[str, list[Mutation]]
    read: Callable[[Path], object]
    names: tuple[str, ...] = ()

    def prepare(self, samples: Path, folder: Path, rng: random.Random) -> Path:
        """A damaged copy in a folder."""
        path = folder / self.sample
        if (samples / self.sample).is_dir():
            shutil.copytree(samples / self.sample, path)
        else:
            shutil.copy(samples / self.sample, path)
        ending = rng.choice(list(self.damage))
        files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        file = rng.choice([one for one in files if one.as_posix().endswith(ending)])
        rng.choice(self.damage[ending])(file, rng)
        return path


def _loaded(source: str, **options: object) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        return load_transitions(source, path=path, **options)

    return read


def _inspected(source: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        return inspect_dataset(source_named(source, path=str(path)), EnvironmentOptions(name=None, kwargs={}))

    return read


def _minari(form: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        name = MINARI_NAMES[form]
        environment_of(name, root=path, download=False)
        return load_transitions("minari", name=name, root=path, download=False)

    return read


def _d4rl(path: Path) -> object:
    return load_transitions("d4rl", name=D4RL_NAME, root=path, download=False)


def _d4rl_file(path: Path) -> object:
    return load_transitions("d4rl", name=D4RL_NAME, root=path.parent / "cache", url=path.absolute().as_uri())


def _both(*some: Mutation, times: int = 1) -> list[Mutation]:
    return [*BYTES, replace_by_something_else, *(some * times * (len(BYTES) // max(1, len(some)) + 1))]


HDF5 = {"": _both(mutations.forge_hdf5)}
NPZ = {"": _both(mutations.forge_npz, mutations.forge_zip)}
PARQUET = {"": _both(mutations.forge_parquet, mutations.forge_parquet_footer)}
CHECKPOINT = {"": _both(mutations.forge_checkpoint, mutations.forge_pickle, mutations.forge_tensor_sizes)}
YAML = {"": _both(mutations.forge_yaml, times=2)}
JSON = _both(mutations.forge_json)
ROBOMIMIC_KEYS = {"observation_keys": ["a", "b"]}

TARGETS: dict[str, Target] = {
    "hdf5": Target("plain.hdf5", HDF5, _loaded("hdf5")),
    "compressed hdf5": Target("packed.hdf5", HDF5, _loaded("hdf5", keep_timeouts=True)),
    "inspected hdf5": Target("plain.hdf5", HDF5, _inspected("hdf5")),
    "npz": Target("plain.npz", NPZ, _loaded("numpy")),
    "compressed npz": Target("packed.npz", NPZ, _loaded("numpy", keep_timeouts=True)),
    "npy files": Target("arrays", {".npy": _both(mutations.forge_npy)}, _loaded("numpy")),
    "parquet lists": Target("lists.parquet", PARQUET, _loaded("parquet")),
    "parquet columns": Target("numbered.parquet", PARQUET, _loaded("parquet", keep_timeouts=True)),
    "inspected parquet": Target("lists.parquet", PARQUET, _inspected("parquet")),
    "robomimic": Target("robomimic.hdf5", HDF5, _loaded("robomimic", **ROBOMIMIC_KEYS)),
    "chosen robomimic": Target("robomimic.hdf5", HDF5, _loaded("robomimic", filter_key="train", **ROBOMIMIC_KEYS)),
    "lerobot": Target(
        "lerobot",
        {".json": JSON, ".parquet": [*BYTES, mutations.forge_parquet, mutations.forge_parquet_footer]},
        _loaded("lerobot", task="push"),
    ),
    **(
        {"ogbench": Target("ogbench.npz", NPZ, _loaded("ogbench", name="pointmaze-medium-navigate-singletask-v0"))}
        if importlib.util.find_spec("ogbench")
        else {}
    ),
    "d4rl cache": Target("d4rl", {".json": JSON, ".memmap": [*BYTES, replace_by_something_else]}, _d4rl, (D4RL_NAME,)),
    "d4rl file": Target("d4rl.hdf5", HDF5, _d4rl_file, (D4RL_NAME,)),
    "rlinf": Target("rlinf.yaml", YAML, read_overrides),
    "checkpoint": Target("checkpoint.pt", CHECKPOINT, load_checkpoint),
    **{
        f"minari {form}": Target(
            "minari",
            {f"{form}-v0/data/metadata.json": [*JSON, *[mutations.forge_metadata] * len(JSON)], end: damage},
            _minari(form),
            (MINARI_NAMES[form],),
        )
        for form, end, damage in (
            ("hdf5", "main_data.hdf5", HDF5[""]),
            ("arrow", ".arrow", BYTES),
            ("parquet", ".parquet", [*BYTES, mutations.forge_parquet_footer]),
        )
    },
}
