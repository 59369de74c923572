"""The training doctor: what went wrong in a run, in plain words, with its evidence and what to change.

Each check reads what was logged and what ``summary.json`` says of the data. A check says nothing where what it needs is
not there: runs of earlier releases, no evaluation, discrete actions. Thresholds are far from what healthy runs show, so
that a finding means something; that there is none does not mean that all is well.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from iql_torchrl.reporting.run_folder import RecordedRun, Records

Row = Mapping[str, Any]

# Fewer updates say nothing yet of what is learnt.
_FEWEST_UPDATES = 500
# Values so many times beyond what the rewards allow are no overshoot on the way to a fixed point.
_BEYOND_REWARDS = 3.0
# Of Q's standard deviation, relative to Q itself or the largest reward.
_CONSTANT = 1e-4
# Temperature times the standard deviation of the advantages: weights between exp(-this) and exp(this) are all the same.
_FLAT = 0.01
# Rewards whose root mean square is larger than this make values that networks of the usual learning rates never reach.
_LARGE_REWARDS = 300.0
# And where none is larger than this, what the networks say at random drowns them for long.
_SMALL_REWARDS = 1e-3
# The episode's length over the horizon 1 / (1 - discount), and the other way round; 10 in locomotion.
_FAR = 30.0
_MANY_AT_BOUNDS = 0.4
# Evaluations that are needed to say that a score falls, in thirds, episodes that each must have, as the spread of fewer
# says nothing, and the share that it must fall by.
_FEWEST_EVALUATIONS = 9
_FEWEST_EPISODES = 5
_FALL = 0.2


@dataclass(frozen=True)
class _Case:
    """What a check looks at: the rows of one seed, finite numbers alone, and what is known besides."""

    algorithm: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Sequence[Row]
    evaluations: Sequence[Row]

    def late(self, key: str) -> list[float]:
        """A column in the second half of the updates; empty before the first five hundred."""
        last = self.metrics[-1]["step"] if self.metrics else 0
        if last < _FEWEST_UPDATES:
            return []
        return [row[key] for row in self.metrics if row["step"] > last / 2 and key in row]

    @property
    def when(self) -> str:
        """The steps that :meth:`late` is of."""
        last = self.metrics[-1]["step"]
        first = next(row["step"] for row in self.metrics if row["step"] > last / 2)
        return f"at step {last:,.0f}" if first == last else f"from step {first:,.0f} to {last:,.0f}"

    @property
    def temperature(self) -> float:
        """Of the advantage weights; 0 too where the policy is learnt without them."""
        weighted = self.algorithm.get("extraction", "awr") == "awr"
        return float(self.algorithm.get("temperature") or 0.0) if weighted else 0.0


Found = tuple[str, str]  # evidence and advice


def examine(path: Path) -> list[dict[str, Any]]:
    """The findings of a run folder, finished or not, which is left as it is.

    Args:
        path: of the folder.

    Returns:
        as :func:`diagnose`.

    Raises:
        ConfigurationError: it is no run folder, or damaged.
    """
    run = RecordedRun(path)
    return diagnose(run, run.config.get("algorithm") or {}, (run.summary or {}).get("data") or {})


def diagnose(records: Records, algorithm: Mapping[str, Any], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What looks wrong in a run.

    Args:
        records: its rows.
        algorithm: its options ``algorithm.*``.
        data: of :func:`iql_torchrl.reporting.data_facts.data_facts`; empty where nothing is known.

    Returns:
        a finding each: ``name``, ``evidence``, ``advice``, and ``seeds``, those that it was found in, of which the
        evidence is the first one's; ``None`` where it is of the data, and so of every seed. Empty where nothing is.
    """
    case = _Case(algorithm, data, (), ())
    findings = [
        {"name": name, "evidence": evidence, "advice": advice, "seeds": None}
        for name, check in _OF_DATA.items()
        for evidence, advice in check(case)
    ]
    metrics, evaluations = _by_seed(records.metrics()), _by_seed(records.evaluations())
    for name, check in _OF_RUN.items():
        found: dict[int, Found] = {}
        for seed in metrics:
            case = _Case(algorithm, data, metrics[seed], evaluations.get(seed, []))
            first = next(check(case), None)
            if first is not None:
                found[seed] = first
        if found:
            evidence, advice = next(iter(found.values()))
            findings.append({"name": name, "evidence": evidence, "advice": advice, "seeds": list(found)})
    return findings


def as_text(findings: Sequence[Mapping[str, Any]], seeds: int = 1) -> str:
    """The findings for the terminal; ``seeds`` is how many the run has."""
    lines = []
    for one in findings:
        of = "" if one["seeds"] is None or seeds == 1 else f" (seed {', '.join(map(str, one['seeds']))})"
        lines.append(f"  ! {one['name'].replace('_', ' ')}{of}")
        for sentence in (one["evidence"], one["advice"]):
            lines += textwrap.wrap(sentence, 116, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _by_seed(rows: Sequence[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        finite = {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        found.setdefault(int(row["seed"]), []).append(finite)
    return found


# ---------------------------------------------------------------------- of the rows


def _exploding_q(case: _Case) -> Iterator[Found]:
    discount, largest = float(case.algorithm.get("discount", 1.0)), case.data.get("largest_reward") or 0.0
    if discount >= 1 or not largest:
        return
    bound = largest / (1 - discount)
    for key, name in (("qvalue", "Q"), ("value", "V")):
        late = case.late(key)
        if late and abs(median(late)) > _BEYOND_REWARDS * bound:
            yield (
                f"{name} is {median(late):.4g} {case.when} (median), where rewards of at most {largest:.4g} and the "
                f"discount {discount:g} allow {bound:.4g}.",
                "The critics explode: lower algorithm.critic_lr and algorithm.value_lr (the paper's are 3e-4), or set "
                "algorithm.layer_norm=true.",
            )
            return


def _constant_q(case: _Case) -> Iterator[Found]:
    spread, values = case.late("qvalue_std"), case.late("qvalue")
    if not spread or not values:
        return
    size = max(abs(median(values)), case.data.get("largest_reward") or 0.0)
    if median(spread) <= _CONSTANT * size:
        yield (
            f"Q is {median(values):.4g} for every state and action of a batch: its standard deviation is "
            f"{median(spread):.2g} {case.when} (median).",
            "The critics tell nothing apart. Their units may have died: lower algorithm.critic_lr, and look at the "
            "scale of the observations (algorithm.normalise_observations=true) and at whether rewards differ.",
        )


def _weights_clipped(case: _Case) -> Iterator[Found]:
    clipped, effective = case.late("clipped_fraction"), case.late("effective_sample_size")
    if not case.temperature or not clipped or not effective:
        return
    share, sample = median(clipped), median(effective)
    if share >= 0.05 and share >= 0.97 * sample:
        limit = case.algorithm.get("max_weight", 100.0)
        yield (
            f"{100 * share:.0f}% of the advantage weights are at their clip of {limit:g}, and the others count for "
            f"nothing: the effective sample size is {100 * sample:.0f}% of the batch {case.when} (medians).",
            f"Actions better than V are all imitated alike: lower algorithm.temperature (now {case.temperature:g}), or "
            "scale the rewards (algorithm.reward_transform=return_range).",
        )


def _few_weights(case: _Case) -> Iterator[Found]:
    effective, batch = case.late("effective_sample_size"), case.algorithm.get("batch_size", 256)
    if case.temperature and effective and batch >= 32 and median(effective) * batch < 2:
        yield (
            f"The effective sample size of the advantage weights is {median(effective) * batch:.2g} of the {batch} "
            f"transitions of a batch {case.when} (median).",
            f"The policy learns from one transition an update: lower algorithm.temperature (now {case.temperature:g}) "
            f"or algorithm.max_weight (now {case.algorithm.get('max_weight', 100.0):g}), or look for outliers among "
            "the rewards.",
        )


def _std_at_bound(case: _Case) -> Iterator[Found]:
    found = case.late("policy_std")
    if not found or case.algorithm.get("policy") == "deterministic":
        return
    if case.algorithm.get("standard_deviation") == "biased_softplus":
        low, high, option = 0.1, math.inf, "algorithm.standard_deviation"
    else:
        low, high = (math.exp(one) for one in case.algorithm.get("log_std_bounds", (-math.inf, math.inf)))
        option = "algorithm.log_std_bounds"
    std = median(found)
    which = "lower" if std <= 1.02 * low else "upper" if std >= 0.98 * high else None
    if which is None:
        return
    meaning = (
        "The policy would like to be surer of its actions: the data's may hardly differ, or not depend on the state "
        "(look at constant dimensions with recipes/inspect_dataset.py), and log-likelihoods grow without end; stop "
        "earlier, or lower the bound"
        if which == "lower"
        else "The policy cannot fit the data's actions: raise the bound, and see that the actions lie in their bounds"
    )
    yield (
        f"The policy's standard deviation is {std:.3g} in every dimension {case.when} (median), its {which} bound "
        f"{low if which == 'lower' else high:.3g}.",
        f"{meaning} ({option}).",
    )


def _v_above_q(case: _Case) -> Iterator[Found]:
    positive = case.late("positive_advantages")
    if positive and fmean(positive) <= 0.002:
        advantage = case.late("advantage_mean")
        yield (
            f"V lies above Q for {100 * (1 - fmean(positive)):.1f}% of the transitions {case.when}; the mean advantage "
            f"is {median(advantage or [math.nan]):.3g}.",
            f"No action counts as good. Lower algorithm.expectile (now {case.algorithm.get('expectile')}), and see "
            "that V is trained at all (algorithm.value_lr) and no slower than the critics.",
        )


def _reward_scale(case: _Case) -> Iterator[Found]:
    size = case.data.get("root_mean_square_reward")
    transform = case.algorithm.get("reward_transform")
    if size is not None and size > _LARGE_REWARDS:
        yield (
            f"The root mean square of the rewards is {size:.3g}, as transformed (algorithm.reward_transform="
            f"{transform}).",
            "Values become too large for the learning rates, and every weight is 0 or at its clip: set "
            "algorithm.reward_transform=return_range, or divide the rewards.",
        )
        return
    advice = (
        "Set algorithm.reward_transform=return_range, or multiply the rewards; or raise algorithm.temperature (now "
        f"{case.temperature:g})."
    )
    largest = case.data.get("largest_reward")
    if case.temperature and largest and largest < _SMALL_REWARDS:
        yield f"No reward is larger than {largest:.3g} in size: what they add to Q is lost in its errors.", advice
        return
    late, constant = case.late("advantage_std"), next(_constant_q(case), None)
    if case.temperature and size and late and constant is None and case.temperature * median(late) < _FLAT:
        yield (
            f"temperature x the standard deviation of the advantages is {case.temperature * median(late):.2g} "
            f"{case.when} (median), with rewards of root mean square {size:.3g}: all weights are 1, as in behaviour "
            "cloning.",
            advice,
        )


def _score_falls(case: _Case) -> Iterator[Found]:
    """The last third of the evaluations is, each one of it, below the best third, and the losses have gone down."""
    rows = [row for row in case.evaluations if row.get("phase") == case.evaluations[-1].get("phase")]
    if len(rows) < _FEWEST_EVALUATIONS or min(row.get("episodes", 0) for row in rows) < _FEWEST_EPISODES:
        return
    size = len(rows) // 3
    early, last = [rows[start : start + size] for start in range(len(rows) - 2 * size + 1)], rows[-size:]
    key = "normalized_score" if all("normalized_score" in row for row in rows) else "episode_return_mean"
    if any(key not in row for row in rows):  # NaN
        return
    best = max(early, key=lambda third: fmean(row[key] for row in third))
    high, low = (fmean(row["episode_return_mean"] for row in third) for third in (best, last))
    error = math.sqrt(sum(_squared_error(row) for row in (*best, *last))) / size
    separate = min(row[key] for row in best) > max(row[key] for row in last)
    if not separate or high - low < max(4 * error, _FALL * max(abs(high), abs(low))):
        return
    losses = []
    for loss, name in (("loss_actor_mean", "policy"), ("loss_qvalue_mean", "Q"), ("loss_value_mean", "V")):
        before, after = (_mean_between(case.metrics, loss, third) for third in (best, last))
        if before is not None and after is not None and after < before:
            losses.append(f"{name} {before:.4g} to {after:.4g}")
    if losses:
        score = "normalised score" if key == "normalized_score" else "return"
        before, after = (fmean(row[key] for row in third) for third in (best, last))
        yield (
            f"The {score} fell from {before:.4g} (steps {best[0]['step']:,.0f} to {best[-1]['step']:,.0f}) to "
            f"{after:.4g} (steps {last[0]['step']:,.0f} to {last[-1]['step']:,.0f}) while losses went down: "
            f"{', '.join(losses)}.",
            "The policy overfits, or follows a critic that is wrong: take an earlier checkpoint, stop earlier "
            "(train.steps), or set algorithm.dropout_rate=0.1, algorithm.layer_norm=true or a lower "
            "algorithm.temperature.",
        )


def _squared_error(row: Row) -> float:
    return row.get("episode_return_std", 0.0) ** 2 / max(row.get("episodes", 1.0), 1.0)


def _mean_between(metrics: Sequence[Row], key: str, rows: Sequence[Row]) -> float | None:
    between = [one[key] for one in metrics if rows[0]["step"] <= one["step"] <= rows[-1]["step"] and key in one]
    return fmean(between) if between else None


# ---------------------------------------------------------------------- of the data


def _discount(case: _Case) -> Iterator[Found]:
    length, discount = case.data.get("episode_length"), case.algorithm.get("discount")
    if length is None or discount is None:
        return
    horizon = math.inf if discount >= 1 else 1 / (1 - discount)
    terminated = case.data.get("terminated", 1.0)
    if length > _FAR * horizon:
        fitting = 1 - 1 / max(length / 10, 1.0)
        yield (
            f"The horizon of algorithm.discount={discount:g} is {horizon:.3g} steps; the data's episodes have "
            f"{length:.0f} (median).",
            f"What an action leads to later does not count: a discount of {fitting:.3g} or more reaches a tenth of "
            "an episode.",
        )
    elif horizon > _FAR * length and terminated < 0.5:
        yield (
            f"The horizon of algorithm.discount={discount:g} is {horizon:.3g} steps; the data's episodes have "
            f"{length:.0f} (median), of which {100 * terminated:.0f}% end by a terminal.",
            "Values come from what lies beyond the ends that the data show, and nearly nothing pins them down: lower "
            f"algorithm.discount (to {max(0.0, 1 - 1 / (3 * length)):.3g}, say), or mark real ends as terminals.",
        )


def _actions_at_bounds(case: _Case) -> Iterator[Found]:
    share = case.data.get("actions_at_bounds")
    if share is not None and share > _MANY_AT_BOUNDS:
        yield (
            f"{100 * share:.0f}% of the numbers of the data's actions are at their bounds.",
            "A Normal around such means spends half its density outside: see that the bounds are right "
            "(dataset.action_low and dataset.action_high, or env.name) and the actions are not clipped on the way; if "
            "they are meant so, algorithm.policy=deterministic fits them, or discrete actions.",
        )


_PROBLEMS = {
    "missing_end": "Flag the ends of the episodes (timeouts, or episode_ids).",
    "jump": "Flag the ends of the episodes (timeouts, or episode_ids).",
    "terminal_at_limit": "Record ends by a time limit as timeouts.",
    "duplicate_rows": "Remove the copies: they weigh twice, and fall on both sides of a held-out split.",
    "constant_reward": "Record rewards that tell good actions from bad ones, or train algorithm=behaviour_cloning.",
    "returns_far_from_references": "Repair the rewards, or name the environment that the data come from (env.name).",
}


def _problem(kind: str) -> Callable[[_Case], Iterator[Found]]:
    def check(case: _Case) -> Iterator[Found]:
        for problem in case.data.get("problems", ()):
            if problem["kind"] == kind:
                advice = _PROBLEMS.get(kind, "Repair or remove these rows.")
                meaning = problem["meaning"]
                yield meaning, f"{advice} recipes/inspect_dataset.py names the rows of a file."

    return check


_OF_DATA: dict[str, Callable[[_Case], Iterator[Found]]] = {
    "discount": _discount,
    "actions_at_bounds": _actions_at_bounds,
    **{kind: _problem(kind) for kind in (*_PROBLEMS, "outlying_reward", "outlying_observation", "outlying_action")},
}
_OF_RUN: dict[str, Callable[[_Case], Iterator[Found]]] = {
    "exploding_q": _exploding_q,
    "constant_q": _constant_q,
    "weights_clipped": _weights_clipped,
    "few_weights": _few_weights,
    "policy_std_at_bound": _std_at_bound,
    "v_above_q": _v_above_q,
    "reward_scale": _reward_scale,
    "score_falls": _score_falls,
}
