"""Batches of data that lie elsewhere than on the training device: gathered there, copied here."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor


class Staging:
    """Room on the training device for the batches of one call, always the same: a recorded or captured update finds
    each new batch where the last one was.

    Args:
        data: on another device, in memory or mapped files.
        device: the training device.
    """

    @classmethod
    def where_needed(cls, data: TensorDictBase, device: torch.device) -> Staging | None:
        """``None`` where the data are on the training device.

        Raises:
            ValueError: they are on another GPU.
        """
        place = _device_of(data)
        if place == device:
            return None
        if place.type == "cuda":
            raise ValueError(
                f"the buffer's data lie on {place}, the networks on {device}; put them on one, or on the CPU."
            )
        return cls(data, device)

    def __init__(self, data: TensorDictBase, device: torch.device) -> None:
        self._data, self._device = data, device
        self._host: TensorDict | None = None
        self._staged: TensorDict | None = None
        self._copied: torch.cuda.Event | None = None

    def __call__(self, index: Tensor) -> tuple[TensorDict, Tensor]:
        """Copy the rows of several batches.

        Args:
            index: rows of the data, ``[updates, B]`` or ``[updates, runs, B]``.

        Returns:
            their content on the device, and the rows of each batch in it, shaped as ``index``.
        """
        rows = index.reshape(-1)
        if self._host is None or self._staged is None:
            pinned = self._device.type == "cuda"
            self._host = _room(self._data, len(rows), torch.device("cpu"), pinned)
            self._staged = _room(self._data, len(rows), self._device, False)
        if self._copied is not None:
            self._copied.synchronize()  # else the copy under way would read what is written here
        for key, target in self._host.items(True, True):
            torch.index_select(self._data.get(key), 0, rows, out=target)
            self._staged.get(key).copy_(target, non_blocking=True)
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))
        return self._staged, torch.arange(len(rows), device=self._device).reshape(index.shape)


def _room(data: TensorDictBase, rows: int, device: torch.device, pinned: bool) -> TensorDict:
    def empty(tensor: Tensor) -> Tensor:
        return torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=device, pin_memory=pinned)

    found = data.apply(empty, batch_size=[rows], device=device)
    assert isinstance(found, TensorDict)
    return found


def _device_of(data: TensorDictBase) -> torch.device:
    return next(iter(data.values(True, True))).device
