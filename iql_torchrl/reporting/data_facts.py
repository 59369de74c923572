"""What the training doctor needs to know of the data, from the transitions as they are trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from tensordict import TensorDict

from iql_torchrl.data.log import ROWS_AT_A_TIME, Log
from iql_torchrl.data.preparation import PreparedData
from iql_torchrl.data.transitions import as_array
from iql_torchrl.reporting.dataset_report import describe_log

# So many of the first transitions are looked at as the inspection report does, in about two seconds.
_INSPECTED = 1_000_000
# Float32 rounding of a bound.
_ROUNDING = 1e-5
# The findings of the inspection report that healthy data do not have, each with the share, of the rows or the episodes,
# and the number from which it counts; the report itself names every one. Few odd rows do little, and episodes that a
# demonstrator has cut, dimensions that never change and episodes of one step are as they should be in many data.
_COUNTS = {
    "missing_end": ("episodes", 0.05, 1),
    "jump": ("episodes", 0.05, 1),
    "terminal_at_limit": ("episodes", 0.9, 5),
    "duplicate_rows": ("rows", 0.3, 1),
    "constant_reward": ("rows", 0.0, 1),
    "outlying_reward": ("rows", 0.0, 1),
    "outlying_observation": ("rows", 0.0, 1),
    "outlying_action": ("rows", 0.0, 1),
    "returns_far_from_references": ("episodes", 0.0, 1),
}


def data_facts(data: PreparedData) -> dict[str, Any]:
    """For ``summary.json``, under ``data``: plain numbers, and the problems that the inspection report would name.

    Returns:
        ``episodes`` and ``episode_length`` (median, in transitions), ``terminated`` (share of the episodes that end by
        a terminal), ``largest_reward`` and ``root_mean_square_reward`` (as transformed for training),
        ``actions_at_bounds`` (share of the numbers; ``None`` of discrete actions), and ``problems``, each with
        ``kind``, ``count`` and ``meaning``; row numbers are those of the training transitions, rewards and actions as
        recorded. Of a run that goes on online there are no problems: its transitions have lost their episodes.
    """
    training = data.training
    largest = squares = at_bounds = terminated = 0.0
    bound = 1 - data.action_clip - _ROUNDING
    for piece in training.split(ROWS_AT_A_TIME):
        reward = piece["next", "reward"].double()
        largest = max(largest, float(reward.abs().max()))
        squares += float(reward.square().sum())
        terminated += float(piece["next", "terminated"].sum())
        if data.spaces.num_actions is None:
            at_bounds += float((piece["action"].abs() >= bound).double().mean(-1).sum())
    rows, length = len(training), float(data.lengths.mean())
    return {
        "episodes": len(data.lengths),
        "episode_length": float(np.median(data.lengths)),
        "terminated": min(1.0, terminated * length / rows),
        "largest_reward": largest,
        "root_mean_square_reward": (squares / rows) ** 0.5,
        "actions_at_bounds": at_bounds / rows if data.spaces.num_actions is None else None,
        "problems": _problems(data),
    }


def _problems(data: PreparedData) -> list[dict[str, Any]]:
    if "episode" not in data.training.keys():  # noqa: SIM118 (a TensorDict iterates over its rows)
        return []
    environment = data.environment
    comparable = environment is not None and environment.scores_data
    report = describe_log(
        _as_log(data.training[:_INSPECTED].cpu(), data),
        score=environment.score if environment is not None and comparable else None,
    )
    totals = {"rows": report["rows"], "episodes": report["episodes"]["count"]}
    found = []
    for one in report["findings"]:
        if one["kind"] in _COUNTS:
            of, share, fewest = _COUNTS[one["kind"]]
            if one["count"] >= max(fewest, share * totals[of]):
                found.append({key: one[key] for key in ("kind", "count", "meaning")})
    return found


def _as_log(training: TensorDict, data: PreparedData) -> Log:
    """Transitions as the log that they are: the row at a timeout, which the rule drops, is missing at every end."""
    episode, terminals = as_array(training, "episode"), as_array(training, ("next", "terminated"))[:, 0]
    last = np.append(episode[1:] != episode[:-1], as_array(training, ("next", "done"))[-1, 0])
    scale, shift = data.reward_transform
    actions = as_array(training, "action")
    if data.spaces.num_actions is None:  # within the bounds that an outlier has stretched, it looks like none
        low, high = data.spaces.action_low.numpy(), data.spaces.action_high.numpy()
        actions = low + (actions + 1) / 2 * (high - low)
    columns = {
        "observations": as_array(training, "observation"),
        "actions": actions,
        "rewards": (as_array(training, ("next", "reward"))[:, 0] - shift) / scale,
        "terminals": terminals,
        "timeouts": last,
        "next_observations": as_array(training, ("next", "observation")),
    }
    return Log(data.name, columns, own_next_observations=True, terminals_inside=True)
