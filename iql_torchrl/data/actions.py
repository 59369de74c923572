"""Dataset actions rescaled to the [-1, 1] box that policies and critics see."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from iql_torchrl.errors import DatasetError

# Float32 rounding of a bound, and of a bound that went through a rescaling once.
_TOLERANCE = 1e-5


def normalise_actions(
    transitions: TensorDict | dict[NestedKey, Tensor], low: Tensor, high: Tensor, *, clip: float = 1e-5
) -> None:
    """Rescale ``action`` in place from [low, high] to [-1, 1] and clip it to +-(1 - clip).

    The clip is the original code's: it keeps squashed policies' log-probabilities finite.

    Args:
        transitions: as :func:`iql_torchrl.load_transitions` returns them.
        low, high: bounds of the action space, finite, shape ``[A]``.
        clip: 0 keeps the bounds themselves.

    Raises:
        DatasetError: bounds of another size, not finite or not ordered, or an action outside them by more than
            rounding.
    """
    action = transitions["action"]
    if low.shape != action.shape[1:] or high.shape != action.shape[1:]:
        raise DatasetError(
            f"the data's actions have {action.shape[1]} dimensions but the action space has {low.numel()}; "
            "the environment is not the one that the data come from."
        )
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low < high)).all()):
        raise DatasetError(f"the action space must have finite, ordered bounds, got {low.tolist()} to {high.tolist()}.")
    low, high = low.to(action.dtype), high.to(action.dtype)
    if not bool((low == -1).all() and (high == 1).all()):  # which the arithmetic would leave off by rounding
        action.sub_(low).mul_(2 / (high - low)).sub_(1)
    if outside := first_outside(action):
        row, column, count = outside
        value = float((action[row, column] + 1) / 2 * (high[column] - low[column]) + low[column])
        raise DatasetError(
            f"action {value:g} in transition {row}, dimension {column}, lies outside the action space "
            f"[{float(low[column]):g}, {float(high[column]):g}] ({count} such transitions); "
            "clip the data, or name the environment that they come from, or without one set dataset.action_low and "
            "dataset.action_high."
        )
    action.clamp_(clip - 1, 1 - clip)


def first_outside(action: Tensor) -> tuple[int, int, int] | None:
    """Row and dimension of the first action outside [-1, 1] by more than rounding, and how many rows have one.

    Args:
        action: ``[N, A]``.
    """
    # The extremes tell without a mask of the data's size.
    if not len(action) or not bool((torch.stack(action.aminmax(dim=0)).abs() > 1 + _TOLERANCE).any()):
        return None
    outside = action.abs() > 1 + _TOLERANCE
    row, column = (int(index) for index in outside.nonzero()[0])
    return row, column, int(outside.any(-1).sum())


def action_bounds(transitions: TensorDict) -> tuple[Tensor, Tensor]:
    """Bounds for data without an environment: [-1, 1] where they fit, else each dimension's own range."""
    low, high = transitions["action"].aminmax(dim=0)
    if bool((low >= -1).all() and (high <= 1).all()):
        return -torch.ones_like(low), torch.ones_like(high)
    constant = low == high  # a dimension that never moves has no range of its own
    return torch.where(constant, low - 1, low), torch.where(constant, high + 1, high)
