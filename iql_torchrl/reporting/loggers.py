"""Loggers besides the run folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl.record.loggers import Logger

from iql_torchrl.configuration.options import LoggerOptions
from iql_torchrl.errors import ConfigurationError


def make_logger(options: LoggerOptions, run_path: Path, config: Mapping[str, Any]) -> Logger | None:
    """TorchRL's logger of ``logger.kind``, or ``None`` for ``csv``: the run folder holds those files anyway.

    wandb runs offline unless ``logger.mode=online``, so no login is needed. TensorBoard's files are in the folder
    ``tensorboard`` of the run.

    Args:
        options: which, and its own options.
        run_path: the run folder, in which the logger's files are.
        config: the run's configuration, which wandb keeps.

    Raises:
        ConfigurationError: TensorBoard is not installed.
    """
    if options.kind == "csv":
        return None
    if options.kind == "tensorboard":
        return _tensorboard(run_path)
    os.environ.setdefault("WANDB_SILENT", "true")
    from torchrl.record.loggers.wandb import WandbLogger

    return WandbLogger(
        exp_name=run_path.name,
        offline=options.mode != "online",
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
