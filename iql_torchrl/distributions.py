"""Two action distributions that neither torch nor TorchRL has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules import OneHotCategorical


class Deterministic(Distribution):
    """A deterministic policy, trained by squared error.

    ``log_prob`` is minus the squared distance, the logarithm of a density up to a factor and a constant: maximising it
    with IQL's weights is the regression that CORL trains its deterministic policies by. A point mass (TorchRL's
    ``Delta``) has no gradient there.

    Args:
        loc: the action, ``[*B, A]``.
    """

    arg_constraints = {}  # pyright: ignore
    has_rsample = True

    def __init__(self, loc: Tensor, validate_args: bool | None = None) -> None:
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the squared distance from the action, ``[*B]``."""
        return -(value - self.loc).pow(2).sum(-1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.loc.expand(torch.Size(sample_shape) + self.loc.shape)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    deterministic_sample = mean

    @property
    def stddev(self) -> Tensor:
        return torch.zeros_like(self.loc)


class MultiOneHotCategorical(Distribution):
    """Independent one-hot choices side by side, as TorchRL's ``MultiOneHot`` spec lays them out.

    Args:
        logits: ``[*B, n_1 + n_2 + ...]``.
        num_actions: the sizes ``(n_1, n_2, ...)``.
    """

    arg_constraints = {}  # pyright: ignore

    def __init__(self, logits: Tensor, num_actions: Sequence[int], validate_args: bool | None = None) -> None:
        self.num_actions = list(num_actions)
        self.choices = [OneHotCategorical(logits=part, validate_args=False) for part in self._split(logits)]
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum of the choices' log-probabilities, ``[*B]``."""
        parts = zip(self.choices, self._split(value), strict=True)
        return torch.stack([choice.log_prob(part) for choice, part in parts]).sum(0)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat([choice.sample(torch.Size(sample_shape)) for choice in self.choices], -1)

    def entropy(self) -> Tensor:
        return torch.stack([choice.entropy() for choice in self.choices]).sum(0)

    @property
    def mode(self) -> Tensor:
        return torch.cat([choice.mode for choice in self.choices], -1)

    deterministic_sample = mode

    def _split(self, value: Tensor) -> tuple[Tensor, ...]:
        return value.split(self.num_actions, -1)
