"""D4RL's datasets, downloaded and converted by TorchRL's ``D4RLExperienceReplay``, its traps repaired."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from torchrl.data.datasets import D4RLExperienceReplay
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from iql_torchrl.data import hdf5
from iql_torchrl.data.download import Downloaded, DownloadError, alone, download
from iql_torchrl.data.log import Column, Log, pieces
from iql_torchrl.data.transitions import as_array, check_log, has_next_observations
from iql_torchrl.errors import DatasetError, first_line
from iql_torchrl.suggestions import nearest

DEFAULT_ROOT = Path("~/.cache/iql_torchrl/d4rl")
_RECORD = "iql_torchrl.json"
# Where TorchRL's conversion of the prepared file has the arrays of D4RL's layout.
_PLACES = {
    "observations": "observation",
    "actions": "action",
    "rewards": ("next", "reward"),
    "terminals": ("info", "terminals"),
    "timeouts": ("info", "timeouts"),
    "next_observations": ("next", "observation"),
}
_PREPARED_AS = {"terminals": "infos/terminals", "timeouts": "infos/timeouts"}
_FLAGS = ("terminals", "timeouts")
# The max_episode_steps with which D4RL registers its environments; the first pattern that fits holds.
_STEP_LIMITS = {
    r"(bullet-)?(hopper|halfcheetah|walker2d|ant)-": 1000,
    r"antmaze-(eval-)?umaze": 700,
    r"antmaze-(eval-)?(medium|large)": 1000,
    r"(bullet-)?maze2d-open": 150,
    r"maze2d-umaze-(dense-)?v0": 150,
    r"maze2d-medium-(dense-)?v0": 250,
    r"maze2d-large-(dense-)?v0": 600,
    r"(bullet-)?maze2d-(eval-)?umaze": 300,
    r"(bullet-)?maze2d-(eval-)?medium": 600,
    r"(bullet-)?maze2d-(eval-)?large": 800,
    r"pen-human-longhorizon": 200,
    r"door-human-longhorizon": 300,
    r"relocate-human-longhorizon": 500,
    r"hammer-human-longhorizon": 600,
    r"pen-": 100,
    r"(door|hammer|relocate)-": 200,
    r"kitchen-": 280,
    r"flow-ring": 500,
    r"flow-merge": 750,
    r"carla-lane": 250,
    r"carla-town": 1000,
    r"minigrid-fourrooms": 50,
}


@contextmanager
def open_log(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = True,
    url: str | None = None,
    rebuild: bool = False,
    keep_timeouts: bool = False,
    timeout: float = 60.0,
) -> Iterator[Log]:
    """The rows of a D4RL dataset, downloaded on first use.

    ``D4RLExperienceReplay`` zeroes the next observation at timeouts, drops the last row, fails on files whose metadata
    are strings only, and takes a folder that an interrupted conversion left for a finished one. Here the file is
    fetched to one side, checked, prepared so that the conversion loses nothing, and moved into the cache in one
    rename, with SHA-256 sums that every later load compares.

    Args:
        name: such as ``"halfcheetah-medium-v2"``; TorchRL's table of D4RL addresses has it.
        root: cache folder, default ``~/.cache/iql_torchrl/d4rl``. TorchRL's own cache is not used: its conversions
            have lost the observations at timeouts.
        download: ``False`` uses the cache alone.
        url: another address of the same file: http, https or file.
        rebuild: fetch the file again, for a damaged cache. It must be the one that was fetched first.
        keep_timeouts: the file must have ``next_observations``.
        timeout: seconds without an answer that end an attempt to download.

    Raises:
        DatasetError: an unknown name, an unreachable host, a file that is not HDF5, another file than the first one,
            a cache that is damaged or cannot be written, or content that cannot be trained on. The cache is left as it
            was.
    """
    refuse_unknown(name)
    root = Path(root if root is not None else DEFAULT_ROOT).expanduser().absolute()
    if rebuild or not (root / name).exists():
        if not download:
            reason = "dataset.rebuild=true asks for a download" if rebuild else f"D4RL dataset {name} is not in {root}"
            raise DatasetError(f"{reason}; allow its download with dataset.download=true.")
        _fetch(name, url or D4RL_DATASETS[name], root, timeout, keep_timeouts, rebuild)
    yield Log(f"D4RL dataset {name}", _cached_columns(name, root), step_limit(name))


def refuse_unknown(name: str) -> None:
    """Raise where TorchRL's table of D4RL addresses does not have a dataset.

    Raises:
        DatasetError: with the nearest name.
    """
    if name not in D4RL_DATASETS:
        raise DatasetError(f"unknown D4RL dataset {name!r}{nearest(name, D4RL_DATASETS)}")


def step_limit(name: str) -> int | None:
    """Steps after which D4RL's environment of a dataset cuts an episode: its end where a file has no timeouts."""
    for pattern, limit in _STEP_LIMITS.items():
        if re.match(pattern, name):
            return limit
    return None


def _cached_columns(name: str, root: Path) -> dict[str, np.ndarray]:
    """The file's arrays, from TorchRL's memory maps, whose content is compared with the digest taken when written."""
    folder = root / name
    try:
        replay = D4RLExperienceReplay(name, batch_size=1, root=root, download=False, direct_download=True)[:]
        record = json.loads((folder / _RECORD).read_text())
        columns = {
            key: as_array(replay, place) for key, place in _PLACES.items() if key in (*record["keys"], "observations")
        }
        if _digest(columns) != record["sha256"]:
            raise ValueError("its content has changed since it was written")
    except Exception as error:  # damaged maps and descriptions fail in many ways, most of them inside tensordict
        if "Permission denied" in str(error):
            raise DatasetError(
                f"the cached copy of {name} in {folder} must be writable, because TorchRL maps it that way "
                f"({first_line(error)}); copy it to a folder of yours and set dataset.root=FOLDER."
            ) from error
        raise DatasetError(
            f"the cached copy of {name} in {folder} is damaged ({first_line(error)}); fetch it again with "
            "dataset.rebuild=true, or delete it."
        ) from error
    for column in columns.values():
        column.flags.writeable = False  # the cache's own files
    return columns


def _digest(columns: Mapping[str, Column]) -> str:
    digest = hashlib.sha256()
    for key in sorted(columns):
        digest.update(key.encode())
        for _, piece in pieces(columns[key]):
            digest.update(np.ascontiguousarray(piece).data)
    return digest.hexdigest()


def _fetch(name: str, url: str, root: Path, timeout: float, keep_timeouts: bool, rebuild: bool) -> None:
    """Download, check and convert beside the cache, then rename into it: an interruption leaves the cache as it was."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with alone(root / f".{name}.lock", f"another process is fetching {name}"):
            if (root / name).exists() and not rebuild:
                return  # that process finished it
            _clean_up(name, root)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as temporary:
                _convert(name, url, root, Path(temporary), timeout, keep_timeouts)
    except OSError as error:
        raise DatasetError(f"the D4RL cache {root} cannot be written ({error}); set dataset.root=FOLDER.") from error


def _clean_up(name: str, root: Path) -> None:
    """After a process that was killed: the old cache back in its place, unfinished work gone."""
    replaced = _replaced(root, name)
    if replaced.exists() and not (root / name).exists():
        os.replace(replaced, root / name)
    for stale in (replaced, *root.glob(f".{name}-*")):
        _remove(stale)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replaced(root: Path, name: str) -> Path:
    return root / f".{name}.replaced"


def _convert(name: str, url: str, root: Path, temporary: Path, timeout: float, keep_timeouts: bool) -> None:
    raw, prepared, folder = temporary / "download", temporary / "prepared.hdf5", root / name
    try:
        downloaded = download(url, root / f".{name}.download", label=name, timeout=timeout)
    except DownloadError as error:
        raise DatasetError(
            f"D4RL dataset {name} could not be downloaded from {url} ({error}). Check the connection, name a mirror "
            f"with dataset.url=ADDRESS, or fetch the file by hand and give it as dataset.url=file:///PATH."
        ) from error
    os.replace(root / f".{name}.download", raw)
    _refuse_another_file(folder, downloaded, url)
    keys, digest = _prepare(raw, prepared, name, url, keep_timeouts)
    raw.unlink()
    with _address(name, prepared.as_uri()):
        D4RLExperienceReplay(name, batch_size=1, root=temporary, direct_download=True)
    record = {
        "url": url,
        "keys": keys,
        "sha256": digest,
        "file": {"size": downloaded.size, "sha256": downloaded.sha256},
    }
    (temporary / name / _RECORD).write_text(json.dumps(record, indent=2))
    replaced = _replaced(root, name)
    if folder.exists():
        os.replace(folder, replaced)
    try:
        os.replace(temporary / name, folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    _remove(replaced)


def _refuse_another_file(folder: Path, downloaded: Downloaded, url: str) -> None:
    try:
        known = json.loads((folder / _RECORD).read_text())["file"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing was fetched before, or nothing of its record is left
    if known != downloaded.sha256:
        raise DatasetError(
            f"the file that {url} sent has SHA-256 {downloaded.sha256}, but the one fetched first had {known}; it is "
            f"another file. To use it all the same, delete {folder}."
        )


def _prepare(raw: Path, path: Path, name: str, url: str, keep_timeouts: bool) -> tuple[list[str], str]:
    """Check a file as any log, and write one from which TorchRL's conversion loses nothing.

    It drops the last row, so that one is there twice; it zeroes the next observations where ``terminals`` are set, so
    the real flags stand among the infos, which it copies as they are; and metadata, on which it may fail, stay out.

    Returns:
        the columns that the file has, and their digest.
    """
    origin = f"the file that {url} sent for D4RL dataset {name}"
    if not h5py.is_hdf5(raw):
        raise DatasetError(f"{origin} is not an HDF5 file.")
    try:
        with hdf5.open_log(raw, origin=origin) as log, h5py.File(path, "w") as file:
            check_log(log, keep_timeouts=keep_timeouts)
            keys = [key for key in _PLACES if key in log.columns]
            if not keep_timeouts and "next_observations" in keys and not has_next_observations(log):
                keys.remove("next_observations")  # which the default rule does not read
            written = {key: _write_padded(log.columns[key], key, file) for key in keys}
            file["terminals"] = np.zeros(log.columns["terminals"].shape[0] + 1, dtype=bool)
            return sorted(keys), _digest(written)
    except DatasetError as error:
        message = str(error)
        raise DatasetError(message if origin in message else f"{origin}: {message}") from error


class _WithoutLastRow:
    """A column of the prepared file as the cache will have it."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset = dataset
        self.shape: tuple[int, ...] = (dataset.shape[0] - 1, *dataset.shape[1:])
        self.dtype = dataset.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return self._dataset[start:stop]


def _write_padded(column: Column, key: str, file: h5py.File) -> Column:
    """Write a column as TorchRL's conversion keeps it: float32 or bool, two-dimensional but for rewards."""
    rows, width = column.shape[0], column.shape[1] if len(column.shape) == 2 else 1
    kind = bool if key in _FLAGS else np.float32
    shape = (rows + 1,) if key == "rewards" else (rows + 1, width)
    dataset = file.create_dataset(_PREPARED_AS.get(key, key), shape=shape, dtype=kind)
    for start, piece in pieces(column):
        dataset[start : start + len(piece)] = piece.reshape(len(piece), *shape[1:]).astype(kind)
    dataset[rows] = dataset[rows - 1]
    return _WithoutLastRow(dataset)


@contextmanager
def _address(name: str, url: str) -> Iterator[None]:
    original = D4RL_DATASETS[name]
    # The conversion also leaves this variable pointing to a folder that is gone.
    directory = os.environ.get("D4RL_DATASET_DIR")
    # Its log calls the prepared file a download.
    logger = logging.getLogger("torchrl")
    level = logger.level
    logger.setLevel(logging.WARNING)
    D4RL_DATASETS[name] = url
    try:
        yield
    finally:
        logger.setLevel(level)
        D4RL_DATASETS[name] = original
        os.environ.pop("D4RL_DATASET_DIR", None)
        if directory is not None:
            os.environ["D4RL_DATASET_DIR"] = directory
