"""D4RL's normalised score."""

from __future__ import annotations

import re

# d4rl/infos.py: the returns of a random and of an expert policy, the same for every dataset and version of a task.
_REFERENCE_RETURNS = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
    "pen": (96.262799, 3076.833),
    "hammer": (-274.856578, 12794.134825),
    "door": (-56.512833, 2880.569309),
    "relocate": (-6.425911, 4233.877797),
}
# "hopper-medium-v2", "Hopper-v5" and "AdroitHandPen-v1": the task comes first, and no other suite's name before it.
_NAME = re.compile(r"(?:adroithand(?=pen|hammer|door|relocate))?([a-z0-9]+)-(?:[a-z0-9-]+-)?v\d+")


def reference_returns(name: str) -> tuple[float, float] | None:
    """Random and expert return of a dataset or environment (``"hopper-medium-v2"``, ``"Hopper-v5"``), or ``None``.

    ``None`` says that no normalised score is comparable with D4RL's.
    """
    match = _NAME.fullmatch(name.lower())
    return _REFERENCE_RETURNS.get(match[1]) if match else None


def normalised_score(name: str | tuple[float, float], episode_return: float) -> float | None:
    """100 * (return - random) / (expert - random), or ``None`` where D4RL has no reference.

    Args:
        name: of a dataset or environment, or the random and expert return themselves.
        episode_return: undiscounted.
    """
    references = reference_returns(name) if isinstance(name, str) else name
    if references is None:
        return None
    random, expert = references
    return 100.0 * (episode_return - random) / (expert - random)
