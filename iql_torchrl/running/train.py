"""From data to a trained policy in plain Python: what ``recipes/iql_offline.py`` does, without a command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from signal import SIGINT
from typing import Any

from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer

from iql_torchrl.configuration.composing import as_overrides, compose, initialised
from iql_torchrl.configuration.declaring import read_options
from iql_torchrl.data.preparation import prepare_data
from iql_torchrl.data.sources.arrays import Arrays
from iql_torchrl.data.sources.minari_object import MinariObject
from iql_torchrl.data.sources.replay_buffer import ReplayBufferContent
from iql_torchrl.data.sources.source import Source
from iql_torchrl.errors import DatasetError
from iql_torchrl.running.options import OfflineOptions
from iql_torchrl.running.run import Run
from iql_torchrl.running.stopwatch import Stopwatch
from iql_torchrl.training.checkpoints import checkpoint_folders, find_checkpoints
from iql_torchrl.training.construction import build_step
from iql_torchrl.training.devices import resolve_device


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
        resume: go on from the newest good checkpoint in ``folder``.
        quiet: print nothing and show no bar.
        options: all others, by their names on the command line: ``{"train.num_seeds": 3, "eval.interval": 10_000}``.
        **algorithm: options ``algorithm.*`` by their last names, such as ``expectile=0.8``, ``variant="corl"``.

    Returns:
        the run: ``run.policy``, ``run.summary``, ``run.records.evaluations()``, ``run.step``, ``run.data``.

    Raises:
        ConfigurationError, DatasetError, SimulatorError, CheckpointError: each says what is wrong, and with what.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved where there is a folder.
    """
    given = {"env.name": environment, "train.seed": seed, **(options or {})}
    given |= {f"algorithm.{name}": value for name, value in algorithm.items()}
    given |= {} if steps is None else {"train.steps": steps}
    given |= {} if preset is None else {"algorithm": preset}
    given |= {} if folder is None else {"run_dir": str(folder), "resume": "auto" if resume else None}
    of_data = {name: given.pop(name) for name in list(given) if name.startswith("dataset.")}
    source = _source_of(data, {name.removeprefix("dataset."): value for name, value in of_data.items()})
    with initialised():
        checked = compose("iql_offline", ["~dataset", *as_overrides(given)], OfflineOptions, dataset=source)

    clock, path = Stopwatch(), None if folder is None else Path(folder).expanduser()
    seeds = checked.train.seeds
    resumed = None if path is None else find_checkpoints(checked.resume, checkpoint_folders(path, seeds))
    device = resolve_device(checked.train.device)
    with clock("data"):
        prepared = prepare_data(source, checked.algorithm, checked.env, device)
    step = build_step(checked.algorithm, checked.train, prepared, device)
    run = Run(step, prepared, checked, path, resumed=resumed, clock=clock, quiet=quiet)
    for losses in run.updates():
        run.evaluate_when_due()
        run.log_when_due(losses)
        run.save_when_due()
    if run.interrupted:
        run.close()
        raise KeyboardInterrupt if run.interrupted == SIGINT else SystemExit(128 + run.interrupted)
    run.finish()
    return run


def _source_of(data: Any, options: Mapping[str, Any]) -> Source:
    if isinstance(data, Source):
        return read_options(type(data), {**dict(data), **options}, "dataset.")
    if isinstance(data, ReplayBuffer | TensorDictBase):
        return read_options(ReplayBufferContent, {**options, "buffer": data}, "dataset.")
    if isinstance(data, Mapping):
        return read_options(Arrays, {**options, "arrays": data}, "dataset.")
    if hasattr(data, "iterate_episodes") and hasattr(data, "storage"):
        return read_options(MinariObject, {**options, "dataset": data}, "dataset.")
    raise DatasetError(
        f"cannot train on {type(data).__name__}; give arrays by name, a Minari dataset, a TorchRL replay buffer, a "
        "TensorDict of transitions, or a source."
    )
