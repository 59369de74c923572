"""Checkpoints: one file each, written whole or not at all.

``torchrl.checkpoint`` writes a folder or archive without fsync, so a crash can leave one that is complete in name only;
its ``GlobalRNGState`` is used here.
"""

from __future__ import annotations

import pickle
import re
import reprlib
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import GlobalRNGState

from iql_torchrl.atomic import NotAFile, regular_file, write_atomically
from iql_torchrl.errors import CheckpointError, first_line
from iql_torchrl.training.step import TrainingStep

FORMAT = "iql_torchrl checkpoint"
VERSION = 1
_KEYS = {"step", "training", "policy", "architecture", "random", "config", "dataset_fingerprint", "environment"}
DIVERGED = "diverged-step-"
_TYPES = {"step": int, "training": Mapping, "policy": Mapping, "architecture": Mapping, "dataset_fingerprint": str}
BEST = "best-step-"
_NAME = re.compile(r"(?:best-)?step-(\d+)\.pt")


def save_checkpoint(folder: Path, step: int, content: Mapping[str, Any], *, best: bool = False) -> Path:
    """Write ``step-<step>.pt``.

    Args:
        folder: ``checkpoints/`` of the run.
        step: updates done.
        content: the entries of a checkpoint besides step and random state, which are added here.
        best: write ``best-step-<step>.pt``, for the best evaluation so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{BEST if best else 'step-'}{step:08d}.pt"
    checkpoint = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "random": GlobalRNGState().state_dict(),
        **content,
    }
    write_atomically(path, lambda file: torch.save(checkpoint, file))
    return path


def sharing(state: Any, tensors: Collection[torch.Tensor]) -> Any:
    """A state with those of ``tensors`` in place of its own that equal them: a file has their numbers once."""
    if isinstance(state, Mapping):
        return {name: sharing(value, tensors) for name, value in state.items()}
    if not isinstance(state, torch.Tensor):
        return state
    kind = state.shape, state.dtype, state.device
    alike = (one for one in tensors if (one.shape, one.dtype, one.device) == kind)
    return next((one for one in alike if torch.equal(one, state)), state)


def remove_old_checkpoints(folder: Path, *, keep: int) -> None:
    """Remove the oldest checkpoints of a folder beyond the newest ``keep``."""
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()


def remove_surpassed(folder: Path, step: int) -> None:
    """Remove the checkpoints of evaluations that were the best until a better one, and of any after ``step``.

    As long as a run may have to go on from an older checkpoint than the best one, the best one before is kept.

    Args:
        folder: ``checkpoints/`` of the run.
        step: of the newest checkpoint to go on from.
    """
    found = list_checkpoints(folder, best=True)
    until = [path for path in found if step_of(path) <= step]
    for path in [*until[:-1], *found[len(until) :]]:
        path.unlink()


def list_checkpoints(folder: Path, *, best: bool = False) -> list[Path]:
    """The checkpoints of a run, oldest first; ``best``: of evaluations that were the best, of which the last is."""
    found = [path for path in folder.glob(f"{BEST if best else 'step-'}*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def newest_checkpoint(folder: Path, seed: int | None = None, *, best: bool = False) -> Path | None:
    """The newest or best checkpoint of a run folder, or of its ``checkpoints/``: the seed's own where it has some."""
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = list_checkpoints(folder / f"seed-{seed}", best=best) or list_checkpoints(folder, best=best)
    return found[-1] if found else None


def checkpoint_file(path: str | Path, *, best: bool = False) -> Path:
    """The checkpoint that a path names: a file, or of a run folder the newest.

    Args:
        path: of the file or folder.
        best: of a run folder, that of the best evaluation.

    Raises:
        CheckpointError: a folder without checkpoints; ``best`` of a file.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        if best:
            raise CheckpointError(f"checkpoint={path} is not a run folder, of which best=true takes the best one.")
        return place
    found = newest_checkpoint(place, best=best)
    if found is None:
        seeds = sorted(str(one) for one in place.rglob("seed-*") if list_checkpoints(one))
        hint = f"it is a run of several seeds: name one, such as {seeds[0]}" if seeds else "name a run folder or a file"
        if best and newest_checkpoint(place):
            hint = "nothing was evaluated in that run: leave best out for its newest one"
        raise CheckpointError(f"checkpoint={path} is a folder without {BEST if best else 'step-'}*.pt; {hint}.")
    return found


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, without executing anything that it may contain.

    Raises:
        CheckpointError: the file is missing, truncated, or no checkpoint of this project.
    """
    path = Path(path).expanduser()
    try:
        regular_file(path)
    except NotAFile as error:
        hint = ""
        if path.is_dir() and (newest := newest_checkpoint(path)):
            hint = f" It is a folder; its newest checkpoint is {newest}."
        elif path.exists() and not path.is_dir():
            hint = f" It {str(error).removesuffix(', not a file')}."
        raise CheckpointError(f"checkpoint {path} is not a file.{hint}") from None
    checkpoint = read_saved(path)
    if not isinstance(checkpoint, dict) or not _is(checkpoint.get("format"), FORMAT):
        raise CheckpointError(f"{path} is no checkpoint of iql_torchrl.")
    if not _is(version := checkpoint.get("version"), VERSION):
        raise CheckpointError(
            f"checkpoint {path} has format version {reprlib.repr(version)}, this release reads {VERSION}."
        )
    missing = _KEYS - set(checkpoint)
    if missing:
        raise CheckpointError(f"checkpoint {path} lacks {', '.join(sorted(missing))}.")
    for key, kind in _TYPES.items():
        if not isinstance(checkpoint[key], kind):
            raise CheckpointError(
                f"checkpoint {path} is damaged: {key} is of type {type(checkpoint[key]).__name__}, not {kind.__name__}."
            )
    return checkpoint


def read_saved(path: Path) -> Any:
    """What ``torch.save`` wrote, without executing anything that it may contain.

    Raises:
        CheckpointError: no file of ``torch.save``, a truncated or damaged one, or one of more than tensors and plain
            values.
    """
    try:
        return _read(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} holds more than tensors and plain values, which is not loaded because that could "
            "execute code."
        ) from error
    except Exception as error:  # what zip, pickle and torch raise for damage, and for more than fits into memory
        raise CheckpointError(f"checkpoint {path} is damaged: {first_line(error)}.") from error


def _read(path: Path) -> Any:
    """As :func:`read_saved`, refused before it is read where it declares more than the file has."""
    if not zipfile.is_zipfile(path):  # torch.save's container, whose directory stands at the end
        raise CheckpointError(f"checkpoint {path} is truncated, or no checkpoint of iql_torchrl at all.")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    declared = sum(member.file_size for member in members)
    # torch.save compresses nothing.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or declared > path.stat().st_size:
        raise ValueError(f"it declares {declared:,} bytes and has {path.stat().st_size:,}")
    found = torch.load(path, map_location="cpu", weights_only=True)
    _refuse_undue_tensors(found)
    return found


def _refuse_undue_tensors(content: Any) -> None:
    """Refuse tensors that repeat their numbers, so that a copy may take any memory; and other kinds than plain ones."""
    waiting, seen = [content], set[int]()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:  # a list may hold itself
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            plain = found.layout is torch.strided and found.device.type == "cpu" and not found.is_quantized
            if not plain or found.numel() * found.element_size() > found.untyped_storage().nbytes():
                raise ValueError(f"it holds a tensor of shape {tuple(found.shape)} without its numbers")
        elif isinstance(found, Mapping):
            waiting += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple | set):
            waiting += found


def _is(found: object, expected: object) -> bool:
    """Equal and of one type; a tensor compares in ways of its own."""
    return type(found) is type(expected) and found == expected


def checkpoint_folders(run_path: Path, seeds: Sequence[int]) -> list[Path]:
    """Where the checkpoints of each seed lie: ``checkpoints/``, or ``checkpoints/seed-<seed>/`` where there are more.

    Each file is that of a run of one seed, whatever was trained beside it.

    Raises:
        CheckpointError: the folder holds runs of other seeds.
    """
    folder = run_path / "checkpoints"
    expected = [] if len(seeds) == 1 else [f"seed-{seed}" for seed in seeds]
    of_seeds = [path for path in folder.glob("seed-*") if path.is_dir()]
    found = sorted(path.name for path in of_seeds)
    # Empty ones are of a run that ended while it made them.
    if (any(any(path.iterdir()) for path in of_seeds) and found != sorted(expected)) or (
        expected and list_checkpoints(folder)
    ):
        raise CheckpointError(
            f"{folder} holds {', '.join(found) or 'a run of one seed'}; continue it with the train.seed and "
            "train.num_seeds of its config.yaml, or name another run_dir."
        )
    return [folder / name for name in expected] or [folder]


def find_checkpoints(resume: str | None, folders: Sequence[Path]) -> list[tuple[Path, dict[str, Any]] | None] | None:
    """The checkpoints that ``resume`` names, one a seed.

    Args:
        resume: a file, for a run of one seed; ``"auto"`` for the newest step of which every seed's checkpoint can be
            read, renaming newer ones that cannot; or ``None``. A seed among several that has diverged stays where it
            was: its own newest is taken, ``None`` where it has none.
        folders: of :func:`checkpoint_folders`.

    Returns:
        their paths and contents, or ``None`` where there is nothing to resume.

    Raises:
        CheckpointError: the named one cannot be read, or for ``"auto"`` none of those that exist; a file for several
            seeds; seeds that have all diverged.
    """
    if resume is None:
        return None
    if resume != "auto":
        if len(folders) > 1:
            raise CheckpointError(f"resume={resume} is of one seed; several are continued with resume=auto.")
        return [(Path(resume), load_finite(resume))]
    going_on = [folder for folder in folders if len(folders) == 1 or not has_diverged(folder)]
    if not going_on:
        raise CheckpointError(
            f"every seed in {folders[0].parent} has diverged; delete {DIVERGED}*.pt of those that should go on from "
            "their last good checkpoint, and change what made them diverge."
        )
    reasons: list[str] = []
    names = set.intersection(*({path.name for path in list_checkpoints(folder)} for folder in going_on))
    for name in sorted(names, reverse=True):
        found: dict[Path, tuple[Path, dict[str, Any]]] = {}
        for folder in going_on:
            checkpoint = _load_or_rename(folder / name, reasons)
            if checkpoint is None:
                break
            found[folder] = (folder / name, checkpoint)
        else:
            return [found.get(folder) or _newest(folder, reasons) for folder in folders]
    if reasons:
        raise CheckpointError(f"no checkpoint in {folders[0].parent} can be read: {' '.join(reasons)}")
    return None


def save_diverged(folder: Path, step: int, content: Mapping[str, Any]) -> Path:
    """Write ``diverged-step-<step>.pt``, for study: what a run of NaN or infinity was made of.

    Args:
        folder: of the seed's checkpoints.
        step: updates done.
        content: tensors and plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{DIVERGED}{step:08d}.pt"
    write_atomically(path, lambda file: torch.save(dict(content), file))
    return path


def was_stacked(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the seeds beside that of a checkpoint were computed in one kernel, as all were before that was said."""
    return checkpoint.get("stacked", True)


def has_diverged(folder: Path) -> bool:
    """Whether the seed of a folder of checkpoints has diverged."""
    return any(folder.glob(f"{DIVERGED}*.pt"))


def _newest(folder: Path, reasons: list[str]) -> tuple[Path, dict[str, Any]] | None:
    for path in reversed(list_checkpoints(folder)):
        checkpoint = _load_or_rename(path, reasons)
        if checkpoint is not None:
            return path, checkpoint
    return None


def _load_or_rename(path: Path, reasons: list[str]) -> dict[str, Any] | None:
    try:
        return load_finite(path)
    except CheckpointError as error:
        reasons.append(str(error))
        print(f"skipped, and renamed to {path.name}.damaged: {error}")
        # Under its own name it would count among the newest that are kept.
        path.rename(path.with_name(f"{path.name}.damaged"))
        return None


def load_finite(path: str | Path) -> dict[str, Any]:
    """A checkpoint to go on from: one whose parameters are numbers.

    Raises:
        CheckpointError: as of :func:`load_checkpoint`, or they are not.
    """
    checkpoint = load_checkpoint(path)
    for name, tensor in checkpoint["training"]["loss"].items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"checkpoint {path} is of a run that had diverged: {name} holds NaN or infinity.")
    return checkpoint


def refuse_other_architecture(path: Path, checkpoint: Mapping[str, Any], architecture: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of networks that are not those of ``architecture``.

    Raises:
        CheckpointError: naming every difference.
    """
    # Which are named where they are others alone.
    usual = {"activation": "relu", "extraction": "awr"}
    saved, architecture = ({**usual, **one} for one in (checkpoint["architecture"], architecture))
    there, here = saved["extraction"], architecture["extraction"]
    if there != here:  # from which further differences follow
        raise CheckpointError(
            f"checkpoint {path} is of algorithm.extraction={there}, and this run is of {here}; set that to {there}, or "
            "name another checkpoint."
        )
    differences = [
        f"{key} is {saved.get(key)!r} there and {architecture.get(key)!r} here"
        for key in sorted({*saved, *architecture})
        if saved.get(key) != architecture.get(key)
    ]
    if differences:
        raise CheckpointError(f"checkpoint {path} is of another architecture: {'; '.join(differences)}.")


def restore(
    path: Path,
    checkpoint: Mapping[str, Any],
    step: TrainingStep,
    architecture: Mapping[str, Any],
    fingerprint: str,
    run: int = 0,
    *,
    other_data: bool = False,
) -> None:
    """Put a checkpoint back into a training step and the random state that its run draws from.

    Args:
        path: names the checkpoint in errors.
        checkpoint: of :func:`find_checkpoints`.
        step: built as the checkpoint's was; restored in place.
        architecture: of the networks.
        fingerprint: of the data.
        run: which of the step's runs it is of.
        other_data: go on although the data are others.

    Raises:
        CheckpointError: another architecture (naming every difference), other data, or a schedule that ends earlier.
    """
    refuse_other_architecture(path, checkpoint, architecture)
    if checkpoint["dataset_fingerprint"] != fingerprint and not other_data:
        raise CheckpointError(
            f"checkpoint {path} was trained on other data (SHA-256 {checkpoint['dataset_fingerprint'][:12]}..., here "
            f"{fingerprint[:12]}...); resume with the dataset of its config.yaml, or give resume_with_changes=true."
        )
    if step.total_steps is not None and not step.periodic and checkpoint["step"] > step.total_steps:
        raise CheckpointError(
            f"checkpoint {path} is of step {checkpoint['step']}, beyond train.steps={step.total_steps}; raise that."
        )
    try:
        step.load_state_dict(checkpoint["training"], run)
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit the training step: {first_line(error)}") from error
    with step.random_state(run):
        GlobalRNGState().load_state_dict(checkpoint["random"])
