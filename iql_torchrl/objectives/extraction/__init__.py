"""Other ways to a policy from the same Q and V: :class:`~iql_torchrl.IQLLoss` with another policy loss."""

from iql_torchrl.objectives.extraction.ddpgbc import DDPGBCLoss
from iql_torchrl.objectives.extraction.diffusion import DiffusionLoss
from iql_torchrl.objectives.extraction.flow import FlowLoss

__all__ = ["DDPGBCLoss", "DiffusionLoss", "FlowLoss"]
