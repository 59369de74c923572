"""Loggers besides the run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrl.record.loggers.tensorboard import TensorboardLogger
from torchrl.record.loggers.wandb import WandbLogger

from iql_torchrl.configuration.declaring import as_typed
from iql_torchrl.configuration.options import LoggerOptions
from iql_torchrl.errors import ConfigurationError, first_line

# Seconds that a run waits for wandb's server at its beginning and at its end; wandb's own variables win.
_WANDB_SECONDS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "30"}


# What TensorBoard has as metrics of the hyperparameters: a column each, where it is there.
_METRICS = (
    "final_score",
    "best_score",
    "interquartile_mean",
    "standard_deviation",
    "final_success_rate",
    "validation_log_prob",
    "validation_td_error",
    "steps_per_second",
)


class GuardedLogger:
    """A logger whose failure is told in one line, and stops nothing: the run folder holds the same rows.

    Args:
        logger: TorchRL's.
        say: is told of a failure.
    """

    def __init__(self, logger: WandbLogger | TensorboardLogger, say: Callable[[str], object]) -> None:
        self._logger: WandbLogger | TensorboardLogger | None = logger
        self._say = say

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Values by name."""
        with self._guarding():
            if isinstance(self._logger, WandbLogger):
                # Else each part of a name gets a column of its own that counts the steps.
                self._logger.log_metrics(dict(values), step=step, override_global_step=True)
            elif self._logger is not None:
                self._logger.log_metrics(dict(values), step=step)

    def log_outcome(self, config: Mapping[str, Any], summary: Mapping[str, Any], curves: Path) -> None:
        """What a run comes to: to wandb its summary and its picture, to TensorBoard its options beside its scores.

        Args:
            config: of the run.
            summary: of :func:`iql_torchrl.reporting.summary.summarise`.
            curves: the picture.
        """
        with self._guarding():
            if isinstance(self._logger, WandbLogger):
                import wandb

                self._logger.experiment.log({"curves": wandb.Image(str(curves))}, step=summary["steps"])
                self._logger.experiment.summary.update(_flat_summary(summary))
            elif self._logger is not None:
                metrics = {key: summary[key] for key in _METRICS if summary.get(key) is not None}
                # In the folder of the rows, so that they are one run.
                self._logger.experiment.add_hparams(
                    _flat_options(config), metrics, run_name=".", global_step=summary["steps"]
                )

    def close(self) -> None:
        """End TensorBoard's file, and have wandb send what it has, within its time; it keeps what it could not send."""
        if isinstance(self._logger, TensorboardLogger):
            with self._guarding():
                self._logger.experiment.close()
        logger, self._logger = self._logger, None
        if not isinstance(logger, WandbLogger):
            return
        start = time.monotonic()
        try:
            logger.experiment.finish()
            lost = time.monotonic() - start >= float(os.environ.get("WANDB_FINISH_TIMEOUT", "inf"))
        except Exception:
            lost = True
        if lost:
            self._say("warning: wandb's server did not take everything; `wandb sync` uploads it from the run folder")

    @contextmanager
    def _guarding(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service or a full disk makes of it
            name, self._logger = type(self._logger).__name__, None
            self._say(f"warning: {name} failed ({first_line(error)}): the run goes on without it")


def _flat_options(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their names on the command line; numbers, and words as they are typed there."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat_options(value, f"{prefix}{key}.")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            found[f"{prefix}{key}"] = value if number else as_typed(value)
    return found


def _flat_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, truth values and words of a summary, also those by seed or stage, and the names of its findings."""
    found: dict[str, Any] = {"findings": ", ".join(one["name"] for one in summary["findings"]) or "none"}
    for key, value in summary.items():
        if isinstance(value, int | float | str):
            found[key] = value
        elif key.endswith("_interval") and value is not None:
            found |= {f"{key}/low": value[0], f"{key}/high": value[1]}
        elif isinstance(value, Mapping):
            found |= {f"{key}/{name}": one for name, one in value.items() if isinstance(one, int | float)}
    return found


def make_logger(
    options: LoggerOptions, run_path: Path, config: Mapping[str, Any], say: Callable[[str], object] = print
) -> GuardedLogger | None:
    """TorchRL's logger of ``logger.kind``, or ``None`` for ``csv``: the run folder holds those files anyway.

    wandb runs offline unless ``logger.mode=online``, so no login is needed, and where its server is not reached.
    TensorBoard's files are in the folder ``tensorboard`` of the run.

    Args:
        options: which, and its own options.
        run_path: the run folder, in which the logger's files are.
        config: the run's configuration, which wandb keeps.
        say: is told, in one line, what does not work.

    Raises:
        ConfigurationError: TensorBoard is not installed.
    """
    if options.kind == "csv":
        return None
    if options.kind == "tensorboard":
        return GuardedLogger(_tensorboard(run_path), say)
    if options.mode == "online":
        try:
            return GuardedLogger(_wandb(options, run_path, config, offline=False), say)
        except Exception as error:  # no server, no account, no network
            say(f"warning: wandb is offline, `wandb sync` uploads later: {first_line(error)}")
    return GuardedLogger(_wandb(options, run_path, config, offline=True), say)


def _wandb(options: LoggerOptions, run_path: Path, config: Mapping[str, Any], *, offline: bool) -> WandbLogger:
    os.environ.setdefault("WANDB_SILENT", "true")
    for name, seconds in _WANDB_SECONDS.items():
        os.environ.setdefault(name, seconds)
    return WandbLogger(
        exp_name=run_path.name,
        offline=offline,
        mode="offline" if offline else "online",  # wandb reads its variables once, also for a beginning that failed
        save_dir=str(run_path),
        project=options.project,
        config=dict(config),
    )


def _tensorboard(run_path: Path) -> TensorboardLogger:
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("logger=tensorboard needs tensorboard: pip install tensorboard.") from error
    return TensorboardLogger(exp_name="tensorboard", log_dir=str(run_path))
