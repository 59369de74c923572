"""Minari's datasets, read through ``minari.load_dataset``: TorchRL's ``MinariExperienceReplay`` returns zeros."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm import tqdm

from iql_torchrl.atomic import NotAFile, regular_file
from iql_torchrl.configuration.declaring import option
from iql_torchrl.data.download import alone
from iql_torchrl.data.log import Log, description_at, refuse_undue_size, stored_size
from iql_torchrl.data.sources import hdf5, parquet
from iql_torchrl.data.sources.d4rl import RECORDED_IN
from iql_torchrl.data.sources.source import Namesake, PathText, Source
from iql_torchrl.data.storage import Allocate
from iql_torchrl.environments.specification import EnvironmentSpec, registered_id, task_of
from iql_torchrl.errors import LONGEST_REASON, DatasetError, first_line
from iql_torchrl.suggestions import nearest

if TYPE_CHECKING:
    from gymnasium import Space

# Levels of a space in a dataset's metadata.
_DEEPEST = 50
# Of Minari's own recordings of locomotion, those that D4RL has sets of the same name of.
_NAMESAKE = re.compile(
    rf"mujoco/({'|'.join(RECORDED_IN)})/(random|medium|expert|medium-replay|medium-expert|full-replay)-v\d+"
)
# HDF5's number of a link into another file.
_EXTERNAL = 64


@dataclass(frozen=True)
class RecordedEnvironment:
    """The environment that a dataset names for evaluation, else the one that it was recorded in.

    Args:
        name: Gymnasium id.
        kwargs: of ``gymnasium.make``.
        max_episode_steps: its limit, where it has one.
        references: returns that the dataset's metadata give as 0 and 100 of a normalised score.
        recorded_in: Gymnasium id of the environment that it was recorded in, where it names one for evaluation besides.
    """

    name: str
    kwargs: dict[str, Any]
    max_episode_steps: int | None
    references: tuple[float, float] | None
    recorded_in: str | None = None


class Minari(Source):
    """A Minari dataset, with HDF5, Arrow or Parquet storage, its steps in the order of its episodes.

    Every step has its own next observation, those at truncations included: none is dropped. An episode that ends
    without a flag, as one does whose recording was stopped, counts as truncated. Observations with parts are laid out
    by :func:`iql_torchrl.environments.observations.flatten`.
    """

    source: Literal["minari"] = "minari"
    name: str = option(
        "of the dataset: namespace, name, version",
        expected="the name of a dataset such as mujoco/hopper/medium-v0",
        example="mujoco/hopper/medium-v0",
        min_length=1,
    )
    root: PathText | None = option(
        "Minari's folder of datasets; null: MINARI_DATASETS_PATH, else ~/.minari/datasets",
        expected="a folder, or null",
        default=None,
    )
    download: bool = option("fetch what is not in that folder", default=True)

    @property
    def label(self) -> str:
        return self.name

    @property
    def own_next_observations(self) -> bool:
        return True

    def environment(self) -> tuple[EnvironmentSpec | None, str]:
        """As :func:`of_minari`, of the dataset's metadata."""
        return of_minari(self.name, environment_of(self.name, root=self.root, download=self.download))

    def recorded_in(self) -> str | None:
        return place_of(environment_of(self.name, root=self.root, download=self.download))

    @property
    def namesake(self) -> Namesake | None:
        return namesake_of(self.name)

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The steps, read at once, straight to where they stay.

        Raises:
            DatasetError: an unknown name, an unreachable host, a dataset of another version of Minari's format, spaces
                that are not supported, or a dataset that is damaged.
        """
        with _folder(self.name, self.root):
            dataset = _load(self.name, self.download)
            try:
                log = log_of(dataset, f"Minari dataset {self.name}", allocate)
            except DatasetError:
                raise
            except MemoryError as error:
                raise DatasetError(
                    f"Minari dataset {self.name} does not fit into memory ({first_line(error)}); "
                    "dataset.storage=memmap keeps it in files."
                ) from error
            except Exception as error:  # h5py, pyarrow, JSON and Minari each fail in ways of their own
                raise _damaged(self.name, error) from error
        yield log


def environment_of(name: str, *, root: str | Path | None = None, download: bool = True) -> RecordedEnvironment | None:
    """The environment in the dataset's metadata, if it has one.

    Only its id and arguments are taken, never the code that the metadata name.

    Raises:
        DatasetError: as :meth:`Minari.open` does.
    """
    with _folder(name, root):
        _load(name, download)
        try:
            return recorded_environment(_metadata(name))
        except Exception as error:  # whatever JSON may hold
            raise _damaged(name, error) from error


def recorded_environment(metadata: Mapping[str, Any]) -> RecordedEnvironment | None:
    """The environment in a dataset's metadata, if it has one.

    Raises:
        ValueError, KeyError, TypeError: it has one that is none.
    """
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    if not text:
        return None
    spec = json.loads(text)
    recorded_in = json.loads(metadata["env_spec"])["id"] if metadata.get("env_spec") else None
    return RecordedEnvironment(
        name=str(spec["id"]),
        kwargs=dict(spec.get("kwargs") or {}),
        max_episode_steps=spec.get("max_episode_steps"),
        references=_references(metadata.get("ref_min_score"), metadata.get("ref_max_score")),
        recorded_in=None if recorded_in is None else str(recorded_in),
    )


def of_minari(name: str, recorded: RecordedEnvironment | None) -> tuple[EnvironmentSpec | None, str]:
    """The environment that a Minari dataset names, with its own references or else D4RL's constants."""
    if recorded is None:
        return None, f"Minari dataset {name} names none"
    limit = {} if recorded.max_episode_steps is None else {"max_episode_steps": recorded.max_episode_steps}
    spec = EnvironmentSpec.of(registered_id(recorded.name, f"Minari dataset {name}"), {**recorded.kwargs, **limit})
    if recorded.references is not None:
        spec = replace(spec, references=recorded.references, note="by the references in the dataset's metadata")
    return spec, ""


def place_of(recorded: RecordedEnvironment | None) -> str | None:
    """The Gymnasium id that a dataset was recorded in; where it chose another task for evaluation, that one."""
    if recorded is None:
        return None
    place = recorded.recorded_in
    return place if place is not None and task_of(place) == task_of(recorded.name) else recorded.name


def namesake_of(name: str) -> Namesake | None:
    """D4RL's dataset that one of Minari's own recordings is taken for: ``hopper-medium-v2`` by its last two names."""
    found = _NAMESAKE.fullmatch(name)
    return Namesake("Minari", f"{found[1]}-{found[2]}-v2", RECORDED_IN[found[1]]) if found else None


def _references(low: float | None, high: float | None) -> tuple[float, float] | None:
    if low is None or high is None:
        return None
    low, high = float(low), float(high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low != high else None


@contextmanager
def _folder(name: str, root: str | Path | None) -> Iterator[None]:
    """Minari takes its folder from the environment alone."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    if root is not None:
        os.environ["MINARI_DATASETS_PATH"] = str(Path(root).expanduser().absolute())
    try:
        _make_folder(name)
        yield
    finally:
        os.environ.pop("MINARI_DATASETS_PATH", None)
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before


def _make_folder(name: str) -> None:
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        get_dataset_path()
    except OSError as error:
        raise DatasetError(
            f"Minari dataset {name}: the folder of datasets {error.filename} cannot be used ({first_line(error)}); set "
            "dataset.root=FOLDER."
        ) from error


def _path(name: str) -> Path:
    """The folder of a dataset's data."""
    from minari.storage.datasets_root_dir import get_dataset_path

    return get_dataset_path(name) / "data"


def _metadata(name: str) -> Mapping[str, Any]:
    return json.loads(description_at(_path(name) / "metadata.json").read_text())


def _load(name: str, download: bool):
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(name)
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{name!r} is no name of a Minari dataset, which looks like mujoco/hopper/medium-v0 (namespace, name, "
            "version)."
        ) from error
    if download:
        _download(name)
    elif not _path(name).exists():
        known = nearest(name, _local_names())
        raise DatasetError(
            f"Minari dataset {name} is not in {_path('').parent}{known.removesuffix('.')}; allow its download with "
            "dataset.download=true, or name another folder with dataset.root=FOLDER."
        )
    try:
        metadata = _metadata(name)
        version = str(metadata["minari_version"])
        if not re.fullmatch(r"[\w.+-]{1,40}", version):
            raise ValueError(f"minari_version in its metadata.json is {reprlib.repr(version)}")
        for key in ("observation_space", "action_space"):
            # Without it, Minari would start the environment that the metadata name, to ask it.
            if not metadata[key] or not isinstance(metadata[key], str):
                raise ValueError(f"{key} in its metadata.json is {reprlib.repr(metadata[key])}")
            _refuse_undue_space(metadata[key], key)
        # Minari makes a list of so many numbers.
        episodes, origin = int(metadata["total_episodes"]), f"Minari dataset {name} in {_path(name).parent}"
        refuse_undue_size(origin, f"a list of its {episodes:,} episodes", 8 * episodes, _stored(_path(name)))
    except DatasetError:
        raise
    except (OverflowError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(name, error) from error
    if version not in minari.supported_dataset_versions:
        raise DatasetError(
            f"Minari dataset {name} is of Minari {version}; the installed Minari {minari.__version__} reads "
            f"{min(minari.supported_dataset_versions)} to {max(minari.supported_dataset_versions)}. Install another "
            "Minari, or take another version of the dataset."
        )
    try:
        return minari.load_dataset(name)
    except ImportError as error:
        raise DatasetError(
            f"Minari dataset {name} is stored as {metadata.get('data_format')} ({first_line(error)}): pip install "
            "'iql_torchrl[arrow]'."
        ) from error
    except Exception as error:
        raise _damaged(name, error) from error


def _refuse_undue_space(text: str, key: str) -> None:
    """Refuse the description of a space that nests too deep, or has more numbers than it has bounds for.

    Raises:
        ValueError, KeyError, TypeError: saying so, or for a description that is none.
    """
    level = [json.loads(text)]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for space in level:
            if space["type"] == "Box" and math.prod(space["shape"]) > len(text):
                raise ValueError(
                    f"{key} in its metadata.json has a Box of shape {reprlib.repr(space['shape'])} without its bounds"
                )
            if space["type"] in ("Dict", "Tuple"):
                parts = space["subspaces"]
                below += parts.values() if isinstance(parts, dict) else parts
        level = below
    if level:
        raise ValueError(f"{key} in its metadata.json nests deeper than {_DEEPEST} levels")


def _stored(folder: Path) -> int:
    """Bytes of all files of a dataset's data, none of which may be anything but a file: reading a pipe would wait."""
    found = [path for path in folder.rglob("*") if not path.is_dir()]
    for path in found:
        try:
            regular_file(path)
        except NotAFile as error:
            raise ValueError(f"{path.name} in it {error}") from None
        if path.suffix == ".json":
            description_at(path)
    return stored_size(*found)


def _refuse_undue_files(folder: Path, origin: str) -> None:
    """Refuse files that declare more than they hold, before Minari reads them."""
    origin = f"{origin} in {folder.parent}"
    for path in sorted(folder.rglob("*.hdf5")):
        _refuse_undue_hdf5(path, origin)
    for path in sorted(folder.rglob("*.arrow")):
        _refuse_undue_arrow(path)
    for path in sorted(folder.rglob("*.parquet")):
        parquet.refuse_undue_file(path, f"{origin}: {path.name}")


def _refuse_undue_hdf5(path: Path, origin: str) -> None:
    """By the size of the file, and at h5py's lower level: there are some arrays for each of thousands of episodes."""
    from h5py import h5d, h5o  # pyright: ignore[reportAttributeAccessIssue]

    with hdf5.open_file(path) as file:
        links: list[tuple[bytes, int]] = []
        file.id.links.visit(lambda name, link: links.append((name, link.type)), info=True)
        declared, largest, what, outside = 0, 0, "", ""
        for name, kind in links:
            place = name.decode(errors="replace")
            if kind == _EXTERNAL:
                raise hdf5.elsewhere(place, origin, "is a link into another file")
            with contextlib.suppress(*hdf5.UNREADABLE):  # what is damaged, reading it will say
                found = h5o.open(file.id, name)
                if isinstance(found, h5d.DatasetID):
                    creation = found.get_create_plist()
                    layout = creation.get_layout()
                    if layout == h5d.VIRTUAL or (layout == h5d.CONTIGUOUS and creation.get_external_count()):
                        outside = place
                        break
                    size = math.prod(found.shape) * found.get_type().get_size()
                    declared += size
                    if size > largest:
                        largest, what = size, f"{place}, of shape {found.shape},"
        if outside:  # a virtual one of itself ends the process
            raise hdf5.elsewhere(outside, origin, "is stored in other files")
        refuse_undue_size(origin, what, declared, stored_size(path))


def _refuse_undue_arrow(path: Path) -> None:
    """Arrow takes the lengths in a file as they are, and would read beyond its buffers."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        for index in range(file.num_record_batches):
            file.get_batch(index).validate(full=True)


def _local_names() -> list[str]:
    import minari

    try:
        return list(minari.list_local_datasets())
    except Exception:  # a folder with something else in it
        return []


def _download(name: str) -> None:
    """Fetch a dataset that is not there, or whose download was broken off; one process at a time."""
    import minari

    path, folder = _path(name), _path("").parent
    stem = f".{name.replace('/', '.')}"
    unfinished = folder / f"{stem}.downloading"
    if path.exists() and not unfinished.exists():
        return
    try:
        with alone(folder / f"{stem}.lock", f"another process is fetching {name}"):
            if path.exists() and not unfinished.exists():
                return  # that process finished it
            unfinished.touch()
            minari.download_dataset(name, force_download=path.exists())
            unfinished.unlink()
    except Exception as error:  # whatever the client of the host raises
        if not path.exists():
            unfinished.unlink(missing_ok=True)
        raise DatasetError(
            f"Minari dataset {name} could not be downloaded ({first_line(error)}). Check the name, the connection, and "
            f"that {folder} can be written (dataset.root=FOLDER names another); or fetch it elsewhere, with `minari "
            f"download {name}`, and copy it to {path.parent}."
        ) from error


def _damaged(name: str, error: Exception) -> DatasetError:
    folder = _path(name).parent
    return DatasetError(
        f"the copy of Minari dataset {name} in {folder} is damaged ({type(error).__name__}: "
        f"{first_line(error, LONGEST_REASON)}); delete that folder to fetch it again."
    )


def log_of(dataset: Any, origin: str, allocate: Allocate) -> Log:
    """The steps of a ``minari.MinariDataset``; ``origin`` names it in errors.

    Raises:
        DatasetError: spaces that are not supported, or episodes that are not what the metadata say.
    """
    _refuse_undue_files(Path(dataset.storage.data_path), origin)
    columns = _columns(dataset, origin, allocate)
    return Log(origin, columns, own_next_observations=True, owned=True)


def _columns(dataset: Any, origin: str, allocate: Allocate) -> dict[str, np.ndarray]:
    size = _observation_size(dataset.observation_space, origin)
    width = _action_size(dataset.action_space, origin)
    lengths = [int(found["total_steps"]) for found in dataset.storage.get_episode_metadata(dataset.episode_indices)]
    rows = sum(lengths)
    folder = Path(dataset.storage.data_path)
    # Observations are counted once: the next ones are the same numbers again.
    declared = rows * (4 * (size + (width or 1)) + 6)
    refuse_undue_size(f"{origin} in {folder.parent}", f"a log of its {rows:,} steps", declared, _stored(folder))
    columns = {
        "observations": allocate((rows, size), np.float32),
        "next_observations": allocate((rows, size), np.float32),
        "actions": allocate((rows, width), np.float32) if width is not None else np.empty(rows, np.int64),
        "rewards": np.empty((rows, 1), np.float32),
        "terminals": np.empty(rows, bool),
        "timeouts": np.empty(rows, bool),
        "episode_ids": np.repeat(dataset.episode_indices, lengths),
    }
    start = 0
    episodes = dataset.iterate_episodes()
    bar = tqdm(zip(episodes, lengths, strict=True), total=len(lengths), unit="episode", desc=origin, delay=2)
    for episode, length in bar:
        _copy_episode(episode, length, columns, slice(start, start + length), dataset, origin)
        start += length
    whole = len(lengths) == dataset.storage.total_episodes  # and not a part that the user has picked
    if whole and rows != dataset.storage.total_steps:
        raise DatasetError(
            f"{origin}: its {len(lengths)} episodes have {rows} steps, its metadata say "
            f"{reprlib.repr(dataset.storage.total_steps)}: episodes are missing, or the copy is damaged. Delete its "
            "folder to fetch it again."
        )
    return columns


def _copy_episode(
    episode: Any, length: int, columns: dict[str, np.ndarray], rows: slice, dataset: Any, origin: str
) -> None:
    parts = {"rewards": episode.rewards, "terminations": episode.terminations, "truncations": episode.truncations}
    for key, values in parts.items():
        if len(values) != length:
            raise DatasetError(
                f"{origin}: episode {episode.id} has {length} steps by its metadata but {len(values)} {key}. The copy "
                "is damaged, or its storage is Arrow or Parquet, of which Minari reads episodes of up to 32,767 steps."
            )
    from iql_torchrl.environments.observations import digits, flatten

    with np.errstate(over="ignore"):  # what float32 cannot hold is refused with its row
        observations = flatten(dataset.observation_space, episode.observations, length + 1)
        columns["observations"][rows] = observations[:-1]
        columns["next_observations"][rows] = observations[1:]
        if columns["actions"].ndim == 2:
            columns["actions"][rows] = flatten(dataset.action_space, episode.actions, length)
        else:
            columns["actions"][rows] = digits(dataset.action_space, episode.actions, length)
        columns["rewards"][rows, 0] = episode.rewards
    columns["terminals"][rows], columns["timeouts"][rows] = episode.terminations, episode.truncations
    early = np.flatnonzero(np.logical_or(episode.terminations, episode.truncations)[:-1])
    if len(early):
        raise DatasetError(f"{origin}: episode {episode.id} goes on after it ended in step {early[0]} of {length}.")


def _observation_size(space: Space, origin: str) -> int:
    from iql_torchrl.environments.observations import UnsupportedSpace, flat_size

    try:
        return flat_size(space)
    except UnsupportedSpace as error:
        raise DatasetError(
            f"{origin}: {error}; images, text, sequences and graphs are not supported. Record a dataset of vectors."
        ) from error


def _action_size(space: Space, origin: str) -> int | None:
    """Numbers of a continuous action, or ``None`` for a discrete one."""
    from gymnasium.spaces import Box, Discrete

    if isinstance(space, Discrete) and space.start == 0:
        return None
    if isinstance(space, Box):
        return math.prod(space.shape)
    raise DatasetError(f"{origin}: action space {space} is not supported; only Box, and Discrete from 0, are.")
