"""A policy as a graph of tensor operations from raw observations to actions, with nothing of TorchRL in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import IndependentNormal, TanhNormal

from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.distributions import Deterministic
from iql_torchrl.errors import ExportError
from iql_torchrl.evaluation.policy import Policy


class PolicyGraph(nn.Module):
    """What :class:`Policy` does, as plain PyTorch that exporters can follow.

    Observations ``[B, O]``, float32 -> actions ``[B, A]`` in the environment's bounds, float32, or of discrete actions
    their indices ``[B]``, int64. Normalisation, tanh, rescaling and clipping are in it. A policy that chooses among
    draws has a second input, ``noise``, standard Normals ``[B, *noise_shape]``, and the critics in it: what draws is
    left to who acts, so that a file is a function and can be verified, and two decisions need not draw the same.

    Args:
        policy: of a checkpoint.

    Raises:
        ExportError: a distribution whose action is not known here, or a choice that is drawn itself.
    """

    mean: Tensor
    std: Tensor
    action_low: Tensor
    action_high: Tensor

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.network: nn.Module
        self.kind, self.noise_shape = None, None
        if policy.chooses:
            assert policy.chooser is not None
            self.network, self.noise_shape = policy.chooser, policy.chooser.noise_shape
            if policy.chooser.num_samples > 1 and policy.chooser.selection != "largest":
                raise ExportError(
                    f"selection={policy.chooser.selection} draws which action it takes and is not exported; give "
                    "selection=largest."
                )
        else:
            actor: Any = policy.actor
            network, distribution = actor.module
            self.network, self.kind = network.module, distribution.distribution_class
            if self.kind not in (Categorical, Deterministic, IndependentNormal, TanhNormal):
                raise ExportError(f"a policy with the distribution {self.kind.__name__} is not exported.")
        normaliser = policy.normaliser or ObservationNormaliser(torch.zeros(()), torch.ones(()))
        self.normalises = policy.normaliser is not None
        for name, value in (
            ("mean", normaliser.mean),
            ("std", normaliser.std),
            ("action_low", policy.action_low),
            ("action_high", policy.action_high),
        ):
            self.register_buffer(name, value.clone())
        self.eval()

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.normalises:
            observation = (observation - self.mean) / self.std
        found = self.network(observation) if noise is None else self.network(observation, noise)
        if self.kind is Categorical:
            return found.argmax(-1)
        action = found[0] if isinstance(found, tuple) else found
        if self.kind is TanhNormal:
            bound = 1 - torch.finfo(action.dtype).resolution  # TorchRL's, which keeps the tanh invertible
            action = action.tanh().clamp(-bound, bound)
        action = self.action_low + (action + 1) / 2 * (self.action_high - self.action_low)
        return action.clamp(self.action_low, self.action_high)
