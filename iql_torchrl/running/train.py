"""From data to a trained policy in plain Python: what ``recipes/iql_offline.py`` does, without a command line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from signal import SIGINT
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer

from iql_torchrl.configuration.composing import as_override, compose, initialised
from iql_torchrl.configuration.declaring import (
    declaration,
    declared_names,
    expected_of,
    find_mistakes,
    groups_of,
)
from iql_torchrl.configuration.options import AlgorithmOptions
from iql_torchrl.data.preparation import prepare_data
from iql_torchrl.data.sources.arrays import Arrays
from iql_torchrl.data.sources.minari_object import MinariObject
from iql_torchrl.data.sources.replay_buffer import ReplayBufferContent
from iql_torchrl.data.sources.source import Source
from iql_torchrl.errors import ConfigurationError, DatasetError
from iql_torchrl.reporting.run_lock import RunLock
from iql_torchrl.running.options import OfflineOptions
from iql_torchrl.running.run import Run
from iql_torchrl.running.starting import load_starts, start_from
from iql_torchrl.running.stopwatch import Stopwatch
from iql_torchrl.suggestions import nearest
from iql_torchrl.training.checkpoints import checkpoint_folders, find_checkpoints
from iql_torchrl.training.construction import build_step
from iql_torchrl.training.devices import resolve_device
from iql_torchrl.training.recording import ONE_THREAD


def train(
    data: Mapping[str, Any] | ReplayBuffer | TensorDictBase | Source | Any,
    *,
    environment: str | None = "auto",
    preset: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    options: Mapping[str, Any] | None = None,
    **algorithm: Any,
) -> Run:
    """Train a policy on data that a program holds.

    >>> run = train(dict(np.load("log.npz")), environment="Hopper-v5", steps=100_000, folder="runs/mine")
    >>> action = run.policy(observation)

    Args:
        data: arrays by name (``observations`` ``[N, O]``, ``actions`` ``[N, A]`` or integers ``[N]``, ``rewards``,
            ``terminals``, ``timeouts``, ... of a log in D4RL's layout), a ``minari.MinariDataset``, a TorchRL replay
            buffer, a TensorDict of transitions, or an object of ``iql_torchrl.data.sources``.
        environment: Gymnasium id of the environment for evaluation; ``"auto"`` is the one that the data come from,
            where they tell; ``None`` trains without, and holds out a tenth of the episodes.
        preset: ``"locomotion"``, ``"antmaze"``, ``"kitchen_adroit"`` or ``"behaviour_cloning"``; ``None`` picks one by
            the dataset's name.
        steps: updates; ``None``: 1,000,000, as in the paper.
        seed: of everything that is drawn. The global generators of Python, NumPy and torch are seeded with it.
        folder: of checkpoints, curves, summary and the other files of a run; ``None`` writes nothing.
        resume: go on from the newest good checkpoint in ``folder``, with the configuration there: arguments that would
            change what is learnt are refused, unless ``options`` have ``resume_with_changes=True``.
        quiet: print nothing and show no bar.
        options: all others, by their names on the command line: ``{"train.num_seeds": 3, "eval.interval": 10_000}``;
            they win over the arguments.
        **algorithm: options ``algorithm.*`` by their last names, such as ``expectile=0.8``, ``variant="corl"``.

    Returns:
        the run: ``run.policy``, ``run.summary``, ``run.records.evaluations()``, ``run.step``, ``run.data``.

    Raises:
        ConfigurationError, DatasetError, SimulatorError, CheckpointError: each says what is wrong, and with what.
        RunError: the folder cannot be written any more, or the simulator failed; the last checkpoint is good.
        DivergenceError: the losses or parameters of every seed became NaN or infinite.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved where there is a folder.
    """
    given: dict[str, Any] = {"env.name": environment, "train.seed": seed}
    chosen = {"train.steps": steps, "algorithm": preset, "run_dir": folder, "resume": "auto" if resume else None}
    given |= {name: value for name, value in chosen.items() if value is not None}
    given |= {str(name): value for name, value in (options or {}).items()}
    with ONE_THREAD:  # Hydra keeps its state in the process
        checked = _checked(data, given, algorithm, quiet)

    clock, path = Stopwatch(), Path(checked.run_dir).expanduser()
    written = path if "run_dir" in given else None
    with RunLock(path) if written else nullcontext():
        resumed = find_checkpoints(checked.resume, checkpoint_folders(path, checked.train.seeds))
        device = resolve_device(checked.train.device)
        with clock("data"):
            prepared = prepare_data(checked.dataset, checked.algorithm, checked.env, device)
        with ONE_THREAD:  # initial weights are drawn from, and a checkpoint restores, the generators of the process
            step = build_step(checked.algorithm, checked.train, prepared, device, resumed)
            if not resumed and (starts := load_starts(checked)):
                start_from(step, starts, checked, prepared, count=0)
            run = Run(step, prepared, checked, written, resumed=resumed, clock=clock, quiet=quiet)
        for losses in run.updates():
            run.evaluate_when_due()
            run.log_when_due(losses)
            run.save_when_due()
        run.finish()
    if run.interrupted:
        raise KeyboardInterrupt if run.interrupted == SIGINT else SystemExit(run.exit_status)
    run.raise_if_diverged()
    return run


def _checked(data: Any, given: Mapping[str, Any], algorithm: Mapping[str, Any], quiet: bool) -> OfflineOptions:
    """All options, with the data's source as their dataset.

    Raises:
        ConfigurationError: with all that is wrong.
    """
    kind, held = _source_of(data)
    held = {"source": kind.model_fields["source"].default, **held}
    others = [name for name in declared_names(OfflineOptions) if not name.startswith("algorithm.")]
    known = {*inspect.signature(train).parameters, *AlgorithmOptions.model_fields, *others} - {"algorithm"}
    unknown = [name for name in algorithm if name not in AlgorithmOptions.model_fields]
    mistakes = [f"unknown argument {name}{nearest(name, known)}" for name in unknown]
    given = {f"algorithm.{name}": value for name, value in algorithm.items() if name not in unknown} | dict(given)
    if given.get("resume") == "auto" and "run_dir" not in given:
        mistakes.append("resume=True goes on from what is in a folder; give folder=FOLDER too.")
    if "dataset" in given:
        mistakes.append("the data are the first argument; no dataset= can be chosen beside them.")

    of_data, lines = dict(held), ["~dataset"]
    for name, value in given.items():
        if name.startswith("dataset."):
            of_data[name.removeprefix("dataset.")] = _plain(value)
        elif name != "dataset":
            try:
                lines.append(as_override(name, _plain(value)))
            except TypeError:
                field = declaration(OfflineOptions, name)
                expected = "a plain value" if field is None or groups_of(field) else expected_of(field)
                mistakes.append(f"{name} must be {expected}, got {value!r}.")
    mistakes += (of_its_options := find_mistakes(kind, of_data, "dataset."))
    source = kind.model_validate(held if of_its_options else of_data)
    folder = Path(str(given["run_dir"])) if "run_dir" in given else None
    try:
        with initialised():
            checked = compose("iql_offline", lines, OfflineOptions, dataset=source, folder=folder, quiet=quiet)
    except ConfigurationError as error:
        raise ConfigurationError(*mistakes, *error.mistakes) from error
    if mistakes:
        raise ConfigurationError(*mistakes)
    return checked


def _source_of(data: Any) -> tuple[type[Source], dict[str, Any]]:
    """The kind of source that data are of, and the data in the place that they have in it."""
    if isinstance(data, Source):
        return type(data), dict(data)
    if isinstance(data, ReplayBuffer | TensorDictBase):
        return ReplayBufferContent, {"buffer": data}
    if isinstance(data, Mapping):
        return Arrays, {"arrays": data}
    if hasattr(data, "iterate_episodes") and hasattr(data, "storage"):
        return MinariObject, {"dataset": data}
    hint = " For a file, that is iql_torchrl.data.sources.HDF5(path=FILE), or another of its kinds."
    raise DatasetError(
        f"cannot train on {type(data).__name__}; give arrays by name, a Minari dataset, a TorchRL replay buffer, a "
        f"TensorDict of transitions, or a source.{hint if isinstance(data, str | Path) else ''}"
    )


def _plain(value: Any) -> Any:
    """NumPy's numbers, arrays, tensors and paths as the plain values that they stand for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value
