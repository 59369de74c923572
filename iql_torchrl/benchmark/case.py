"""The setting in which rows are compared: networks, batch, precision, device, and the data, the same for every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from iql_torchrl.training.devices import resolve_stacked

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the rows of one group have in common.

    Attributes:
        action_dim: size of an action, or with ``discrete`` the number of actions.
        extraction: of ``algorithm.extraction``, with what is usual for it.
        seeds: how many runs are trained at once.
        stacked_seeds: of ``train.stacked_seeds``.
        updates_per_call: updates of a run that a call does.
        slowness: how many updates of two layers of 256 at batch 256 one update costs; as many fewer make a round.
        transitions: rows of random numbers.
        precision: of the matrix products.
        seed: of the random numbers.
    """

    name: str
    observation_dim: int = 17
    action_dim: int = 6
    hidden_dims: tuple[int, ...] = (256, 256)
    batch_size: int = 256
    layer_norm: bool = False
    discrete: bool = False
    extraction: str = "awr"
    seeds: int = 1
    stacked_seeds: bool | str = "auto"
    updates_per_call: int = 1
    slowness: int = 1
    transitions: int = 100_000
    precision: str = "float32"
    device: torch.device = _CPU
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and data."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def stacked(self) -> bool:
        """Whether several seeds are computed in one kernel."""
        return self.seeds > 1 and resolve_stacked(self.stacked_seeds, self.device)

    @property
    def label(self) -> str:
        """Name and sizes, for a title."""
        same = len(set(self.hidden_dims)) == 1
        hidden = f"{len(self.hidden_dims)} x {self.hidden_dims[0]}" if same else str(list(self.hidden_dims))
        dims = f"{self.observation_dim}/{self.action_dim}" + (" actions" if self.discrete else "")
        sizes = [dims, hidden, f"batch {self.batch_size}"]
        sizes += ["layer norm"] if self.layer_norm else []
        sizes += [self.extraction] if self.extraction not in ("awr", self.name) else []
        how = "stacked" if self.stacked else "one after another"
        sizes += [f"{self.seeds} seeds {how}"] if self.seeds > 1 else []
        sizes += [f"{self.updates_per_call} updates a call"] if self.updates_per_call > 1 else []
        return f"{self.name}: {', '.join(sizes)}"

    def random_transitions(self) -> TensorDict:
        """Transitions ``[transitions]`` of random numbers, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        count = self.transitions

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        flags = torch.zeros(count, 1, dtype=torch.bool)
        if self.discrete:
            action = torch.randint(self.action_dim, (count,), generator=generator)
        else:
            action = normal(count, self.action_dim).tanh() * 0.99
        return TensorDict(
            {
                "observation": normal(count, self.observation_dim),
                "action": action,
                "episode": torch.zeros(count, dtype=torch.int64),
                "next": {
                    "observation": normal(count, self.observation_dim),
                    "reward": normal(count, 1),
                    "done": flags,
                    "terminated": flags.clone(),
                    "truncated": flags.clone(),
                },
            },
            batch_size=[count],
        )


@dataclass(frozen=True)
class Row:
    """Something to time.

    Attributes:
        implementation, mode: its name.
        order: ``"joint"`` or ``"paper"``, whose matrix products it is compared with.
        build: makes the call that is timed; whatever it raises is reported and stops no other row.
        updates: that a call does, of all runs together.
    """

    implementation: str
    mode: str
    order: str
    build: Callable[[], Callable[[], object]]
    updates: int = 1
