"""A policy that is a flow from noise to the data's actions."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.objectives.extraction.generative import GenerativeLoss
from iql_torchrl.objectives.iql import Parameters


class FlowLoss(GenerativeLoss):
    r"""Implicit Q-Learning with a flow-matching policy: IFQL (Park et al. 2025, Flow Q-Learning, arXiv 2502.02538).

    A velocity field :math:`v(s, x, t)` learns the straight way from noise to the data's action (Lipman et al. 2023,
    arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003): with :math:`x_0 \sim N(0, I)`, :math:`x_1 = a`,
    :math:`t \sim U[0, 1]` and :math:`x_t = (1 - t) x_0 + t x_1`,

    .. math:: L_\pi = E[\,\frac{1}{A} |v(s, x_t, t) - (x_1 - x_0)|^2\,].

    Its draws are distributed as the data's actions; a decision takes the best of several by Q.

    Args:
        actor_network: of :func:`~iql_torchrl.build_flow_actor`.
        qvalue_network, value_network: as of :class:`IQLLoss`.

    Keyword Args:
        **options: those of :class:`IQLLoss`; ``temperature`` and ``max_weight`` change diagnostics alone.
    """

    choosing_critics = "qvalue_network_params"

    def draw(self, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        kind = {"dtype": action.dtype, "device": action.device, "generator": generator}
        return torch.randn(action.shape, **kind), torch.rand((*action.shape[:-1], 1), **kind)

    def error(
        self, tensordict: TensorDictBase, noise: Tensor, time: Tensor, *, parameters: Parameters | None = None
    ) -> Tensor:
        action = self._action(tensordict)
        noisy_action = (1 - time) * noise + time * action
        velocity = self._predict(tensordict, noisy_action, time, parameters)
        return (velocity - (action - noise)).pow(2).mean(-1)
