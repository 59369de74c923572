"""Runs whose numbers leave the finite, or all that the rewards allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase

from iql_torchrl.configuration.options import AlgorithmOptions

_RATES = {"value": "value_lr", "qvalue": "critic_lr", "actor": "actor_lr"}
# A learning rate above this is the first suspect; the paper's is 3e-4.
_USUAL_RATE = 3e-3
# Values this many times beyond what the rewards allow are no longer an overshoot on the way to a fixed point.
_MARGIN = 100.0


@dataclass(frozen=True)
class Divergence:
    """A seed whose losses or parameters hold NaN or infinity.

    Args:
        seed: of the run.
        step: updates done when it was seen.
        losses: those that are not finite, with their values.
        networks: those that hold such numbers.
        last_good: the checkpoint before, where there is one.
        saved: the file with batch and state, where there is a run folder.
    """

    seed: int
    step: int
    losses: Mapping[str, float]
    networks: tuple[str, ...]
    last_good: Path | None
    saved: Path | None

    def message(self, algorithm: AlgorithmOptions, largest_reward: float) -> str:
        """What happened, what is left, and what to try."""
        losses = ", ".join(f"{name} is {value:g}" for name, value in self.losses.items())
        networks = f"the parameters of {', '.join(self.networks)} are no numbers" if self.networks else ""
        what = " and ".join(filter(None, (losses, networks)))
        good = f"Its last good checkpoint is {self.last_good}. " if self.last_good else "It has no checkpoint. "
        saved = f"Batch and state are in {self.saved}. " if self.saved else ""
        advice = self._advice(algorithm, largest_reward)
        return f"seed {self.seed} diverged by step {self.step}: {what}. {good}{saved}{advice}"

    def _advice(self, algorithm: AlgorithmOptions, largest_reward: float) -> str:
        names = {name.removeprefix("loss_").removeprefix("target_") for name in (*self.losses, *self.networks)}
        rates = {option: getattr(algorithm, option) for name, option in _RATES.items() if name in names or not names}
        fast = {option: rate for option, rate in rates.items() if rate > _USUAL_RATE}
        if fast:
            lower = ", ".join(f"algorithm.{option} (now {rate:g})" for option, rate in fast.items())
            return f"Try a lower {lower}; the paper's is 3e-4."
        return (
            f"Look at the data with recipes/inspect_dataset.py (the largest reward is {largest_reward:g} in size, as "
            "transformed), and try lower learning rates, algorithm.layer_norm=true, or a lower algorithm.temperature."
        )


def largest_reward(training: TensorDict) -> float:
    """The largest |reward| of the training data, as transformed."""
    return float(torch.stack(training["next", "reward"].aminmax()).abs().max())


def explosion(row: Mapping[str, float | None], reward: float, discount: float) -> str | None:
    """What to say of values beyond all that the rewards allow, which is |reward| / (1 - discount) for Q and V.

    Args:
        row: of the diagnostics.
        reward: the largest |reward|.
        discount: gamma; without one below 1 nothing is bounded.
    """
    if discount >= 1 or reward == 0:
        return None
    bound = _MARGIN * reward / (1 - discount)
    for name, limit in (("qvalue", bound), ("value", bound), ("td_error", bound**2)):
        found = row.get(name)
        if found is not None and math.isfinite(found) and abs(found) > limit:
            allowed = limit / (_MARGIN if name != "td_error" else _MARGIN**2)
            return (
                f"{name} is {found:.3g}, where rewards and discount allow {allowed:.3g}: the critics explode. Try "
                "lower learning rates (algorithm.critic_lr, algorithm.value_lr) or algorithm.layer_norm=true."
            )
    return None


def as_plain(batch: TensorDictBase) -> dict[str, torch.Tensor]:
    """The entries of a batch by their names, on the host: what a file can hold without this package."""
    return {str(key): value.detach().cpu().clone() for key, value in batch.flatten_keys(".").items()}
