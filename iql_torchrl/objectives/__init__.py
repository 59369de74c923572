"""The IQL losses: the algorithm and nothing else."""

from iql_torchrl.objectives.discrete_iql import DiscreteIQLLoss
from iql_torchrl.objectives.iql import IQLLoss

__all__ = ["DiscreteIQLLoss", "IQLLoss"]
