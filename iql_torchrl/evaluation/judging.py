"""Judging policies by data alone: what fitted Q evaluation, their own critics and held-out transitions say of each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl.configuration.options import FittedQOptions
from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.data.transitions import episode_starts
from iql_torchrl.evaluation.choosing import Chooser
from iql_torchrl.evaluation.held_out import held_out_metrics
from iql_torchrl.evaluation.off_policy import fitted_q_evaluation
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.objectives import IQLLoss

# What ranks policies: the figure, and whether it is in the units of what they are worth. Of each, more is better.
CRITERIA = {
    "fitted_q": True,
    "fitted_q_low": True,
    "critic": True,
    "minus_td_error": False,
    "log_prob": False,
    "minus_action_distance": False,
}
# Observations in which a policy that chooses among its draws acts at once.
_AT_ONCE = 256


@dataclass(frozen=True)
class Candidate:
    """A policy, with the networks that it was trained with.

    Attributes:
        loss: that has them.
        normaliser: of the observations as they are in the data that judge, or ``None``.
        reward_transform: scale and shift that the loss had rewards with.
        action_clip: as of :func:`iql_torchrl.data.actions.normalise_actions`.
        held_out: transitions that it was not trained on; ``None``: there are none among the data.
        has_critics: whether those of the loss are worth asking.
        num_samples, selection: of its decisions; see :meth:`iql_torchrl.evaluation.policy.Policy.from_loss`.
    """

    loss: IQLLoss
    normaliser: ObservationNormaliser | None = None
    reward_transform: tuple[float, float] = (1.0, 0.0)
    action_clip: float = 0.0
    held_out: TensorDict | None = None
    has_critics: bool = True
    num_samples: int | None = None
    selection: str = "largest"

    @torch.no_grad()
    def act(self, observation: Tensor) -> Tensor:
        """Actions in [-1, 1] ``[n, A]``, or discrete ones ``[n]``, in observations ``[n, O]`` of the data."""
        policy, seen = self._policy, observation
        if self.normaliser is not None:
            seen = self.normaliser(observation)
        if policy.chooser is not None and policy.chooses:  # many at a time, as whoever acts would not
            pieces = zip(seen.split(_AT_ONCE), observation.split(_AT_ONCE), strict=True)
            return torch.cat([self._chosen(policy.chooser, *piece) for piece in pieces]).clamp(-1, 1)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            action = policy.actor(TensorDict({"observation": seen}, [len(seen)]))["action"]
        return action.clamp(-1, 1) if action.is_floating_point() else action

    @cached_property
    def _policy(self) -> Policy:
        one, choice = torch.ones(()), {"num_samples": self.num_samples, "selection": self.selection}
        return Policy.from_loss(self.loss, -one, one, self.normaliser, **choice)

    @staticmethod
    def _chosen(chooser: Chooser, seen: Tensor, observation: Tensor) -> Tensor:
        return chooser(seen, *(one.to(seen.device) for one in chooser.noise_for(observation.cpu().numpy(), seed=0)))

    def seen(self, transitions: TensorDict) -> TensorDict:
        """Transitions as the loss had them."""
        scale, shift = self.reward_transform
        found = transitions.clone()
        found["next", "reward"].mul_(scale).add_(shift)
        if found["action"].is_floating_point():
            found["action"].clamp_(self.action_clip - 1, 1 - self.action_clip)
        if self.normaliser is not None:
            self.normaliser.apply_(found)
        return found


def judge(
    candidates: Sequence[Candidate],
    transitions: TensorDict,
    options: FittedQOptions,
    *,
    discount: float,
    num_actions: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """What data say of policies.

    Args:
        candidates: the policies.
        transitions: as :func:`iql_torchrl.load_transitions` returns them: rewards and observations as they were
            recorded, actions in [-1, 1] or discrete.
        options, discount, num_actions, seed, quiet: of :func:`~iql_torchrl.evaluation.off_policy.fitted_q_evaluation`.

    Returns:
        of each policy

        - ``fitted_q`` with ``fitted_q_low`` and ``fitted_q_high``, a 95% interval, and ``fitted_q_error``, the root
          mean squared TD error that was left;
        - ``critic``: what its own target critics say of its actions in the first observations of episodes, in the
          units of the rewards; ``None`` where rewards had a shift, which cannot be taken out again, or without
          critics;
        - ``td_error`` of its own critics, mean squared, in the units of the rewards, and ``log_prob`` of the data's
          actions, ``None`` of a policy without a density, on what was held out (``held_out``), else on all data;
        - ``action_distance``: root mean square, over transitions and dimensions, of the difference between its actions
          and the data's, in units in which actions are from -1 to 1; of discrete actions the share that differs.
    """
    estimates = fitted_q_evaluation(
        transitions,
        [candidate.act for candidate in candidates],
        options,
        discount=discount,
        num_actions=num_actions,
        seed=seed,
        quiet=quiet,
    )
    starts = torch.from_numpy(episode_starts(transitions.cpu())).to(transitions["observation"].device)
    first = transitions[starts]
    judged = []
    for candidate, estimate in zip(candidates, estimates, strict=True):
        low, high = estimate.interval or (None, None)
        held_out = transitions if candidate.held_out is None else candidate.held_out
        scale, shift = candidate.reward_transform
        with warnings.catch_warnings():  # which are for losses that are trained
            warnings.filterwarnings("ignore", message="No target network updater")
            metrics = held_out_metrics(candidate.loss, candidate.seen(held_out))
            critic = None if shift or not candidate.has_critics else _critic(candidate, first) / scale
        judged.append(
            {
                "fitted_q": estimate.value,
                "fitted_q_low": low,
                "fitted_q_high": high,
                "fitted_q_error": estimate.error,
                "critic": critic,
                "td_error": metrics["validation_td_error"] / scale**2 if candidate.has_critics else None,
                "log_prob": metrics["validation_log_prob"] if candidate.loss.has_likelihood else None,
                "held_out": candidate.held_out is not None,
                "action_distance": _distance(candidate, transitions),
            }
        )
    return judged


def judge_losses(
    losses: Sequence[IQLLoss],
    data: PreparedData,
    options: FittedQOptions,
    *,
    discount: float,
    seed: int,
    quiet: bool,
    **choice: Any,
) -> list[dict[str, Any]]:
    """:func:`judge` of the policies that were trained on prepared data, by these.

    Args:
        losses: on the data's device.
        data: all of which judge, held-out episodes included.
        options, discount, seed, quiet: as there.
        **choice: ``num_samples`` and ``selection`` of the decisions.
    """
    scale, shift = data.reward_transform
    device = next(losses[0].parameters()).device

    def recorded(transitions: TensorDict) -> Any:
        found = transitions.to(device).clone()
        found["next", "reward"].sub_(shift).div_(scale)
        return found

    parts = [recorded(part) for part in (data.training, data.validation) if part is not None]
    held_out = parts[1] if len(parts) > 1 else None
    together: Any = torch.cat(parts)
    candidates = [Candidate(loss, None, (scale, shift), data.action_clip, held_out, **choice) for loss in losses]
    return judge(
        candidates,
        together,
        options,
        discount=discount,
        num_actions=data.spaces.num_actions,
        seed=seed,
        quiet=quiet,
    )


def criterion(judged: Mapping[str, Any], name: str) -> float | None:
    """One of :data:`CRITERIA`, of which more is better; ``None`` where there is none."""
    value = judged[name.removeprefix("minus_")]
    if value is None or not math.isfinite(value):
        return None
    return -value if name.startswith("minus_") else value


def _critic(candidate: Candidate, first: TensorDict) -> float:
    action = candidate.act(first["observation"])
    # Where the critics were trained: not on the bounds themselves.
    seen = candidate.seen(first.clone().set("action", action))
    return float(candidate.loss.target_qvalue(seen, sample=False).mean())


def _distance(candidate: Candidate, transitions: TensorDict) -> float:
    total, count = 0.0, 0
    for piece in transitions.split(1 << 14):
        action, wanted = candidate.act(piece["observation"]), piece["action"]
        difference = (action - wanted).double().square() if action.is_floating_point() else (action != wanted).double()
        total, count = total + float(difference.sum()), count + difference.numel()
    return math.sqrt(total / count) if transitions["action"].is_floating_point() else total / count
