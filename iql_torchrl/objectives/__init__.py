"""The IQL losses: the algorithm and nothing else."""

from iql_torchrl.objectives.discrete_iql import DiscreteIQLLoss
from iql_torchrl.objectives.extraction import DDPGBCLoss, DiffusionLoss, FlowLoss
from iql_torchrl.objectives.iql import IQLLoss

__all__ = ["DDPGBCLoss", "DiffusionLoss", "DiscreteIQLLoss", "FlowLoss", "IQLLoss"]
