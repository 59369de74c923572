"""What ``recipes/judge.py`` does: policies, data, estimates, and where a simulator is allowed the truth beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from iql_torchrl.configuration.options import TrainOptions
from iql_torchrl.data.buffer import split_episodes
from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.data.rewards import transform_rewards
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.evaluation.agreement import agreement
from iql_torchrl.evaluation.judging import CRITERIA, Candidate, criterion, judge
from iql_torchrl.evaluation.off_policy import discounted_returns
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.judging.policies import JudgedPolicy, data_of, env_of, find_policies, is_data_of, source_of
from iql_torchrl.reporting.doctor import examine
from iql_torchrl.reporting.report.gathering import Listed, nothing_left
from iql_torchrl.running.options import JudgeOptions
from iql_torchrl.training.construction import build_step
from iql_torchrl.training.devices import resolve_device

CLONED = "behaviour cloning"


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Attributes:
        data: name of the data that judged.
        discount: of all values.
        rows: a policy each: ``policy``, ``path``, ``step``, what :func:`iql_torchrl.evaluation.judging.judge` says of
            it, and with episodes in a simulator ``true_value`` (discounted), ``true_return`` and
            ``normalized_score``.
        agreement: of each criterion with the true values, and ``"return"`` with the returns, where these are known.
        data_value: mean discounted return of the data's own episodes.
        listed: what was named and could not be judged.
        findings: of the doctor, by run folder.
        notes: what a reader should know.
    """

    data: str
    discount: float
    rows: Sequence[Mapping[str, Any]]
    agreement: Mapping[str, Mapping[str, Mapping[str, Any]]]
    data_value: float
    listed: Sequence[Listed]
    findings: Mapping[str, Sequence[Mapping[str, Any]]]
    notes: Sequence[str]


def judge_checkpoints(options: JudgeOptions) -> Judgement:
    """Judge the policies of checkpoints.

    Args:
        options: of ``recipes/judge.py``.

    Raises:
        ConfigurationError: nothing that can be judged, or options that do not suit the data.
        CheckpointError, DatasetError, SimulatorError: as the parts do.
    """
    found, listed = find_policies(options.checkpoints, best=options.best)
    if not found:
        named = f"checkpoints=[{','.join(options.checkpoints)}] names no policy that can be judged"
        raise ConfigurationError(nothing_left(named, listed))
    first, device = found[0], resolve_device(options.device)
    source = source_of(first) if options.dataset is None else options.dataset
    data = data_of(first, source, options.env if options.dataset is not None else env_of(first, options.env))
    if options.episodes and data.environment is None:
        raise ConfigurationError(
            f"episodes={options.episodes} needs an environment, and there is none; set env.name=ID."
        )
    transitions = data.training.to(device)
    discount = first.algorithm.discount if options.discount is None else options.discount
    notes = _notes(found, data, discount)

    candidates = [_candidate(one, data, device) for one in found]
    rows = [{"policy": one.name, "path": str(one.path), "step": one.content["step"]} for one in found]
    policies = [one.policy for one in found]
    if options.behaviour_cloning_steps:
        cloned = _clone(first, candidates[0], data, options, device)
        candidates.append(cloned)
        rows.append({"policy": CLONED, "path": None, "step": options.behaviour_cloning_steps})
        bounds = (data.spaces.action_low, data.spaces.action_high)
        policies.append(Policy.from_loss(cloned.loss, *bounds, first.policy.normaliser))
    judged = judge(
        candidates,
        transitions,
        options.fitted_q,
        discount=discount,
        num_actions=data.spaces.num_actions,
        seed=options.seed,
    )
    rows = [row | one for row, one in zip(rows, judged, strict=True)]
    agreements: dict[str, dict[str, Any]] = {}
    if options.episodes:
        rows = [row | truth for row, truth in zip(rows, _truths(policies, data, options, discount), strict=True)]
        agreements = {
            "value": _agreements(rows, "true_value"),
            "return": _agreements(rows, "true_return"),
        }
    rows.sort(key=lambda row: -row["fitted_q"])
    value = float(discounted_returns(transitions, discount).mean())
    return Judgement(source.title, discount, rows, agreements, value, listed, _findings(found), notes)


def _candidate(policy: JudgedPolicy, data: PreparedData, device: torch.device) -> Candidate:
    """A policy beside the data, with what its run did to them."""
    algorithm = policy.algorithm
    # By the returns of its own run's data, which nothing tells where these are others: its critics are not asked then.
    has_critics = is_data_of(policy, data) or algorithm.reward_transform != "return_range"
    scale_and_shift = transform_rewards(data.training.clone(), algorithm.reward_transform)
    held_out, fraction = None, policy.content["config"]["dataset"].get("validation_fraction")
    if fraction is None:
        fraction = 0.1 if policy.content["environment"] is None else 0.0
    if not is_data_of(policy, data):
        held_out = data.training.to(device)
    elif fraction:
        held_out = split_episodes(data.training, fraction)[1].to(device)
    return Candidate(
        policy.loss(data.spaces, device),
        policy.normaliser(device),
        scale_and_shift,
        algorithm.action_clip,
        held_out,
        has_critics,
        **policy.choice,
    )


def _clone(
    first: JudgedPolicy, candidate: Candidate, data: PreparedData, options: JudgeOptions, device: torch.device
) -> Candidate:
    """Behaviour cloning of the data, with the networks of the first policy: what the others are measured against."""
    training = data.training.to(device)
    held_out = candidate.held_out if is_data_of(first, data) else None  # others are all cloned
    if held_out is not None:
        training = training[~torch.isin(training["episode"], held_out["episode"].unique())]
    algorithm = first.algorithm.model_copy(update={"temperature": 0.0, "extraction": "awr", "opt_decay_schedule": None})
    steps = options.behaviour_cloning_steps
    chosen = {"steps": steps, "seed": options.seed, "num_seeds": 1, "updates_per_call": 1, "products": "auto"}
    train = TrainOptions.model_validate({**first.content["config"]["train"], **chosen, "cudagraphs": False})
    step = build_step(algorithm, train, replace(data, training=candidate.seen(training)), device)
    for _ in tqdm(range(steps), unit="update", desc=CLONED):
        step()
    return replace(candidate, loss=step.loss, held_out=held_out, has_critics=False, num_samples=None)


def _truths(
    policies: Sequence[Policy], data: PreparedData, options: JudgeOptions, discount: float
) -> list[dict[str, Any]]:
    """What the policies are worth in the simulator, all from the same starts."""
    assert data.environment is not None
    evaluator = Evaluator(data.environment, episodes=options.episodes, seed=options.seed, discount=discount)
    found = []
    try:
        for policy in tqdm(policies, unit="policy", desc="simulator"):
            evaluation = evaluator.evaluate(policy)
            assert evaluation.discounted is not None
            found.append(
                {
                    "true_value": float(evaluation.discounted.mean()),
                    "true_return": float(evaluation.returns.mean()),
                    "normalized_score": evaluation.normalized_score,
                }
            )
    finally:
        evaluator.close()
    return found


def _agreements(rows: Sequence[dict[str, Any]], truth: str) -> dict[str, Mapping[str, Any]]:
    """Of each criterion, over the policies that have it; none of fewer than three."""
    found = {}
    for name, comparable in CRITERIA.items():
        both = [(value, row[truth]) for row in rows if (value := criterion(row, name)) is not None]
        if len(both) >= 3:
            estimates, truths = zip(*both, strict=True)
            found[name] = agreement(estimates, truths, comparable=comparable and truth == "true_value")
    return found


def _findings(found: Sequence[JudgedPolicy]) -> dict[str, list[dict[str, Any]]]:
    """What the doctor says of the runs that the policies are of."""
    findings = {}
    for run in dict.fromkeys(one.run for one in found):
        try:
            findings[str(run)] = examine(run)
        except ConfigurationError:  # a checkpoint by itself, without its run
            continue
    return findings


def _notes(found: Sequence[JudgedPolicy], data: PreparedData, discount: float) -> list[str]:
    notes = [*data.warnings]
    others = [one for one in found if not is_data_of(one, data)]
    if others:
        critics = ", and the critics of those with algorithm.reward_transform=return_range are not asked"
        notes.append(f"{len(others)} of {len(found)} policies were trained on other data than these{critics}")
    discounts = sorted({one.algorithm.discount for one in found})
    if discounts != [discount]:
        notes.append(
            f"values are of discount {discount:g}; policies were trained with {discounts}, and so their critics"
        )
    if any(one.algorithm.reward_transform == "minus_one" for one in found):
        notes.append("critics of runs with algorithm.reward_transform=minus_one have no value in units of the rewards")
    return notes
