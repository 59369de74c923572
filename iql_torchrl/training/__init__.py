"""The training step, its checkpoints and its interruption."""

from iql_torchrl.training.checkpoints import (
    checkpoint_folders,
    find_checkpoints,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from iql_torchrl.training.interruption import Interruption
from iql_torchrl.training.step import TrainingStep

__all__ = [
    "Interruption",
    "TrainingStep",
    "checkpoint_folders",
    "find_checkpoints",
    "load_checkpoint",
    "restore",
    "save_checkpoint",
]
