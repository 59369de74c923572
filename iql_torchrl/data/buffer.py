"""The replay buffer, and the validation split."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import (
    ImmutableDatasetWriter,
    RandomSampler,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
    TensorStorage,
)

from iql_torchrl.data.log import ROWS_AT_A_TIME
from iql_torchrl.data.storage import Allocate
from iql_torchrl.errors import ConfigurationError, DatasetError


def make_buffer(
    transitions: TensorDict,
    *,
    batch_size: int = 256,
    replacement: bool = True,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    sampler: RandomSampler | None = None,
) -> TensorDictReplayBuffer:
    """A TorchRL replay buffer over the transitions, which it does not copy where they are on ``device`` already.

    Args:
        transitions: batch shape ``[N]``.
        batch_size: of a sample.
        replacement: draw uniformly (the paper), or go through shuffled passes (TorchRL's recipe).
        seed: gives the buffer a random generator of its own; ``None`` leaves it on the global one.
        device: where the storage lives and samples are drawn.
        sampler: draws the batches in place of that which ``replacement`` asks for.

    Raises:
        ConfigurationError: ``batch_size`` below 1 or above N.
    """
    if not 1 <= batch_size <= len(transitions):
        raise ConfigurationError(
            f"algorithm.batch_size must be between 1 and the number of transitions, {len(transitions)}; "
            f"got {batch_size}."
        )
    device = torch.device(device)
    # drop_last: a compiled step needs every batch to have the same size.
    buffer = TensorDictReplayBuffer(
        storage=TensorStorage(transitions.exclude("episode").to(device), device=device),
        sampler=sampler or (RandomSampler() if replacement else SamplerWithoutReplacement(drop_last=True)),
        writer=ImmutableDatasetWriter(),
        batch_size=batch_size,
    )
    if seed is not None:
        buffer.set_rng(torch.Generator(device).manual_seed(seed))
    return buffer


def split_episodes(
    transitions: TensorDict, fraction: float, seed: int = 0, *, allocate: Allocate = np.empty
) -> tuple[TensorDict, TensorDict]:
    """Training and validation transitions; whole episodes go one way or the other.

    Args:
        transitions: batch shape ``[N]``.
        fraction: of the episodes held out, rounded up to at least one, in (0, 1).
        seed: of the draw.
        allocate: where both parts are copied to.

    Raises:
        DatasetError: fewer than two episodes.
    """
    episodes = transitions["episode"].unique()
    if len(episodes) < 2:
        raise DatasetError(
            "a validation split needs at least two episodes but the data have one; set dataset.validation_fraction=0."
        )
    count = min(max(1, round(fraction * len(episodes))), len(episodes) - 1)
    order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed))
    held_out = torch.isin(transitions["episode"], episodes[order[:count]])
    return _take(transitions, ~held_out, allocate), _take(transitions, held_out, allocate)


def _take(transitions: TensorDict, mask: Tensor, allocate: Allocate) -> TensorDict:
    """Some rows, copied entry by entry and piece by piece: they may be larger than memory."""
    rows = mask.nonzero()[:, 0]

    def copy(tensor: Tensor) -> Tensor:
        found = allocate((len(rows), *tensor.shape[1:]), tensor.numpy().dtype)
        target = torch.from_numpy(found)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            stop = min(start + ROWS_AT_A_TIME, len(rows))
            torch.index_select(tensor, 0, rows[start:stop], out=target[start:stop])
        return target

    taken = transitions.apply(copy, batch_size=[len(rows)])
    assert isinstance(taken, TensorDict)
    return taken
