"""Observations normalised as the training data are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from iql_torchrl.data.log import ROWS_AT_A_TIME


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
        mean = torch.zeros(observation.shape[1], dtype=torch.float64, device=observation.device)
        for chunk in observation.split(ROWS_AT_A_TIME):
            mean += chunk.double().sum(0) / len(observation)
        variance = torch.zeros_like(mean)
        for chunk in observation.split(ROWS_AT_A_TIME):
            variance += (chunk.double() - mean).square().sum(0)
        std = (variance / len(observation)).sqrt() + 1e-3
        return cls(mean.float(), std.float())

    def __call__(self, observation: Tensor) -> Tensor:
        """``observation`` of shape ``[*B, O]``, normalised."""
        return (observation - self.mean) / self.std

    def apply_(self, transitions: TensorDict | dict[NestedKey, Tensor]) -> None:
        """Normalise the observations and next observations of ``transitions`` in place."""
        for key in ("observation", ("next", "observation")):
            transitions[key].sub_(self.mean).div_(self.std)
