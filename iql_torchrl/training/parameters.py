"""The parameters of a network as one flat tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn


class FlatParameters:
    """The parameters of one network, of one run or several, moved into one flat tensor, of which they become views.

    Args:
        runs: the parameters of each run, of one structure.
        stacked: keep a leading dimension for the runs, ``[runs, P]`` instead of ``[P]``.
        transposed: store every weight transposed, ``[in, out]``, and not only those of stacked critics: oneDNN's
            products want rows that they go through one by one.
    """

    def __init__(self, runs: Sequence[TensorDictBase], *, stacked: bool, transposed: bool = False) -> None:
        self._batch_size = runs[0].batch_size
        # Stacked critic weights [N, out, in] always are, as batched products return their gradients.
        self._transposed = (3, len(self._batch_size) + 2) if transposed else (3,)
        leaves = [(key if isinstance(key, tuple) else (key,), leaf) for key, leaf in runs[0].items(True, True)]
        self._layout = [(key, leaf.shape) for key, leaf in leaves]
        trained = any(leaf.requires_grad for _, leaf in leaves)
        rows = [
            torch.cat([self._as_stored(run.get(key).detach()).reshape(-1) for key, _ in self._layout]) for run in runs
        ]
        self.flat = (torch.stack(rows) if stacked else rows[0]).requires_grad_(trained)
        for run, row in zip(runs, self.flat.detach() if stacked else [self.flat.detach()], strict=True):
            for (key, _), view in zip(self._layout, self._views(row), strict=True):
                run.get(key).data = view

    def unpack(self, flat: Tensor) -> TensorDictBase:
        """Views of one run's flat tensor ``[P]``, through which gradients reach it, in the structure of the network."""
        out = TensorDict({}, batch_size=self._batch_size)
        for (key, _), view in zip(self._layout, self._views(flat), strict=True):
            out.set(key, view)  # pyright: ignore[reportArgumentType]
        return out

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([shape.numel() for _, shape in self._layout])
        return [
            self._as_stored(piece.view(self._as_stored(torch.empty(shape, device="meta")).shape))
            for piece, (_, shape) in zip(pieces, self._layout, strict=True)
        ]

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2) if weight.ndim in self._transposed else weight


def refuse_different_architectures(children: Sequence[Mapping[str, Any]]) -> None:
    """Refuse losses, given by their named children, whose parameters differ in name, shape or dtype.

    Raises:
        ValueError: naming the first difference.
    """

    def shapes(child: Mapping[str, Any]) -> dict[str, Any]:
        return {
            f"{name}, {key}": (tuple(leaf.shape), leaf.dtype)
            for name, params in child.items()
            if name.endswith("_params")
            for key, leaf in params.items(True, True)
        }

    first = shapes(children[0])
    for run, child in enumerate(children[1:], start=1):
        different = sorted(name for name, shape in shapes(child).items() ^ first.items())
        if different:
            raise ValueError(f"loss {run} has other networks than loss 0: {different[0]} differs.")


def refuse_shared_parameters(loss: nn.Module, networks: Sequence[TensorDictBase]) -> None:
    """Refuse a loss that has parameters in common between its networks, or buffers.

    Raises:
        ValueError: with the numbers that tell.
    """
    expected = sum(leaf.numel() for params in networks for leaf in params.values(True, True))
    found = sum(parameter.numel() for parameter in loss.parameters())
    if expected != found:
        raise ValueError(
            f"the networks share parameters, or have buffers ({expected} numbers in the three networks, {found} "
            "distinct parameters in the loss); TrainingStep needs networks that share none and have no buffers: "
            "train these with your own loop around IQLLoss."
        )
