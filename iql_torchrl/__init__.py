"""Implicit Q-Learning for TorchRL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iql_torchrl.data.buffer import make_buffer
    from iql_torchrl.data.loading import load_transitions
    from iql_torchrl.evaluation.policy import load_policy
    from iql_torchrl.networks import (
        build_actor,
        build_diffusion_actor,
        build_discrete_actor,
        build_discrete_qvalues,
        build_flow_actor,
        build_qvalues,
        build_value,
    )
    from iql_torchrl.objectives import DDPGBCLoss, DiffusionLoss, DiscreteIQLLoss, FlowLoss, IQLLoss
    from iql_torchrl.running.run import Run
    from iql_torchrl.running.train import train
    from iql_torchrl.training.foreign import load_foreign
    from iql_torchrl.training.step import TrainingStep

__version__ = "0.1.0"

_MODULES = {
    "DDPGBCLoss": "objectives",
    "DiffusionLoss": "objectives",
    "DiscreteIQLLoss": "objectives",
    "FlowLoss": "objectives",
    "IQLLoss": "objectives",
    "Run": "running.run",
    "TrainingStep": "training.step",
    "build_actor": "networks",
    "build_diffusion_actor": "networks",
    "build_discrete_actor": "networks",
    "build_discrete_qvalues": "networks",
    "build_flow_actor": "networks",
    "build_qvalues": "networks",
    "build_value": "networks",
    "load_foreign": "training.foreign",
    "load_policy": "evaluation.policy",
    "load_transitions": "data.loading",
    "make_buffer": "data.buffer",
    "train": "running.train",
}

__all__ = [
    "DDPGBCLoss",
    "DiffusionLoss",
    "DiscreteIQLLoss",
    "FlowLoss",
    "IQLLoss",
    "Run",
    "TrainingStep",
    "build_actor",
    "build_diffusion_actor",
    "build_discrete_actor",
    "build_discrete_qvalues",
    "build_flow_actor",
    "build_qvalues",
    "build_value",
    "load_foreign",
    "load_policy",
    "load_transitions",
    "make_buffer",
    "train",
]


def __getattr__(name: str):
    # On first use: importing torchrl takes seconds, which a recipe's --help need not wait for.
    if name in _MODULES:
        return getattr(import_module(f"iql_torchrl.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
