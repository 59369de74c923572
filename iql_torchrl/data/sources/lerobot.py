"""LeRobot's datasets, version 3: Parquet files of frames, and descriptions of their features, episodes and tasks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from iql_torchrl.atomic import NotAFile, regular_file
from iql_torchrl.configuration.declaring import option
from iql_torchrl.data.log import Column, Log, description_at, pieces, refuse_undue_size, stored_size
from iql_torchrl.data.sources.parquet import ParquetColumn, refuse_undue_file
from iql_torchrl.data.sources.source import PathText, Source, different_names
from iql_torchrl.data.storage import Allocate
from iql_torchrl.errors import LONGEST_REASON, DatasetError, first_line
from iql_torchrl.suggestions import nearest

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
# What a template of paths may have in braces.
_FIELD = re.compile(r"\{(chunk_index|file_index)(:0?\d{0,2}d)?\}")
_CONVERT = "convert it with LeRobot's own script, python -m lerobot.datasets.v30.convert_dataset_v21_to_v30"
_AGAIN = "fetch the dataset again"
_REWARDS = ("next.reward", "next.success")
_PICTURES = ("image", "video")
_FLOATS = ("float16", "float32", "float64")


class LeRobot(Source):
    """Episodes in the layout of LeRobot 3, without images.

    The frame after is the next observation; the last frame of an episode, which has none, becomes a transition only
    where it is terminal, and the one before is truncated else. A frame is terminal where ``next.done`` is, and where
    the dataset has ``next.success`` only if that is too: recordings that were cut are done as well. Rewards are
    ``next.reward``, else 1 where ``next.success`` is and 0 elsewhere.
    """

    source: Literal["lerobot"] = "lerobot"
    path: PathText = option("of the dataset", expected="a folder", example="FOLDER")
    observation_keys: Annotated[list[str], Field(min_length=1), AfterValidator(different_names)] = option(
        "features that are the observations, side by side in this order",
        expected="a list of different names such as [observation.state]",
        default=["observation.state"],
    )
    task: str | None = option(
        "of the episodes that are read, as in meta/tasks.parquet; null: all",
        expected="a task in words, or null",
        default=None,
    )

    @property
    def label(self) -> str:
        """The name of the folder."""
        return Path(self.path).name

    @property
    def preset(self) -> str:
        """Demonstrations by people with sparse rewards, as Adroit's and Kitchen's are."""
        return "kitchen_adroit"

    @property
    def own_next_observations(self) -> bool:
        return True

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The columns, read when they are asked for.

        Raises:
            DatasetError: no pyarrow; a folder, a description or a file that is missing, damaged or of another version;
                unknown features, images; rewards that are nowhere; files that do not fit their descriptions.
        """
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise DatasetError("dataset=lerobot needs pyarrow: pip install 'iql_torchrl[arrow]'.") from error
        folder = Path(self.path).expanduser()
        description = _Description.of(folder)
        description.refuse_unusable(self.observation_keys)
        with ExitStack() as opened:
            frames = _Frames.of(description, opened)
            yield Log(str(folder), _columns(frames, self.observation_keys, self.task), own_next_observations=True)


@dataclass(frozen=True)
class _Description:
    """``meta/info.json``: the features by their names, and where the frames are."""

    folder: Path
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    episodes: int
    frames: int

    @classmethod
    def of(cls, folder: Path) -> _Description:
        file = folder / "meta" / "info.json"
        if not folder.is_dir() or not file.exists():
            what = "has no meta/info.json" if folder.is_dir() else "is no folder"
            raise DatasetError(f"dataset {folder} {what}; give the folder of a LeRobot dataset as dataset.path=FOLDER.")
        try:
            found = json.loads(description_at(file).read_text())
            version = str(found["codebase_version"])[:20]
        except (NotAFile, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged(file, error) from error
        if not re.fullmatch(r"v?3(\.\d+)*", version):
            remedy = _CONVERT if re.match("v?[12]", version) else "only version 3 is read"
            raise DatasetError(f"{file}: the dataset is of LeRobot's version {version}, not 3; {remedy}.")
        try:
            features = {
                str(name): {"dtype": str(one["dtype"]), "shape": [int(size) for size in one["shape"]]}
                for name, one in found["features"].items()
            }
            data_path = str(found.get("data_path") or _DATA_PATH)
            episodes, frames = int(found["total_episodes"]), int(found["total_frames"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise _damaged(file, error) from error
        rest = _FIELD.sub("", data_path)
        odd = "{" in rest or "}" in rest or not rest.isprintable()
        if odd or Path(data_path).is_absolute() or ".." in Path(data_path).parts:
            raise DatasetError(f"{file}: data_path is {data_path[:200]!r}, not one such as {_DATA_PATH}; {_AGAIN}.")
        return cls(folder, features, data_path, episodes, frames)

    def place_of(self, chunk: int, file: int) -> Path:
        return self.folder / self.data_path.format(chunk_index=chunk, file_index=file)

    def refuse_unusable(self, observation_keys: Sequence[str]) -> None:
        """Refuse features that are not there, images, and what are no vectors; a dataset without rewards."""
        info = self.folder / "meta" / "info.json"
        vectors = [name for name, one in self.features.items() if one["dtype"] in _FLOATS and len(one["shape"]) == 1]
        choice = f"the low-dimensional features there are {', '.join(vectors) or 'none'}; choose among them"
        for key in (*observation_keys, "action"):
            what = "" if key == "action" else " of dataset.observation_keys"
            if key not in self.features:
                suggestion = nearest(key, vectors)
                hint = suggestion if suggestion.endswith("?") else "."
                raise DatasetError(f"{info}: there is no feature {key!r}{what}{hint} {choice.capitalize()}.")
            one = self.features[key]
            if one["dtype"] in _PICTURES:
                raise DatasetError(
                    f"{info}: {key}{what} is of dtype {one['dtype']}; images are not supported: {choice}."
                )
            discrete = key == "action" and one["dtype"].startswith(("int", "uint")) and one["shape"] == [1]
            if key not in vectors and not discrete:
                raise DatasetError(
                    f"{info}: {key}{what} has dtype {one['dtype']} and shape {one['shape']}; it must be a vector of "
                    f"floating-point numbers: {choice}."
                )
        if not {*_REWARDS} & {*self.features}:
            raise DatasetError(
                f"{info}: the dataset has neither next.reward nor next.success, without which nothing tells good "
                "actions from bad ones; add one of the two to its features and frames (LeRobot's add_features), such "
                "as 1 at the last frame of an episode that succeeded."
            )


@dataclass(frozen=True)
class _Frames:
    """The frames of all files, one after the other: ``lengths`` ``[episodes]`` are how many each episode has."""

    description: _Description
    files: Sequence[tuple[Path, ParquetFile]]
    lengths: np.ndarray

    @classmethod
    def of(cls, description: _Description, opened: ExitStack) -> _Frames:
        """Open the files that the episodes name, and compare their numbers of rows with the episodes'."""
        folder = description.folder
        listed = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
        if not listed:
            raise DatasetError(f"{folder}: there is no Parquet file in meta/episodes; {_AGAIN}.")
        lists = [(path, _opened(path, opened)) for path in listed]
        names = ("episode_index", "length", "data/chunk_index", "data/file_index")
        index, lengths, chunks, numbers = (_integers(_column(lists, name), name, folder) for name in names)
        if not len(index) == description.episodes > 0 or (np.sort(index) != np.arange(len(index))).any():
            raise DatasetError(
                f"{folder}: meta/info.json has {description.episodes} episodes, and meta/episodes lists {len(index)}, "
                f"which must be those from 0 on, at least one; {_AGAIN}."
            )
        order = np.argsort(index)
        lengths, chunks, numbers = lengths[order], chunks[order], numbers[order]
        if lengths.min() < 1 or lengths.sum() != description.frames:
            raise DatasetError(
                f"{folder}: meta/info.json has {description.frames} frames, and the lengths in meta/episodes sum to "
                f"{lengths.sum()}; {_AGAIN}."
            )
        starts = np.flatnonzero(np.append(True, (np.diff(chunks) != 0) | (np.diff(numbers) != 0)))
        files = []
        for start, rows in zip(starts.tolist(), np.add.reduceat(lengths, starts).tolist(), strict=True):
            path = description.place_of(int(chunks[start]), int(numbers[start]))
            file = _opened(path, opened)
            if file.metadata.num_rows != rows:
                raise DatasetError(
                    f"{path}: it has {file.metadata.num_rows} rows, but its episodes by meta/episodes {rows}; {_AGAIN}."
                )
            files.append((path, file))
        return cls(description, files, lengths)

    def column(self, name: str) -> Column:
        """A feature of all frames, ``[frames]`` or ``[frames, size]``."""
        found = _column(self.files, name)
        shape, expected = list(found.shape[1:]), self.description.features[name]["shape"]
        if shape != expected and not math.prod(shape) == math.prod(expected) == 1:
            raise DatasetError(
                f"{self.files[0][0]}: {name} has shape {shape} a row but {expected} in meta/info.json; {_AGAIN}."
            )
        return found

    def flags(self, name: str) -> np.ndarray:
        """A feature that says yes or no, ``[frames]``."""
        column = self.column(name)
        if column.dtype.kind not in "biuf":
            raise DatasetError(f"{self.description.folder}: {name} must be one flag a row, got dtype {column.dtype}.")
        found = _whole(column)
        odd = np.flatnonzero((found != 0) & (found != 1))
        if len(odd):
            raise DatasetError(
                f"{self.description.folder}: {name} must hold 0 and 1 only, got {found[odd[0]]} in frame {odd[0]}."
            )
        return found.astype(bool)

    def kept(self, task: str | None) -> np.ndarray:
        """Which frames are of the episodes of a task, flags ``[frames]``; their episodes' numbers are compared too."""
        folder = self.description.folder
        index = _integers(_column(self.files, "episode_index"), "episode_index", folder)
        wrong = np.flatnonzero(index != np.repeat(np.arange(len(self.lengths)), self.lengths))
        if len(wrong):
            raise DatasetError(
                f"{folder}: frame {wrong[0]} has episode_index {index[wrong[0]]}, which is another by the lengths in "
                f"meta/episodes; {_AGAIN}."
            )
        if task is None:
            return np.ones(len(index), dtype=bool)
        number = _number_of(task, folder / "meta" / "tasks.parquet")
        first = np.cumsum(self.lengths) - self.lengths
        tasks = _integers(_column(self.files, "task_index"), "task_index", folder)
        return np.repeat(tasks[first] == number, self.lengths)


def _columns(frames: _Frames, observation_keys: Sequence[str], task: str | None) -> dict[str, Column]:
    """The columns of a log: each kept frame's own, and the observation of the frame after it."""
    features, last = frames.description.features, np.zeros(frames.lengths.sum(), dtype=bool)
    last[np.cumsum(frames.lengths) - 1] = True
    success = frames.flags("next.success") if "next.success" in features else None
    done = frames.flags("next.done") if "next.done" in features else last & (success is not None)
    terminals = done if success is None else done & success
    rows = np.flatnonzero(frames.kept(task) & (terminals | ~last))
    after = np.minimum(rows + 1, len(last) - 1)
    observations, following = (_SideBySide([frames.column(key) for key in observation_keys]) for _ in range(2))
    actions = frames.column("action")
    rewards = np.zeros(0) if success is None else success.astype(np.float32)
    return {
        "observations": _Picked(observations, rows),
        "actions": _Picked(actions if actions.dtype.kind in "iu" else _SideBySide([actions]), rows),
        "rewards": _Picked(frames.column("next.reward") if "next.reward" in features else rewards, rows),
        "terminals": terminals[rows],
        # The last frame that was cut is an observation alone.
        "timeouts": ~terminals[rows] & last[after] & ~terminals[after],
        "next_observations": _Picked(following, np.where(terminals[rows], rows, after)),
    }


def _number_of(task: str, path: Path) -> int:
    """The number of a task, by ``meta/tasks.parquet``: a table of pandas, whose index is their texts."""
    with ExitStack() as opened:
        file = _opened(path, opened)
        try:
            table = file.read().to_pydict()
            numbers = table.pop("task_index")
            (texts,) = table.values()
            known = {str(text): int(number) for text, number in zip(texts, numbers, strict=True)}
        except Exception as error:  # Arrow's own, and a table of another kind
            raise _damaged(path, error) from error
    if task not in known:
        raise DatasetError(f"{path}: unknown dataset.task={task!r}{nearest(task, known)}")
    return known[task]


def _integers(column: Column, name: str, folder: Path) -> np.ndarray:
    if column.dtype.kind not in "iu" or math.prod(column.shape[1:]) != 1:
        raise DatasetError(f"{folder}: {name} must be one integer a row, got dtype {column.dtype}; {_AGAIN}.")
    return _whole(column).astype(np.int64)


def _whole(column: Column) -> np.ndarray:
    """One number a row, ``[rows]``."""
    return np.concatenate([np.empty(0, column.dtype), *(piece.reshape(len(piece)) for _, piece in pieces(column))])


def _opened(path: Path, opened: ExitStack) -> ParquetFile:
    from pyarrow.parquet import ParquetFile

    try:
        regular_file(path)
    except NotAFile as error:
        raise DatasetError(f"dataset file {path} {error}; {_AGAIN}.") from None
    try:
        refuse_undue_file(path, str(path))
        return opened.enter_context(ParquetFile(path, memory_map=True))
    except DatasetError:
        raise
    except Exception as error:  # Arrow's own, and counts that make no sense
        raise _damaged(path, error) from error


def _column(files: Sequence[tuple[Path, ParquetFile]], name: str) -> Column:
    """A column of all files, which must have it in one width."""
    columns: list[ParquetColumn] = []
    for path, file in files:
        if name not in file.schema_arrow.names:
            raise DatasetError(f"{path}: there is no column {name}; {_AGAIN}.")
        column = ParquetColumn(file, name, [name], str(path))
        # By the first row, which may be a longer list than the others.
        refuse_undue_size(str(path), name, math.prod(column.shape) * column.dtype.itemsize, stored_size(path))
        if columns and column.shape[1:] != columns[0].shape[1:]:
            raise DatasetError(
                f"{path}: {name} has shape {list(column.shape[1:])} a row but {list(columns[0].shape[1:])} in "
                f"{files[0][0]}; {_AGAIN}."
            )
        columns.append(column)
    return _OfFiles(columns)


class _OfFiles:
    """A column over several files, one after the other."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._starts = np.cumsum([0, *(column.shape[0] for column in columns)]).tolist()
        self.shape: tuple[int, ...] = (self._starts[-1], *columns[0].shape[1:])
        self.dtype: np.dtype = np.result_type(*(column.dtype for column in columns))

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        found = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        for column, begin, end in zip(self._columns, self._starts, self._starts[1:], strict=False):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                found[low - start : high - start] = column[low - begin : high - begin]
        return found


class _SideBySide:
    """Columns beside one another, ``[rows, size]``."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self.shape: tuple[int, ...] = (columns[0].shape[0], sum(math.prod(column.shape[1:]) for column in columns))
        self.dtype: np.dtype = np.result_type(*(column.dtype for column in columns))

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = [column[rows] for column in self._columns]
        return np.concatenate([one.reshape(len(one), -1) for one in found], axis=1)


class _Picked:
    """Some rows of a column, ascending."""

    def __init__(self, column: Column, rows: np.ndarray) -> None:
        self._column, self._rows = column, rows
        self.shape: tuple[int, ...] = (len(rows), *column.shape[1:])
        self.dtype: np.dtype = column.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        wanted = self._rows[rows]
        if not len(wanted):
            return np.empty((0, *self.shape[1:]), self.dtype)
        low, high = wanted[0], wanted[-1]
        return self._column[low : high + 1][wanted - low]


def _damaged(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{path}: it is damaged ({first_line(error, LONGEST_REASON)}); {_AGAIN}.")
