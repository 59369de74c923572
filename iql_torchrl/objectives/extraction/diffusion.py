"""A policy that is a diffusion from noise to the data's actions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from iql_torchrl.objectives.extraction.generative import GenerativeLoss
from iql_torchrl.objectives.iql import Parameters


class DiffusionLoss(GenerativeLoss):
    r"""Implicit Q-Learning with a diffusion policy: IDQL (Hansen-Estruch et al. 2023, arXiv 2304.10573).

    A network :math:`\epsilon_\theta` learns to tell the noise in a noisy action (DDPM, Ho et al. 2020, arXiv
    2006.11239): with :math:`\epsilon \sim N(0, I)`, :math:`t` uniform among the T steps, :math:`\bar\alpha_t` the
    product of :math:`1 - \beta` up to it, and :math:`a_t = \sqrt{\bar\alpha_t} a + \sqrt{1 - \bar\alpha_t} \epsilon`,

    .. math:: L_\pi = E[\,|\epsilon - \epsilon_\theta(s, a_t, t)|^2\,].

    Its draws are distributed as the data's actions; a decision takes one of several by Q. As in IDQL's code, what acts
    is a moving average of the network: the policy has target parameters.

    Args:
        actor_network: of :func:`~iql_torchrl.build_diffusion_actor`.
        qvalue_network, value_network: as of :class:`IQLLoss`.

    Keyword Args:
        **options: those of :class:`IQLLoss`; ``temperature`` and ``max_weight`` change diagnostics alone.
    """

    _averages_actor = True

    signal: Tensor
    noise_level: Tensor

    def __init__(
        self,
        actor_network: Any,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        value_network: TensorDictModule,
        **options: Any,
    ) -> None:
        super().__init__(actor_network, qvalue_network, value_network, **options)
        kept = (1 - torch.tensor(actor_network.betas, dtype=torch.float64)).cumprod(0)
        self.register_buffer("signal", kept.sqrt(), persistent=False)
        self.register_buffer("noise_level", (1 - kept).sqrt(), persistent=False)

    def acting_network(self) -> nn.Module:
        network = copy.deepcopy(self.actor_network)
        params: Any = self._modules["target_actor_network_params"]  # without TorchRL's warning
        params.data.apply(lambda tensor: nn.Parameter(tensor, requires_grad=False)).to_module(network)
        return network

    def draw(self, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn(action.shape, dtype=action.dtype, device=action.device, generator=generator)
        steps, shape = len(self.signal), (*action.shape[:-1], 1)
        return noise, torch.randint(steps, shape, device=action.device, generator=generator)

    def error(
        self, tensordict: TensorDictBase, noise: Tensor, time: Tensor, *, parameters: Parameters | None = None
    ) -> Tensor:
        action = self._action(tensordict)
        signal, noise_level = (one.to(action.dtype)[time] for one in (self.signal, self.noise_level))
        noisy_action = signal * action + noise_level * noise
        return (self._predict(tensordict, noisy_action, time.to(action.dtype), parameters) - noise).pow(2).sum(-1)
