"""Action distributions that neither torch nor TorchRL has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.nn.functional import logsigmoid, one_hot, softplus


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

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.rsample(sample_shape).detach().clone()

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
    """One-hot choices side by side, as TorchRL's ``OneHot`` and ``MultiOneHot`` specs lay them out, int64.

    TorchRL's ``OneHotCategorical`` is one such choice; its mode marks every one of equal logits, it reads no bool, and
    it loses the dimension of a choice among one.

    Args:
        logits: ``[*B, n_1 + n_2 + ...]``.
        num_actions: the sizes ``(n_1, n_2, ...)``.
    """

    arg_constraints = {}  # pyright: ignore

    def __init__(self, logits: Tensor, num_actions: Sequence[int], validate_args: bool | None = None) -> None:
        self.num_actions = list(num_actions)
        self.choices = [Categorical(logits=part, validate_args=False) for part in logits.split(self.num_actions, -1)]
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum of the choices' log-probabilities, ``[*B]``, of one-hot values of any dtype."""
        # There is no argmax of bool.
        parts = zip(self.choices, value.to(torch.int64).split(self.num_actions, -1), strict=True)
        return torch.stack([choice.log_prob(part.argmax(-1)) for choice, part in parts]).sum(0)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._one_hot([choice.sample(torch.Size(sample_shape)) for choice in self.choices])

    def entropy(self) -> Tensor:
        return torch.stack([choice.entropy() for choice in self.choices]).sum(0)

    @property
    def mode(self) -> Tensor:
        return self._one_hot([choice.logits.argmax(-1) for choice in self.choices])

    deterministic_sample = mode

    def _one_hot(self, chosen: Sequence[Tensor]) -> Tensor:
        parts = [one_hot(index, count) for index, count in zip(chosen, self.num_actions, strict=True)]
        return torch.cat(parts, -1)


class Bits(Distribution):
    """Independent 0/1 choices, ``[*B, n]``, int64, as TorchRL's ``Binary`` spec lays them out.

    Args:
        logits: of a 1, ``[*B, n]``.
    """

    arg_constraints = {}  # pyright: ignore

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum of the bits' log-probabilities, ``[*B]``, of 0/1 values of any dtype."""
        return torch.where(value.to(torch.bool), logsigmoid(self.logits), logsigmoid(-self.logits)).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        probability = self.logits.detach().sigmoid().expand(torch.Size(sample_shape) + self.logits.shape)
        return torch.bernoulli(probability).to(torch.int64)

    def entropy(self) -> Tensor:
        return (softplus(self.logits) - self.logits * self.logits.sigmoid()).sum(-1)

    @property
    def mode(self) -> Tensor:
        return (self.logits > 0).to(torch.int64)

    deterministic_sample = mode
