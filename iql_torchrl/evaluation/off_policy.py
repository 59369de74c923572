"""What a policy is worth, from data alone: fitted Q evaluation, with an interval from resampled episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from iql_torchrl.configuration.options import FittedQOptions
from iql_torchrl.data.transitions import as_array, episode_lengths, episode_starts
from iql_torchrl.training.fitted_q import FittedQ

# Critics of one update: more are no faster together, and their activations no longer fit a cache.
_AT_ONCE = 32
_CONFIDENCE = 0.95
# A policy: observations [n, O] -> actions as the transitions have them.
Act = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FittedQEstimate:
    """Of one policy.

    Attributes:
        value: mean discounted return from the first observations of the data's episodes, in units of the rewards.
        interval: of 95%, from critics on resampled episodes; ``None`` of fewer than two resamples.
        error: root mean squared TD error at the end, in the same units: large beside the spread of values means that
            the critics had not got there.
    """

    value: float
    interval: tuple[float, float] | None
    error: float


def fitted_q_evaluation(
    transitions: TensorDict,
    policies: Sequence[Act],
    options: FittedQOptions,
    *,
    discount: float,
    num_actions: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> list[FittedQEstimate]:
    """Fitted Q evaluation (Le et al. 2019, arXiv 1903.08738) of several policies on the same data.

    A critic on all data gives the estimate; ``options.resamples`` critics more, each on as many episodes drawn with
    replacement and averaged over their first observations, give its standard error, and with Student's t an interval.
    That covers what other episodes of the same kind would have changed, and not what no data tell: actions that are not
    in them, networks that cannot say it. Rewards are divided by what makes values about 1, observations normalised, and
    target values clipped to what the data's smallest and largest rewards allow.

    Args:
        transitions: as :func:`iql_torchrl.load_transitions` returns them, on the device of the computation; actions in
            [-1, 1], or discrete.
        policies: observations ``[n, O]``, as the transitions have them, -> actions in the same form.
        options: of the critics and their updates.
        discount: of future rewards.
        num_actions: of discrete ones.
        seed: of resamples, networks and draws, the same for all policies.
        quiet: show no bar.

    Returns:
        an estimate a policy.
    """
    device = transitions["observation"].device
    starts, lengths = episode_starts(transitions.cpu()), episode_lengths(transitions.cpu())
    resamples = np.random.default_rng(seed).integers(len(starts), size=(options.resamples, len(starts)))
    members = [np.arange(len(starts)), *resamples]
    rows = [torch.from_numpy(_rows_of(starts, lengths, episodes)).to(device) for episodes in members]
    counts = torch.from_numpy(np.stack([np.bincount(one, minlength=len(starts)) for one in members]))
    weights = (counts / len(starts)).to(device, torch.float64)

    actions = [_actions(act, transitions["next", "observation"]) for act in policies]
    first = transitions["observation"][torch.from_numpy(starts).to(device)]
    first_actions = [_actions(act, first) for act in policies]
    scaled, unit, mean, std = _scaled(transitions, discount, float(lengths.mean()))

    at_once = -(-len(policies) // -(-len(policies) * len(rows) // _AT_ONCE))
    groups = [list(range(start, min(start + at_once, len(policies)))) for start in range(0, len(policies), at_once)]
    critics: FittedQ | None = None
    found: list[FittedQEstimate] = []
    with tqdm(total=options.steps * len(groups), unit="update", disable=quiet, desc="fitted Q") as bar:
        for group in groups:
            # As many in every group, so that what is compiled serves all.
            padded = [*group, *group[-1:] * (at_once - len(group))]
            next_actions = torch.stack([actions[index] for index in padded])
            if critics is None:
                critics = FittedQ(
                    scaled,
                    next_actions,
                    rows,
                    discount=discount,
                    bounds=_bounds(scaled, discount, int(lengths.max())),
                    num_actions=num_actions,
                    seed=seed,
                    **options.model_dump(exclude={"steps", "resamples"}),
                )
            else:
                critics.restart(next_actions)
            error, last = torch.zeros(()), max(options.steps // 10, 1)
            for step in range(options.steps):
                loss = critics()
                if step == 0 and not found and critics.compile_note and not quiet:
                    bar.write(critics.compile_note)
                if step >= options.steps - last:
                    error = error.to(loss) + loss
                bar.update()
            errors = (error / last).sqrt() * unit
            values = critics.values((first - mean) / std, torch.stack([first_actions[index] for index in padded]))
            of_members = (values.double() * weights).sum(-1) * unit
            for place in range(len(group)):
                value, *others = of_members[place].tolist()
                found.append(FittedQEstimate(value, _interval(value, others), float(errors[place, 0])))
    return found


def discounted_returns(transitions: TensorDict, discount: float) -> np.ndarray:
    """Of every episode of the data, as far as it goes, float64 ``[episodes]``."""
    rewards = as_array(transitions.cpu(), ("next", "reward"))[:, 0].astype(np.float64)
    starts, lengths = episode_starts(transitions.cpu()), episode_lengths(transitions.cpu())
    steps = np.arange(len(rewards)) - np.repeat(starts, lengths)
    return np.add.reduceat(rewards * discount**steps, starts)


def _rows_of(starts: np.ndarray, lengths: np.ndarray, episodes: np.ndarray) -> np.ndarray:
    """All rows of some episodes, those drawn twice twice."""
    return np.concatenate(
        [start + np.arange(length) for start, length in zip(starts[episodes], lengths[episodes], strict=True)]
    )


def _actions(act: Act, observation: Tensor) -> Tensor:
    return torch.cat([act(piece) for piece in observation.split(1 << 14)])


def _scaled(transitions: TensorDict, discount: float, length: float) -> tuple[TensorDict, float, Tensor, Tensor]:
    """The transitions with normalised observations and divided rewards; by what, and mean and std of the former."""
    observation, reward = transitions["observation"], transitions["next", "reward"]
    mean, std = observation.mean(0), observation.std(0) + 1e-3
    horizon = min(length, 1 / (1 - discount) if discount < 1 else np.inf)
    unit = float(reward.double().square().mean().sqrt()) * horizon or 1.0
    changed = transitions.copy()
    changed["observation"] = (observation - mean) / std
    changed["next", "observation"] = (transitions["next", "observation"] - mean) / std
    changed["next", "reward"] = reward / unit
    return changed, unit, mean, std


def _bounds(transitions: TensorDict, discount: float, longest: int) -> tuple[float, float]:
    """Between the smallest and the largest reward for ever, or none where an episode ends."""
    smallest, largest = (float(one) for one in transitions["next", "reward"].aminmax())
    horizon = 1 / (1 - discount) if discount < 1 else longest
    return min(smallest, 0.0) * horizon, max(largest, 0.0) * horizon


def _interval(value: float, resampled: Sequence[float]) -> tuple[float, float] | None:
    from scipy.stats import t

    if len(resampled) < 2:
        return None
    half = float(t.ppf((1 + _CONFIDENCE) / 2, len(resampled) - 1) * np.std(resampled, ddof=1))
    return value - half, value + half
