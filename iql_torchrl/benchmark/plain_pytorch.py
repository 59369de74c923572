"""IQL in plain PyTorch, in the manner of CORL's single file: modules, an optimizer a network, eager kernels.

Its order is V(s'), V, Q, targets, policy; V(s') and the advantage are those of the V before its update, and the loss of
the critics is their mean.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR

from iql_torchrl.benchmark.case import Case, Row

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def plain_row(case: Case) -> Row:
    """:class:`PlainIQL` as a row."""
    return Row("plain PyTorch, as CORL writes it", "eager", "joint", lambda: PlainIQL(case))


class GaussianPolicy(nn.Module):
    """Observations ``[B, O]`` -> a Normal around the tanh of a network, with a learnt standard deviation."""

    def __init__(self, widths: Sequence[int], layer_norm: bool) -> None:
        super().__init__()
        self.mean = nn.Sequential(mlp(widths, layer_norm), nn.Tanh())
        self.log_std = nn.Parameter(torch.zeros(widths[-1]))

    def forward(self, observation: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.mean(observation), self.log_std.clamp(-20.0, 2.0).exp())


class TwinQ(nn.Module):
    """Observations ``[B, O]`` and actions ``[B, A]`` -> the values ``[B]`` of two critics."""

    def __init__(self, widths: Sequence[int], layer_norm: bool) -> None:
        super().__init__()
        self.first = mlp(widths, layer_norm)
        self.second = mlp(widths, layer_norm)

    def forward(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.cat([observation, action], 1)
        return self.first(pair).squeeze(-1), self.second(pair).squeeze(-1)


class PlainIQL:
    """Networks, optimizers, an in-memory buffer, and the update; a call draws a batch and does one update."""

    discount, tau, expectile, temperature, max_weight = 0.99, 0.005, 0.7, 3.0, 100.0

    def __init__(self, case: Case, learning_rate: float = 3e-4, total_steps: int = 1_000_000) -> None:
        torch.manual_seed(case.seed)
        self.case = case
        hidden, pair_dim = case.hidden_dims, case.observation_dim + case.action_dim
        place: dict[str, Any] = {"device": case.device, "dtype": case.dtype}
        self.actor = GaussianPolicy([case.observation_dim, *hidden, case.action_dim], case.layer_norm).to(**place)
        self.value = mlp([case.observation_dim, *hidden, 1], case.layer_norm).to(**place)
        self.qvalue = TwinQ([pair_dim, *hidden, 1], case.layer_norm).to(**place)
        self.target_qvalue = copy.deepcopy(self.qvalue).requires_grad_(False)
        self.actor_adam, self.value_adam, self.qvalue_adam = (
            torch.optim.Adam(network.parameters(), lr=learning_rate)
            for network in (self.actor, self.value, self.qvalue)
        )
        self.schedule = CosineAnnealingLR(self.actor_adam, total_steps)
        self.random = np.random.default_rng(case.seed)
        data = case.random_transitions().to(case.device)
        self.data: Batch = (
            data["observation"],
            data["action"],
            data["next", "reward"],
            data["next", "observation"],
            data["next", "terminated"].to(case.dtype),
        )

    def __call__(self) -> dict[str, float]:
        return self.update(*self.sample())

    def sample(self) -> Batch:
        """Observations ``[B, O]``, actions, rewards ``[B, 1]``, next observations, and terminations as numbers."""
        rows = self.random.integers(0, self.case.transitions, size=self.case.batch_size)
        observation, action, reward, following, terminated = (column[rows] for column in self.data)
        return observation, action, reward, following, terminated

    def update(
        self, observation: Tensor, action: Tensor, reward: Tensor, following: Tensor, terminated: Tensor
    ) -> dict[str, float]:
        """One update on a batch of :meth:`sample`; the three losses."""
        losses: dict[str, float] = {}
        with torch.no_grad(), self._autocast():
            next_value = self.value(following).squeeze(-1)
        advantage = self._update_value(observation, action, losses)
        target = reward.squeeze(-1) + self.discount * (1.0 - terminated.squeeze(-1)) * next_value
        self._update_qvalue(observation, action, target, losses)
        self._update_actor(observation, action, advantage, losses)
        return losses

    def _update_value(self, observation: Tensor, action: Tensor, losses: dict[str, float]) -> Tensor:
        with self._autocast():
            with torch.no_grad():
                target_qvalue = torch.min(*self.target_qvalue(observation, action))
            advantage = target_qvalue - self.value(observation).squeeze(-1)
            loss = ((self.expectile - (advantage < 0).to(advantage.dtype)).abs() * advantage**2).mean()
        losses["loss_value"] = _descend(loss, self.value_adam)
        return advantage.detach()

    def _update_qvalue(self, observation: Tensor, action: Tensor, target: Tensor, losses: dict[str, float]) -> None:
        with self._autocast():
            first, second = self.qvalue(observation, action)
            loss = (mse_loss(first, target) + mse_loss(second, target)) / 2
        losses["loss_qvalue"] = _descend(loss, self.qvalue_adam)
        for old, new in zip(self.target_qvalue.parameters(), self.qvalue.parameters(), strict=True):
            old.data.copy_((1 - self.tau) * old.data + self.tau * new.data)

    def _update_actor(self, observation: Tensor, action: Tensor, advantage: Tensor, losses: dict[str, float]) -> None:
        weight = (self.temperature * advantage).exp().clamp(max=self.max_weight)
        with self._autocast():
            loss = -(weight * self.actor(observation).log_prob(action).sum(-1)).mean()
        losses["loss_actor"] = _descend(loss, self.actor_adam)
        self.schedule.step()

    def _autocast(self) -> AbstractContextManager[Any]:
        low_precision = self.case.precision == "bfloat16"
        return torch.autocast(self.case.device.type, torch.bfloat16) if low_precision else nullcontext()


def mlp(widths: Sequence[int], layer_norm: bool) -> nn.Sequential:
    """Linear layers of these widths with ReLU, and layer norm where asked, between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), *([nn.LayerNorm(outputs)] if layer_norm else []), nn.ReLU()]
    return nn.Sequential(*layers[: -2 if layer_norm else -1])


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    shown = loss.item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return shown
