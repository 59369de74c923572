"""OGBench's single tasks, read and relabelled by the ``ogbench`` package."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from iql_torchrl.configuration.declaring import option
from iql_torchrl.data.download import alone
from iql_torchrl.data.log import Log, file_at
from iql_torchrl.data.sources.numpy_arrays import open_archive
from iql_torchrl.data.sources.source import PathText, Source
from iql_torchrl.data.storage import Allocate
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import LONGEST_REASON, DatasetError, first_line
from iql_torchrl.suggestions import nearest

DEFAULT_ROOT = Path("~/.ogbench/data")
# How the data of each kind of environment were collected: a part of a dataset's name that its environment's has not.
_COLLECTED = {
    "pointmaze": ("navigate", "stitch"),
    "antmaze": ("navigate", "stitch", "explore"),
    "humanoidmaze": ("navigate", "stitch"),
    "antsoccer": ("navigate", "stitch"),
    "cube": ("play", "noisy"),
    "scene": ("play", "noisy"),
    "puzzle": ("play", "noisy"),
}
_MANIPULATION = ("cube", "scene", "puzzle")
# Seconds without an answer that end the package's download, which has no limit of its own.
_PATIENCE = 60.0


class _Task(NamedTuple):
    """A single task: its environment's id, the name of its data, and the arrays that its rewards are computed from."""

    environment: str
    data: str
    states: tuple[str, ...]


class OGBench(Source):
    """The data of an OGBench environment, with the rewards and masks of one of its tasks, by the package's functions.

    The masks are what bootstraps: a step in a state that solves the task is terminal, wherever it is. An episode is as
    it was recorded, and goes on after it; its last transition is truncated.
    """

    source: Literal["ogbench"] = "ogbench"
    name: str = option(
        "of the dataset and its task",
        expected="the name of a single task such as cube-single-play-singletask-v0",
        example="cube-single-play-singletask-v0",
        min_length=1,
    )
    path: PathText | None = option(
        "the data's own file; null: by its name in dataset.root", expected="an .npz file, or null", default=None
    )
    root: PathText | None = option(
        "folder of the package's files; null: ~/.ogbench/data", expected="a folder, or null", default=None
    )
    download: bool = option("have the package fetch what is not in that folder", default=True)

    @property
    def label(self) -> str:
        return self.name

    @property
    def preset(self) -> str:
        kind = self.name.partition("-")[0]
        return "ogbench_manipulation" if kind in _MANIPULATION else "ogbench_locomotion"

    @property
    def own_next_observations(self) -> bool:
        return True

    def environment(self) -> tuple[EnvironmentSpec | None, str]:
        """The task's, scored by its success.

        Raises:
            DatasetError: no name of a single task, or no ``ogbench`` package.
        """
        return EnvironmentSpec.of(_task(self.name).environment), ""

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The transitions, read at once.

        Raises:
            DatasetError: no name of a single task, no ``ogbench`` package, an unreachable host, a file that is missing,
                damaged, of another environment, or without the states that rewards and masks are computed from.
        """
        task = _task(self.name)
        path = self._file(task)
        _refuse_incomplete(path, task)
        columns = _relabelled(path, task)
        origin = f"OGBench dataset {self.name} in {path}"
        yield Log(origin, columns, own_next_observations=True, terminals_inside=True)

    def _file(self, task: _Task) -> Path:
        if self.path is not None:
            return file_at(self.path, "an .npz")
        root = Path(self.root if self.root is not None else DEFAULT_ROOT).expanduser().absolute()
        path = root / f"{task.data}.npz"
        if not path.exists():
            if not self.download:
                raise DatasetError(
                    f"OGBench dataset {self.name}: {path} does not exist; allow its download with "
                    "dataset.download=true, or name the file with dataset.path=FILE."
                )
            _download(task.data, root)
        return file_at(path, "an .npz")


def _package() -> Any:
    if importlib.util.find_spec("ogbench") is None:
        raise DatasetError(
            "dataset=ogbench needs the ogbench package: pip install 'iql_torchrl[ogbench]', on Python 3.11 or 3.12."
        )
    return importlib.import_module("ogbench")


def _task(name: str) -> _Task:
    if name.startswith(("visual-", "powderworld-")):
        states = f"; name {name.removeprefix('visual-')}, its states" if name.startswith("visual-") else ""
        raise DatasetError(f"OGBench dataset {name} has images for observations, which are not supported{states}.")
    _package()
    known = _known()
    if name in known:
        return known[name]
    goals = re.fullmatch(r"(.+?)(-oraclerep)?-v0", name)
    if goals is not None and (default := f"{goals[1]}-singletask-v0") in known:
        raise DatasetError(
            f"OGBench dataset {name} is for policies with goals: it has neither rewards nor masks; name one of its "
            f"tasks, {default} (its default), or {goals[1]}-singletask-task1-v0 to task5."
        )
    raise DatasetError(f"unknown OGBench dataset {name!r}{nearest(name, known)}")


def _known() -> dict[str, _Task]:
    """The single tasks of the installed package's environments, by the names of their datasets."""
    import gymnasium

    found = {}
    for place, (kind, collected) in itertools.product(gymnasium.registry, _COLLECTED.items()):
        single = re.fullmatch(rf"({kind}.*)-singletask(-task\d+)?-v0", place)
        if single is None:
            continue
        states = ("qpos", "button_states") if kind in ("scene", "puzzle") else ("qpos",)
        for how in collected:
            name = f"{single[1]}-{how}-singletask{single[2] or ''}-v0"
            found[name] = _Task(place, f"{single[1]}-{how}-v0", states)
    return found


def _download(data: str, root: Path) -> None:
    """By the package, which fetches the validation episodes too, and puts each file there once it has arrived."""
    package = _package()
    patience = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with alone(root / f".{data}.lock", f"another process is fetching {data}"), redirect_stdout(StringIO()):
            socket.setdefaulttimeout(_PATIENCE)
            package.download_datasets([data], str(root))
    except OSError as error:
        raise DatasetError(
            f"OGBench dataset {data} could not be downloaded from {package.utils.DATASET_URL} ({first_line(error)}); "
            f"put {data}.npz into {root}, or name the file with dataset.path=FILE."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def _refuse_incomplete(path: Path, task: _Task) -> None:
    """Refuse a file that lacks an array, before anything of it is read."""
    needed = ("observations", "actions", "terminals", *task.states)
    with open_archive(path, needed.__contains__) as archive:
        missing = [name for name in needed if name not in archive.files]
        found = ", ".join(archive.files) or "nothing"
    if missing:
        why = f"; rewards and masks of a task are computed from {' and '.join(task.states)}"
        raise DatasetError(
            f"{path}: missing {', '.join(missing)}; found {found}{why if set(missing) & {*task.states} else ''}. "
            "Fetch the file again, or record it with OGBench's own scripts."
        )


def _relabelled(path: Path, task: _Task) -> dict[str, np.ndarray]:
    package = _package()
    try:
        dataset = package.load_dataset(str(path), add_info=True)
    except Exception as error:  # NumPy evaluates headers, and lengths that differ fail in many ways
        raise _damaged(path, first_line(error, LONGEST_REASON)) from error
    rows = len(dataset["observations"])
    if len(dataset["next_observations"]) != rows or not rows:
        raise _damaged(path, "terminals does not mark the last row of an episode, in its last row")
    with _made(task) as environment:
        numbers, expected = dataset["qpos"].shape[-1], environment.unwrapped.model.nq
        if numbers != expected:
            raise DatasetError(
                f"{path}: qpos has {numbers} numbers a row but {task.environment} has {expected}: it is the file of "
                f"another environment; give that of {task.data}."
            )
        try:
            package.relabel_utils.relabel_dataset(task.environment, environment, dataset)
        except Exception as error:  # states of another shape
            raise _damaged(path, first_line(error, LONGEST_REASON)) from error
    return {
        "observations": dataset["observations"],
        "actions": dataset["actions"],
        "rewards": dataset["rewards"],
        "terminals": dataset["masks"] == 0,
        "timeouts": dataset["terminals"],
        "next_observations": dataset["next_observations"],
    }


@contextmanager
def _made(task: _Task) -> Iterator[Any]:
    """The task's environment, which knows its goal."""
    import gymnasium

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a viewer without a display, and of bounds in float64
        try:
            made = gymnasium.make(task.environment)
        except Exception as error:  # whatever an environment raises, it does not start
            raise DatasetError(
                f"OGBench's {task.environment}, whose goal the rewards are computed from, does not start: "
                f"{first_line(error)}"
            ) from error
        with closing(made):
            yield made


def _damaged(path: Path, reason: str) -> DatasetError:
    return DatasetError(f"{path}: it is damaged ({reason}); fetch the file again.")
