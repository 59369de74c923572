"""Policies that make actions of noise: a flow and a diffusion, for continuous actions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from iql_torchrl.configuration.declaring import check_argument, check_arguments
from iql_torchrl.configuration.options import AlgorithmOptions, Sizes
from iql_torchrl.networks.feedforward import mlp


class GenerativeActor(TensorDictModuleBase):
    """A policy that turns standard Normals into an action in [-1, 1].

    A module on TensorDicts too, which reads ``observation`` ``[*B, O]`` and writes ``action`` ``[*B, A]``, one draw by
    torch's generator.

    Args:
        network: observation ``[*B, O]``, noisy action ``[*B, A]`` and time ``[*B, 1]`` -> ``[*B, A]``.
        action_dim: A.

    Attributes:
        noises: how many standard Normals of the size of an action a draw takes.
    """

    noises: int

    def __init__(self, network: nn.Module, action_dim: int) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.network = network
        self.action_dim = action_dim

    def predict(self, observation: Tensor, noisy_action: Tensor, time: Tensor) -> Tensor:
        """What the network says, ``[*B, A]``: a velocity, or the noise that is in the action."""
        return self.network(observation, noisy_action, time)

    def generate(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions ``[*B, A]`` in [-1, 1] for observations ``[*B, O]`` from ``noise`` ``[*B, noises, A]``.

        Of the observations, dimensions of size 1 stand for as many as the noise has.
        """
        raise NotImplementedError

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:  # pyright: ignore
        observation = tensordict["observation"]
        shape = (*observation.shape[:-1], self.noises, self.action_dim)
        noise = torch.randn(shape, dtype=observation.dtype, device=observation.device)
        return tensordict.set("action", self.generate(observation, noise))


class VelocityField(nn.Module):
    """Velocity of a flow, the noisy action and its time beside the observation as input of a plain network."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, observation: Tensor, noisy_action: Tensor, time: Tensor) -> Tensor:
        return self.trunk(torch.cat([observation, noisy_action, time], -1))


class FlowActor(GenerativeActor):
    """Noise that a velocity field carries to an action, from time 0 to 1 in Euler steps; clipped at the end.

    As in IFQL (Park et al. 2025, Flow Q-Learning, arXiv 2502.02538; https://github.com/seohongpark/fql).

    Args:
        network: of the velocity.
        action_dim: A.
        steps: of Euler's method.
    """

    noises = 1

    def __init__(self, network: nn.Module, action_dim: int, steps: int) -> None:
        super().__init__(network, action_dim)
        self.steps = steps

    def generate(self, observation: Tensor, noise: Tensor) -> Tensor:
        action = noise.squeeze(-2)
        observation = observation.expand(*action.shape[:-1], observation.shape[-1])
        for step in range(self.steps):
            time = torch.full_like(action[..., :1], step / self.steps)
            action = action + self.predict(observation, action, time) / self.steps
        return action.clamp(-1, 1)


def build_flow_actor(
    observation_dim: int,
    action_dim: int,
    *,
    hidden_dims: Sequence[int] = (256, 256),
    dropout: float | None = None,
    layer_norm: bool = False,
    activation: str = "relu",
    initialisation: str = "orthogonal",
    flow_steps: int = 10,
) -> FlowActor:
    """A flow policy, for :class:`~iql_torchrl.FlowLoss`.

    Args:
        observation_dim, action_dim: sizes.
        hidden_dims, dropout, layer_norm, activation, initialisation: of the velocity field, as in
            :func:`~iql_torchrl.build_actor`. IFQL's is (512, 512, 512, 512) with ``"gelu"``.
        flow_steps: Euler steps of a draw.

    Raises:
        ValueError: as :func:`~iql_torchrl.build_actor`, or flow_steps below 1.
    """
    check_arguments(Sizes, observation_dim=observation_dim, action_dim=action_dim)
    check_arguments(AlgorithmOptions, flow_steps=flow_steps)
    size = observation_dim + action_dim + 1
    trunk = mlp(size, action_dim, hidden_dims, dropout, layer_norm, activation, initialisation)
    return FlowActor(VelocityField(trunk), action_dim, flow_steps)


# Standard deviation of a standard Normal between -2 and 2.
_STD_WITHIN_TWO = 0.87962566103423978


class FourierFeatures(nn.Module):
    """Cosines and sines of learnt multiples of the time: ``[*B, 1]`` -> ``[*B, size]``."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(size // 2, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Frequencies Normal with standard deviation 0.2."""
        nn.init.normal_(self.kernel, std=0.2)

    def forward(self, time: Tensor) -> Tensor:
        angle = 2 * math.pi * time @ self.kernel.T
        return torch.cat([angle.cos(), angle.sin()], -1)


class ResidualBlock(nn.Module):
    """``x`` plus two layers of it, the first four times as wide, after dropout and a layer norm."""

    def __init__(self, width: int, dropout: float | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *([nn.Dropout(dropout)] if dropout else []),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.Mish(),
            nn.Linear(4 * width, width),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):  # as Flax does by default
                std = layer.in_features**-0.5 / _STD_WITHIN_TWO
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class NoisePredictor(nn.Module):
    """The noise in a noisy action: IDQL's residual network (``MLPResNet`` with ``FourierFeatures``).

    Args:
        observation_dim, action_dim: sizes.
        width: of the residual network, which IDQL's 256 is.
        blocks: of it.
        dropout: probability, before each block.
    """

    def __init__(self, observation_dim: int, action_dim: int, width: int, blocks: int, dropout: float | None) -> None:
        super().__init__()
        self.condition = nn.Sequential(FourierFeatures(64), nn.Linear(64, 128), nn.Mish(), nn.Linear(128, 128))
        self.trunk = nn.Sequential(
            nn.Linear(action_dim + observation_dim + 128, width),
            *(ResidualBlock(width, dropout) for _ in range(blocks)),
            nn.Mish(),
            nn.Linear(width, action_dim),
        )
        for layer in (*self.condition, *self.trunk):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, observation: Tensor, noisy_action: Tensor, time: Tensor) -> Tensor:
        return self.trunk(torch.cat([noisy_action, observation, self.condition(time)], -1))


class DiffusionActor(GenerativeActor):
    """Noise that becomes an action in the reverse steps of a diffusion, clipped to [-1, 1] after each.

    As in IDQL (Hansen-Estruch et al. 2023, arXiv 2304.10573; https://github.com/philippe-eecs/IDQL), by DDPM (Ho et
    al. 2020, arXiv 2006.11239).

    Args:
        network: of the noise in an action; its times are 0 to T - 1.
        action_dim: A.
        betas: variances of the noise that each of the T steps adds.
    """

    def __init__(self, network: nn.Module, action_dim: int, betas: Sequence[float]) -> None:
        super().__init__(network, action_dim)
        self.betas = tuple(betas)
        self.noises = len(self.betas)

    def generate(self, observation: Tensor, noise: Tensor) -> Tensor:
        action, *added = noise.unbind(-2)
        observation = observation.expand(*action.shape[:-1], observation.shape[-1])
        for time in reversed(range(len(self.betas))):
            beta, kept = self.betas[time], math.prod(1 - one for one in self.betas[: time + 1])
            predicted = self.predict(observation, action, torch.full_like(action[..., :1], time))
            action = (action - beta / math.sqrt(1 - kept) * predicted) / math.sqrt(1 - beta)
            if time:
                action = action + math.sqrt(beta) * added[-time]
            action = action.clamp(-1, 1)
        return action


def _variances(kind: str, steps: int) -> list[float]:
    """Variances of the noise of each step: ``"vp"`` (variance preserving), ``"cosine"`` or ``"linear"``, as in IDQL."""
    if kind == "vp":
        low, high = 0.1, 10.0
        exponents = [low / steps + (high - low) * (2 * step - 1) / (2 * steps**2) for step in range(1, steps + 1)]
        return [-math.expm1(-exponent) for exponent in exponents]
    if kind == "cosine":
        kept = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
        return [min(1 - after / before, 0.999) for before, after in itertools.pairwise(kept)]
    return [1e-4 + (2e-2 - 1e-4) * step / max(steps - 1, 1) for step in range(steps)]


def build_diffusion_actor(
    observation_dim: int,
    action_dim: int,
    *,
    hidden_dims: Sequence[int] = (256, 256),
    dropout: float | None = None,
    residual_blocks: int = 3,
    diffusion_steps: int = 5,
    noise_schedule: str = "vp",
) -> DiffusionActor:
    """A diffusion policy, for :class:`~iql_torchrl.DiffusionLoss`, with IDQL's network.

    Args:
        observation_dim, action_dim: sizes.
        hidden_dims: whose last is the width of the residual network.
        dropout: probability, before each block; IDQL's is 0.1.
        residual_blocks: how many.
        diffusion_steps: of a draw.
        noise_schedule: ``"vp"``, ``"cosine"`` or ``"linear"``.

    Raises:
        ValueError: sizes, blocks or steps below 1, a dropout outside [0, 1), or an unknown schedule.
    """
    check_arguments(Sizes, observation_dim=observation_dim, action_dim=action_dim)
    check_arguments(
        AlgorithmOptions,
        hidden_dims=hidden_dims,
        residual_blocks=residual_blocks,
        diffusion_steps=diffusion_steps,
        noise_schedule=noise_schedule,
    )
    check_argument(AlgorithmOptions, "dropout_rate", dropout, "dropout")
    network = NoisePredictor(observation_dim, action_dim, hidden_dims[-1], residual_blocks, dropout)
    return DiffusionActor(network, action_dim, _variances(noise_schedule, diffusion_steps))
