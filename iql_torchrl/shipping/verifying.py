"""Whether a function acts as the policy of a checkpoint does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from iql_torchrl.errors import ExportError
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.shipping.files import Act

TOLERANCE = 1e-5  # of half an action's range
_BATCH_SIZES = (1, 2, 7, 64, 301)
# Where an action hangs on the last bits of a sum, as between two large ones that cancel, every other order of that sum
# has another action, and so has the policy itself for an observation that differs by this much.
_ROUNDING = 2.0**-20
_NEIGHBOURS = 8
_ROUNDING_OF_Q = 2.0**-16


def largest_differences(act: Act, policy: Policy, observation_dim: int, seed: int = 0) -> dict[str, float]:
    """The largest difference between two actions, by kind of observation, over batches of 1 to 301 observations.

    Observations are zero, distributed as the data (as far as the policy's normaliser knows them: else standard
    Normals), and Normals of 1e3 and 1e6 times that.

    Args:
        act: observations ``[B, O]``, float32, and of a policy that chooses among draws the noise of these -> actions
            as of ``policy``.
        policy: what is right.
        observation_dim: O.
        seed: of the observations.

    Raises:
        ExportError: an action of another shape or type, no number, or farther away than 1e-5 of half its range, besides
            twice what the policy's own action changes by when the observation does by 1e-6 of itself, or when another
            of several draws is taken that are equally good but for rounding.
    """
    found: dict[str, float] = {}
    generator = np.random.default_rng(seed)
    half = ((policy.action_high - policy.action_low) / 2).numpy() if len(policy.action_low) else np.float32(1)
    for kind, observations in _observations(policy, observation_dim, generator):
        noise = None
        if policy.chooses and policy.chooser is not None:
            noise, _ = policy.chooser.noise_for(observations, 0)
        expected = policy(observations)
        given = act(observations) if noise is None else act(observations, noise.numpy())
        if given.shape != expected.shape or given.dtype != expected.dtype:
            raise ExportError(
                f"the exported policy's actions are {given.dtype} {list(given.shape)}, the checkpoint's "
                f"{expected.dtype} {list(expected.shape)}: it was not written."
            )
        difference = np.abs(given.astype(np.float64) - expected)
        own = np.zeros_like(difference)
        far = ~(difference <= TOLERANCE * half)  # true of NaN too
        rows = np.flatnonzero(far.reshape(len(far), -1).any(-1))
        for _ in range(_NEIGHBOURS):
            signs = generator.choice([-1, 1], observations.shape)
            if len(rows):
                neighbour = (observations * (1 + _ROUNDING * signs)).astype(np.float32)[rows]
                again = policy(neighbour) if noise is None else policy.decide(neighbour, noise[rows])
                own[rows] = np.maximum(own[rows], np.abs(again.astype(np.float64) - expected[rows]))
        if noise is not None and len(rows):
            own[rows] = np.maximum(own[rows], _between_equals(policy, observations[rows], noise[rows]))
        if not (difference <= TOLERANCE * half + 2 * own).all():  # nor where it is NaN
            raise ExportError(
                f"the exported policy's actions differ from the checkpoint's by up to {difference.max():.2g} on "
                f"observations of kind '{kind}', more than float32 rounds ({TOLERANCE:g} of half the actions' range): "
                "it was not written."
            )
        found[kind] = max(found.get(kind, 0.0), float(difference.max()))
    return found


@torch.no_grad()
def _between_equals(policy: Policy, observations: np.ndarray, noise: Tensor) -> np.ndarray:
    """How far a draw is from the chosen one whose Q is the same but for rounding, ``[B, A]``."""
    assert policy.chooser is not None
    rows = torch.from_numpy(observations)
    rows = rows if policy.normaliser is None else policy.normaliser(rows)
    actions, qvalue = policy.chooser.valued(rows, noise)
    best = qvalue.argmax(-1)
    equal = qvalue >= qvalue.amax(-1, keepdim=True) - _ROUNDING_OF_Q * qvalue.abs().amax(-1, keepdim=True)
    distance = (actions - actions[torch.arange(len(best)), best].unsqueeze(1)).abs() * equal.unsqueeze(-1)
    return (distance.amax(1) * (policy.action_high - policy.action_low) / 2).numpy()


def _observations(
    policy: Policy, observation_dim: int, generator: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    normaliser = policy.normaliser
    mean, std = (0.0, 1.0) if normaliser is None else (normaliser.mean.numpy(), normaliser.std.numpy())
    for size in _BATCH_SIZES:
        yield "zeros", np.zeros((size, observation_dim), np.float32)
        for kind, scale in (("data", 1.0), ("1e3", 1e3), ("1e6", 1e6)):
            normals = generator.normal(size=(size, observation_dim))
            yield kind, (mean + std * scale * normals).astype(np.float32)
