"""Transitions that are added to a dataset while it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import RandomSampler, Storage

from iql_torchrl.data.storage import Allocate
from iql_torchrl.errors import ConfigurationError


@dataclass(frozen=True)
class Draws:
    """How a batch is drawn from the dataset and what was added to it.

    Args:
        offline_fraction: share of each batch that is from the dataset; ``None`` draws uniformly from both.
        anneal_to: the share once all transitions have been added, linear up to there; ``None`` keeps it.
    """

    offline_fraction: float | None = None
    anneal_to: float | None = None

    def offline_rows(self, batch_size: int, progress: float) -> int | None:
        """How many rows of a batch are from the dataset, with that share of all transitions added; ``None`` if any."""
        if self.offline_fraction is None:
            return None
        end = self.offline_fraction if self.anneal_to is None else self.anneal_to
        return round((self.offline_fraction + (end - self.offline_fraction) * progress) * batch_size)


class OnlineSampler(RandomSampler):
    """Draws, with replacement, from a dataset and the transitions that one run has added behind it.

    TorchRL's ``OfflineToOnlineReplayBuffer`` concatenates batches of two buffers: it has no rows that a compiled update
    could gather by itself, nor uniform draws from both.

    Args:
        offline: transitions of the dataset, the first rows of the storage.
        start: first row of the run's own.
        room: how many rows it has.
        draws: shares of the batch.
    """

    def __init__(self, offline: int, start: int, room: int, draws: Draws) -> None:
        super().__init__()
        self.offline, self.start, self.room, self.draws = offline, start, room, draws
        self.added = 0

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict]:
        """Rows ``[batch_size]``; of the dataset alone before anything was added."""

        def draw(count: int, size: int) -> Tensor:
            return torch.randint(0, count, (size,), generator=storage._rng, device=getattr(storage, "device", None))

        offline = self.draws.offline_rows(batch_size, self.added / self.room)
        if not self.added:
            return draw(self.offline, batch_size), {}
        if offline is None:
            rows = draw(self.offline + self.added, batch_size)
            return torch.where(rows < self.offline, rows, rows + (self.start - self.offline)), {}
        own = draw(self.added, batch_size - offline) + self.start
        return (torch.cat([draw(self.offline, offline), own]) if offline else own), {}

    def state_dict(self) -> dict[str, int]:
        """How many transitions have been added."""
        return {"added": self.added}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take :meth:`state_dict` back, whose transitions must lie in the storage again."""
        self.added = state_dict.get("added", 0)


def with_room(transitions: TensorDict, rows: int, allocate: Allocate = np.empty) -> TensorDict:
    """The transitions with room for ``rows`` more behind them, in the places that ``allocate`` gives.

    Raises:
        ConfigurationError: both together do not fit into the memory that is available.
    """
    transitions = transitions.exclude("episode")
    tensors = [transitions.get(key) for key in transitions.keys(True, True)]
    size = sum(tensor[:1].numel() * tensor.element_size() for tensor in tensors)
    needed, available = size * (len(transitions) + rows), _available_memory()
    if allocate is np.empty and available is not None and needed > available:
        raise ConfigurationError(
            f"online.steps asks for room for {rows:,} transitions beside {len(transitions):,} of the dataset, "
            f"{needed / 1e9:.1f} GB in all, but {available / 1e9:.1f} GB of memory are available; lower online.steps "
            "or train.num_seeds, or set dataset.storage=memmap."
        )

    def enlarged(tensor: Tensor) -> Tensor:
        found = torch.from_numpy(allocate((len(transitions) + rows, *tensor.shape[1:]), tensor.numpy().dtype))
        found[: len(transitions)] = tensor
        return found

    found = transitions.apply(enlarged, batch_size=[len(transitions) + rows])
    assert isinstance(found, TensorDict)
    return found


def _available_memory() -> int | None:
    """Bytes that can be had without swapping; ``None`` where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
