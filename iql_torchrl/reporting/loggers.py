"""Loggers besides the run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchrl.record.loggers import Logger

from iql_torchrl.configuration.options import LoggerOptions
from iql_torchrl.errors import ConfigurationError, first_line

# Seconds that a run waits for wandb's server at its beginning and at its end; wandb's own variables win.
_WANDB_SECONDS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "30"}


class GuardedLogger:
    """A logger whose failure is told in one line, and stops nothing: the run folder holds the same rows.

    Args:
        logger: TorchRL's.
        say: is told of a failure.
    """

    def __init__(self, logger: Logger, say: Callable[[str], object]) -> None:
        self._logger: Logger | None = logger
        self._say = say

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Values by name."""
        if self._logger is None:
            return
        try:
            self._logger.log_metrics(dict(values), step=step)
        except Exception as error:  # whatever a service or a full disk makes of it
            name, self._logger = type(self._logger).__name__, None
            self._say(f"warning: {name} failed ({first_line(error)}): the run goes on without it")

    def close(self) -> None:
        """Have wandb send what it has, within its time; it keeps what it could not send."""
        finish = getattr(getattr(self._logger, "experiment", None), "finish", None)
        self._logger = None
        if finish is None:  # TensorBoard's writer
            return
        start = time.monotonic()
        try:
            finish()
            lost = time.monotonic() - start >= float(os.environ.get("WANDB_FINISH_TIMEOUT", "inf"))
        except Exception:
            lost = True
        if lost:
            self._say("warning: wandb's server did not take everything; `wandb sync` uploads it from the run folder")


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


def _wandb(options: LoggerOptions, run_path: Path, config: Mapping[str, Any], *, offline: bool) -> Logger:
    os.environ.setdefault("WANDB_SILENT", "true")
    for name, seconds in _WANDB_SECONDS.items():
        os.environ.setdefault(name, seconds)
    from torchrl.record.loggers.wandb import WandbLogger

    return WandbLogger(
        exp_name=run_path.name,
        offline=offline,
        mode="offline" if offline else "online",  # wandb reads its variables once, also for a beginning that failed
        save_dir=str(run_path),
        project=options.project,
        config=dict(config),
    )


def _tensorboard(run_path: Path) -> Logger:
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("logger=tensorboard needs tensorboard: pip install tensorboard.") from error
    from torchrl.record.loggers.tensorboard import TensorboardLogger

    return TensorboardLogger(exp_name="tensorboard", log_dir=str(run_path))
