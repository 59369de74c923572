"""Observation normalisation, fitted on the data, saved with the policy and applied at evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor


@dataclass(frozen=True)
class ObservationNormaliser:
    """(observation - mean) / std, each of shape ``[O]``."""

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, transitions: TensorDict) -> ObservationNormaliser:
        """Mean and standard deviation + 1e-3 (CORL's) over the transitions' observations."""
        observation = transitions["observation"]
        # float64 sums without a float64 copy of the data
        mean = observation.mean(0, dtype=torch.float64)
        variance = torch.zeros_like(mean)
        for chunk in observation.split(100_000):
            variance += (chunk.double() - mean).square().sum(0)
        std = (variance / len(observation)).sqrt() + 1e-3
        return cls(mean.float(), std.float())

    def __call__(self, observation: Tensor) -> Tensor:
        """``observation`` of shape ``[*B, O]``, normalised."""
        return (observation - self.mean) / self.std

    def apply_(self, transitions: TensorDict) -> None:
        """Normalise the observations and next observations of ``transitions`` in place."""
        for key in ("observation", ("next", "observation")):
            transitions[key].sub_(self.mean).div_(self.std)
