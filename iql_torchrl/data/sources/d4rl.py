"""D4RL's datasets, downloaded and converted by TorchRL's ``D4RLExperienceReplay``, its traps repaired."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from pydantic import model_validator

from iql_torchrl.atomic import NotAFile, regular_file
from iql_torchrl.configuration.declaring import option
from iql_torchrl.data.checks import check_log, has_next_observations
from iql_torchrl.data.download import Downloaded, DownloadError, alone, download
from iql_torchrl.data.log import Column, Log, description_at, pieces, refuse_undue_size, stored_size
from iql_torchrl.data.sources import hdf5
from iql_torchrl.data.sources.source import PathText, Source
from iql_torchrl.data.storage import Allocate
from iql_torchrl.environments.specification import EnvironmentSpec, score_of_kitchen
from iql_torchrl.errors import LONGEST_REASON, ConfigurationError, DatasetError, first_line
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
# Names of arguments in an address that give access to a file.
_SECRET = re.compile("token|key|sig|secret|passw|credential|auth", re.IGNORECASE)
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
# The environments that D4RL's are evaluated in.
_KITCHEN_TASKS = {
    "complete": ["microwave", "kettle", "light switch", "slide cabinet"],
    "partial": ["microwave", "kettle", "light switch", "slide cabinet"],
    "mixed": ["microwave", "kettle", "bottom burner", "light switch"],
}
_HANDS = {
    "pen": "AdroitHandPen-v1",
    "door": "AdroitHandDoor-v1",
    "hammer": "AdroitHandHammer-v1",
    "relocate": "AdroitHandRelocate-v1",
}
_LOCOMOTION = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
# The environments of Gym's that D4RL's locomotion was recorded in, whichever version the dataset is.
RECORDED_IN = {"hopper": "Hopper-v2", "halfcheetah": "HalfCheetah-v2", "walker2d": "Walker2d-v2", "ant": "Ant-v2"}
_SIZES = {"umaze": "UMaze", "medium": "Medium", "large": "Large", "open": "Open"}
_NO_SIMULATOR = {
    "flow": "Flow, a traffic simulator",
    "carla": "CARLA",
    "bullet": "PyBullet's environments",
    "minigrid": "D4RL's version of MiniGrid",
}


class D4RL(Source):
    """A dataset of D4RL's, downloaded on first use and converted by TorchRL.

    ``D4RLExperienceReplay`` zeroes the next observation at timeouts, drops the last row, fails on files whose metadata
    are strings only, and takes a folder that an interrupted conversion left for a finished one. Here the file is
    fetched to one side, checked, prepared so that the conversion loses nothing, and moved into the cache in one
    rename, with SHA-256 sums that every later load compares. TorchRL's own cache is not used: its conversions have lost
    the observations at timeouts.
    """

    source: Literal["d4rl"] = "d4rl"
    name: str = option(
        "of the dataset, in TorchRL's table of D4RL addresses",
        expected="the name of a dataset such as halfcheetah-medium-v2",
        example="halfcheetah-medium-v2",
        min_length=1,
    )
    root: PathText | None = option(
        "cache of downloads; null: ~/.cache/iql_torchrl/d4rl", expected="a folder, or null", default=None
    )
    download: bool = option("fetch what is not in the cache", default=True)
    url: PathText | None = option(
        "another address of the same file",
        learnt=False,
        expected="an address (http, https or file), or null",
        default=None,
    )
    rebuild: bool = option(
        "fetch the file again, for a damaged cache; it must be the one that was fetched first", default=False
    )
    keep_timeouts: bool = option("keep the rows at timeouts, with the file's own next_observations", default=False)
    timeout: float = option("seconds without an answer that end an attempt to download", gt=0, default=60.0)

    @model_validator(mode="after")
    def _no_secret_in_the_address(self) -> D4RL:
        """Options are written down, in ``config.yaml``, in checkpoints and by loggers."""
        try:
            parts = urllib.parse.urlsplit(self.url or "")
        except ValueError:  # no address at all, which the download says
            return self
        found = "a user name or password" if "@" in parts.netloc else ""
        for name in urllib.parse.parse_qs(parts.query, keep_blank_values=True):
            found = f"a secret, {name}" if _SECRET.search(name) else found
        if found:
            raise ConfigurationError(
                f"dataset.url must be an address without {found}, which a run would write down with its options; fetch "
                "the file by hand and give dataset.url=file:///PATH."
            )
        return self

    @property
    def label(self) -> str:
        return self.name

    @property
    def own_next_observations(self) -> bool:
        return self.keep_timeouts

    def environment(self) -> tuple[EnvironmentSpec | None, str]:
        return of_d4rl(self.name)

    def recorded_in(self) -> str | None:
        return RECORDED_IN.get(self.name.partition("-")[0]) or super().recorded_in()

    @property
    def d4rl_name(self) -> str:
        return self.name

    def environment_named(self, name: str) -> EnvironmentSpec:
        """Another version or maze of the data's environment keeps the data's layout."""
        spec, (of_data, _) = EnvironmentSpec.of(name), self.environment()
        same = of_data is not None and of_data.family == spec.family
        return replace(spec, layout=of_data.layout) if of_data is not None and same else spec

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The rows, mapped from the cache.

        Raises:
            DatasetError: an unknown name, an unreachable host, a file that is not HDF5, another file than the first
                one, a cache that is damaged or cannot be written, or content that cannot be trained on. The cache is
                left as it was.
        """
        refuse_unknown(self.name)
        root = Path(self.root if self.root is not None else DEFAULT_ROOT).expanduser().absolute()
        if self.rebuild or not (root / self.name).exists():
            if not self.download:
                absent = f"D4RL dataset {self.name} is not in {root}"
                reason = "dataset.rebuild=true asks for a download" if self.rebuild else absent
                raise DatasetError(f"{reason}; allow its download with dataset.download=true.")
            url = self.url or _addresses()[self.name]
            _fetch(self.name, url, root, self.timeout, self.keep_timeouts, self.rebuild)
        yield Log(
            f"D4RL dataset {self.name}",
            _cached_columns(self.name, root),
            own_next_observations=self.own_next_observations,
            max_episode_steps=step_limit(self.name),
            count_after_terminal=1,
        )


def refuse_unknown(name: str) -> None:
    """Raise where TorchRL's table of D4RL addresses does not have a dataset.

    Raises:
        DatasetError: with the nearest name.
    """
    known = _addresses()
    if name not in known:
        raise DatasetError(f"unknown D4RL dataset {name!r}{nearest(name, known)}")


def _addresses() -> dict[str, str]:
    from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

    return D4RL_DATASETS


def step_limit(name: str) -> int | None:
    """Steps after which D4RL's environment of a dataset cuts an episode: its end where a file has no timeouts."""
    for pattern, limit in _STEP_LIMITS.items():
        if re.match(pattern, name):
            return limit
    return None


def of_d4rl(name: str) -> tuple[EnvironmentSpec | None, str]:
    """The environment that a D4RL dataset is evaluated in, and why there is none, where there is none.

    Gymnasium's -v4 environments have the dynamics of D4RL's v2 locomotion data; AntMaze, Maze2D, Adroit and Kitchen are
    gymnasium-robotics', with D4RL's step limits and order of observations.

    Raises:
        DatasetError: an unknown name.
    """
    refuse_unknown(name)
    task, _, rest = name.partition("-")
    limit = {"max_episode_steps": step_limit(name)}
    if task in _LOCOMOTION:
        return EnvironmentSpec.of(_LOCOMOTION[task]), ""
    if task in _HANDS:
        return EnvironmentSpec.of(_HANDS[task], limit), ""
    if task == "kitchen":
        options = {
            "tasks_to_complete": _KITCHEN_TASKS[rest.rpartition("-")[0]],
            "robot_noise_ratio": 0.1,
            "object_noise_ratio": 0.1,
        }
        spec = EnvironmentSpec("FrankaKitchen-v1", options | limit, "d4rl_kitchen", scores_data=False)
        return score_of_kitchen(spec), ""
    size = next((_SIZES[word] for word in rest.split("-") if word in _SIZES), None)
    if task == "antmaze" and size and not rest.startswith("eval"):
        options = {"continuing_task": False, "reset_target": False} | limit
        return replace(EnvironmentSpec.of(f"AntMaze_{size}-v4", options), layout="goal_first"), ""
    if task == "maze2d" and size and not rest.startswith("eval"):
        dense = "Dense" if "dense" in rest else ""
        options = {"continuing_task": True, "reset_target": False} | limit
        return replace(EnvironmentSpec.of(f"PointMaze_{size}{dense}-v3", options), layout="observation"), ""
    if rest.startswith("eval"):
        return None, "gymnasium-robotics has no maze of this dataset's layout"
    return None, f"{_NO_SIMULATOR.get(task, 'its simulator')}, where it was recorded, is not supported"


def _cached_columns(name: str, root: Path) -> dict[str, np.ndarray]:
    """The file's arrays, from TorchRL's memory maps, whose content is compared with the digest taken when written."""
    from torchrl.data.datasets import D4RLExperienceReplay

    folder = root / name
    try:
        _refuse_undue_maps(folder, f"D4RL dataset {name} in {folder}")
        replay = D4RLExperienceReplay(name, batch_size=1, root=root, download=False, direct_download=True)[:]
        record = json.loads(description_at(folder / _RECORD).read_text())
        columns = {
            key: replay.get(place).numpy() for key, place in _PLACES.items() if key in (*record["keys"], "observations")
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
            f"the cached copy of {name} in {folder} is damaged ({first_line(error, LONGEST_REASON)}); fetch it again "
            "with dataset.rebuild=true, or delete it."
        ) from error
    for column in columns.values():
        column.flags.writeable = False  # the cache's own files
    return columns


def _refuse_undue_maps(folder: Path, origin: str) -> None:
    """Refuse descriptions of more than the mapped files have: mapping them would make the files as long as that.

    Raises:
        ValueError, OSError, ...: saying so; for something else than a file; for pickles, which would be loaded.
    """
    files: list[Path] = []
    declared = 0
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        regular_file(path)
        if path.suffix in (".pickle", ".pkl"):
            raise ValueError(f"{path.name} in it is never unpickled")
        if path.name != "meta.json":
            continue
        for key, entry in json.loads(description_at(path).read_text()).items():
            if isinstance(entry, dict) and "dtype" in entry:
                file = regular_file(path.parent / f"{key}.memmap")
                size = math.prod(entry["shape"]) * np.dtype(entry["dtype"].removeprefix("torch.")).itemsize
                if size > file.stat().st_size:
                    raise ValueError(f"{file.relative_to(folder)} has {file.stat().st_size:,} bytes, not {size:,}")
                files, declared = [*files, file], declared + size
    refuse_undue_size(origin, "what it maps", declared, stored_size(*files))


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
    from torchrl.data.datasets import D4RLExperienceReplay

    _refuse_no_file(name, url)
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


def _refuse_no_file(name: str, url: str) -> None:
    """Refuse the address of something local that is no file, as a named pipe, which would be waited for."""
    if not url.lower().startswith("file:"):
        return
    path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
    try:
        regular_file(path)
    except NotAFile as error:
        if "does not exist" not in str(error):  # which the download says
            raise DatasetError(
                f"D4RL dataset {name} could not be downloaded from {url} ({path} {error}); give the address of a file "
                "as dataset.url=file:///PATH."
            ) from None


def _refuse_another_file(folder: Path, downloaded: Downloaded, url: str) -> None:
    try:
        known = json.loads(description_at(folder / _RECORD).read_text())["file"]["sha256"]
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
        with hdf5.open_columns(raw, origin=origin) as (columns, _), h5py.File(path, "w") as file:
            log = Log(origin, columns, own_next_observations=keep_timeouts)
            check_log(log)
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
    addresses = _addresses()
    original = addresses[name]
    # The conversion also leaves this variable pointing to a folder that is gone.
    directory = os.environ.get("D4RL_DATASET_DIR")
    # Its log calls the prepared file a download.
    logger = logging.getLogger("torchrl")
    level = logger.level
    logger.setLevel(logging.WARNING)
    addresses[name] = url
    try:
        yield
    finally:
        logger.setLevel(level)
        addresses[name] = original
        os.environ.pop("D4RL_DATASET_DIR", None)
        if directory is not None:
            os.environ["D4RL_DATASET_DIR"] = directory
