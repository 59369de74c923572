"""Reward transforms of the paper's domains."""

from __future__ import annotations

from tensordict import TensorDict

from iql_torchrl.configuration.declaring import check_argument
from iql_torchrl.configuration.options import AlgorithmOptions
from iql_torchrl.data.transitions import episode_returns
from iql_torchrl.errors import ConfigurationError, DatasetError


def transform_rewards(transitions: TensorDict, transform: str) -> tuple[float, float]:
    """Transform ``("next", "reward")`` in place to ``scale * reward + shift``.

    Args:
        transitions: as :func:`iql_torchrl.load_transitions` returns them.
        transform: ``"return_range"`` (locomotion) multiplies by 1000 / (largest - smallest episode return), as the
            original code does over the same transitions; ``"minus_one"`` (AntMaze) subtracts 1; ``"none"``.

    Returns:
        scale and shift.

    Raises:
        ConfigurationError: an unknown transform.
        DatasetError: ``"return_range"`` on episodes that all have the same return.
    """
    try:
        check_argument(AlgorithmOptions, "reward_transform", transform, "algorithm.reward_transform")
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    scale, shift = 1.0, 0.0
    if transform == "return_range":
        returns = episode_returns(transitions)
        if returns.max() == returns.min():
            raise DatasetError(
                f"reward_transform=return_range needs episodes of different returns, but all {len(returns)} have "
                f"{returns[0]:g}; set algorithm.reward_transform=none."
            )
        scale = 1000.0 / (returns.max() - returns.min())
    elif transform == "minus_one":
        shift = -1.0
    transitions["next", "reward"].mul_(scale).add_(shift)
    return scale, shift
