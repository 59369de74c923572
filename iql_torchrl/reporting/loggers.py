"""Loggers besides the run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchrl.record.loggers import Logger

from iql_torchrl.errors import ConfigurationError


def make_logger(config: DictConfig, run_path: Path) -> Logger | None:
    """TorchRL's logger of ``config.logger.kind``, or ``None`` for ``csv``: the run folder holds those files anyway.

    wandb runs offline unless ``logger.mode=online``, so no login is needed. TensorBoard's files are in the folder
    ``tensorboard`` of the run.

    Raises:
        ConfigurationError: TensorBoard is not installed.
    """
    if config.logger.kind == "csv":
        return None
    if config.logger.kind == "tensorboard":
        return _tensorboard(run_path)
    os.environ.setdefault("WANDB_SILENT", "true")
    from torchrl.record.loggers.wandb import WandbLogger

    container: Any = OmegaConf.to_container(config, resolve=True)
    return WandbLogger(
        exp_name=run_path.name,
        offline=config.logger.mode != "online",
        save_dir=str(run_path),
        project=config.logger.project,
        config=container,
    )


def _tensorboard(run_path: Path) -> Logger:
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("logger=tensorboard needs tensorboard: pip install tensorboard.") from error
    from torchrl.record.loggers.tensorboard import TensorboardLogger

    return TensorboardLogger(exp_name="tensorboard", log_dir=str(run_path))
