"""D4RL's datasets, downloaded and converted by TorchRL's ``D4RLExperienceReplay``, its traps repaired."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from tensordict import TensorDict
from torchrl.data.datasets import D4RLExperienceReplay
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS
from tqdm import tqdm

from iql_torchrl.data.hdf5 import open_log
from iql_torchrl.data.transitions import ReadArray, as_array, transitions_from_arrays
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
_COLUMNS = ("rewards", "terminals", "timeouts")
# d4rl/gym_mujoco: where a file has no timeouts, episodes end at the environment's limit.
_MAX_EPISODE_STEPS = {"hopper": 1000, "halfcheetah": 1000, "walker2d": 1000, "ant": 1000}


def load(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = True,
    url: str | None = None,
    keep_timeouts: bool = False,
    timeout: float = 60.0,
) -> TensorDict:
    """Transitions of a D4RL dataset, downloaded on first use.

    ``D4RLExperienceReplay`` zeroes the next observation at timeouts, drops the last row, fails on files whose metadata
    are strings only, and takes a folder that an interrupted conversion left for a finished one. Here the file is
    fetched to one side, checked, prepared so that the conversion loses nothing, and moved into the cache in one
    rename; the transitions then follow the rule of D4RL's own ``qlearning_dataset``.

    Args:
        name: such as ``"halfcheetah-medium-v2"``; TorchRL's table of D4RL addresses has it.
        root: cache folder, default ``~/.cache/iql_torchrl/d4rl``. TorchRL's own cache is not used: its conversions
            have lost the observations at timeouts.
        download: ``False`` uses the cache alone.
        url: another address of the same file: http, https or file.
        keep_timeouts: keep the rows at timeouts with the file's ``next_observations``.
        timeout: seconds without an answer before the host counts as unreachable.

    Returns:
        the TensorDict described in :func:`iql_torchrl.data.load_transitions`.

    Raises:
        DatasetError: an unknown name, an unreachable host, a file that is not HDF5, or content that cannot be trained
            on. The cache is left as it was.
    """
    if name not in D4RL_DATASETS:
        raise DatasetError(f"unknown D4RL dataset {name!r}{nearest(name, D4RL_DATASETS)}")
    root = Path(root if root is not None else DEFAULT_ROOT).expanduser().absolute()
    if not (root / name).exists():
        if not download:
            raise DatasetError(f"D4RL dataset {name} is not in {root}; allow its download with dataset.download=true.")
        _fetch(name, url or D4RL_DATASETS[name], root, timeout, keep_timeouts)
    arrays = _cached_arrays(name, root)
    return transitions_from_arrays(
        arrays.__getitem__,
        set(arrays),
        origin=f"D4RL dataset {name}",
        keep_timeouts=keep_timeouts,
        max_episode_steps=_MAX_EPISODE_STEPS.get(name.split("-")[0]),
    )


def environment_of(name: str) -> str | None:
    """The Gymnasium environment that a D4RL dataset is evaluated on: the -v4 ones have its v2 data's dynamics."""
    environments = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
    return environments.get(name.split("-")[0])


def _cached_arrays(name: str, root: Path) -> dict[str, np.ndarray]:
    """The file's arrays, from TorchRL's memory maps, whose content is compared with the digest taken when written."""
    folder = root / name
    try:
        replay = D4RLExperienceReplay(name, batch_size=1, root=root, download=False, direct_download=True)[:]
        record = json.loads((folder / _RECORD).read_text())
        arrays = {
            key: as_array(replay, place) for key, place in _PLACES.items() if key in (*record["keys"], "observations")
        }
        if _digest(arrays) != record["sha256"]:
            raise ValueError("its content has changed since it was written")
    except Exception as error:  # damaged maps and descriptions fail in many ways, most of them inside tensordict
        raise DatasetError(
            f"the cached copy of {name} in {folder} is damaged ({first_line(error)}); delete it to fetch it again."
        ) from error
    return arrays


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)
    return digest.hexdigest()


def _fetch(name: str, url: str, root: Path, timeout: float, keep_timeouts: bool) -> None:
    """Download, check and convert beside the cache, then rename into it: an interruption leaves nothing behind."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root)
    except OSError as error:
        raise DatasetError(f"the D4RL cache {root} cannot be written ({error}); set dataset.root=FOLDER.") from error
    with folder as temporary:
        raw, prepared = Path(temporary) / "download", Path(temporary) / "prepared.hdf5"
        _download(url, raw, name, timeout)
        arrays = _checked_arrays(raw, name, url, keep_timeouts)
        raw.unlink()
        _write_for_torchrl(arrays, prepared)
        with _address(name, prepared.as_uri()):
            D4RLExperienceReplay(name, batch_size=1, root=temporary, direct_download=True)
        converted = Path(temporary) / name
        record = {"url": url, "keys": sorted(arrays), "sha256": _digest(arrays)}
        (converted / _RECORD).write_text(json.dumps(record, indent=2))
        try:
            os.replace(converted, root / name)
        except OSError:
            if not (root / name / _RECORD).is_file():  # else another process finished first, with the same content
                raise


def _download(url: str, path: Path, name: str, timeout: float) -> None:
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, desc=f"download {name}") as bar:
                while block := response.read(1 << 20):
                    received += file.write(block)
                    bar.update(len(block))
            if total and received != total:
                raise OSError(f"got {received} bytes of {total}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise DatasetError(
            f"D4RL dataset {name} could not be downloaded from {url} ({reason}). Check the connection, name a mirror "
            f"with dataset.url=ADDRESS, or fetch the file by hand and use dataset=hdf5 dataset.path=FILE."
        ) from error


def _checked_arrays(raw: Path, name: str, url: str, keep_timeouts: bool) -> dict[str, np.ndarray]:
    """The arrays that training needs, after the checks of any log: what cannot be trained on stays out of the cache."""
    origin = f"the file that {url} sent for D4RL dataset {name}"
    if not h5py.is_hdf5(raw):
        raise DatasetError(f"{origin} is not an HDF5 file.")
    try:
        with open_log(raw, origin) as (read, keys):
            transitions_from_arrays(read, keys, origin=origin, keep_timeouts=keep_timeouts)
            if not keep_timeouts and not _can_keep_timeouts(read, keys, origin):
                keys.discard("next_observations")  # which the default rule does not read
            arrays = {key: read(key) for key in _PLACES if key in keys}
    except DatasetError as error:
        message = str(error)
        raise DatasetError(message if origin in message else f"{origin}: {message}") from error
    rows = len(arrays["terminals"])
    for key, array in arrays.items():
        kind = bool if key in ("terminals", "timeouts") else np.float32
        arrays[key] = array.reshape(rows, -1 if key not in _COLUMNS else 1).astype(kind)
    return arrays


def _can_keep_timeouts(read: ReadArray, keys: set[str], origin: str) -> bool:
    try:
        transitions_from_arrays(read, keys, origin=origin, keep_timeouts=True)
    except DatasetError:
        return False
    return True


def _write_for_torchrl(arrays: dict[str, np.ndarray], path: Path) -> None:
    """A file from which TorchRL's conversion loses nothing.

    It drops the last row, so that one is there twice; it zeroes the next observations where ``terminals`` are set, so
    the real flags stand among the infos, which it copies as they are; and metadata, on which it may fail, stay out.
    """
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            padded = np.concatenate([array, array[-1:]])
            file[_PREPARED_AS.get(key, key)] = padded[:, 0] if key == "rewards" else padded
        file["terminals"] = np.zeros(len(arrays["terminals"]) + 1, dtype=bool)


@contextmanager
def _address(name: str, url: str) -> Iterator[None]:
    original = D4RL_DATASETS[name]
    # The conversion also leaves this variable pointing to a folder that is gone.
    directory = os.environ.get("D4RL_DATASET_DIR")
    D4RL_DATASETS[name] = url
    try:
        yield
    finally:
        D4RL_DATASETS[name] = original
        os.environ.pop("D4RL_DATASET_DIR", None)
        if directory is not None:
            os.environ["D4RL_DATASET_DIR"] = directory
