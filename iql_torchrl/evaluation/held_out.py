"""A loss on transitions that training never sees."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from iql_torchrl.objectives import IQLLoss


@torch.no_grad()
def held_out_metrics(loss: IQLLoss, validation: TensorDict) -> dict[str, float]:
    """Log-likelihood, TD error and advantage on transitions that training never sees, averaged over all of them."""
    sums: dict[str, Tensor] = {}
    device = next(loss.parameters()).device
    for batch in validation.exclude("episode").split(4096):
        found = loss.diagnostics(batch.to(device))
        for key in ("log_prob", "td_error", "advantage_mean"):
            sums[key] = sums.get(key, torch.zeros((), device=device)) + found[key] * len(batch)
    return {f"validation_{key}": float(value) / len(validation) for key, value in sums.items()}
