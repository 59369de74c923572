"""Kernels of a CUDA graph side by side where none needs another's result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Range = tuple[int, int, int]
"""Where a tensor lies: its storage, and first and last byte."""

_MOST_BRANCHES = 16


class Schedule:
    """Which branch each of a sequence of launches goes to, and which earlier ones it has to wait for.

    Two launches keep their order where one writes what the other reads or writes, and need not elsewhere.

    Args:
        most: how many branches there may be.
    """

    def __init__(self, most: int = _MOST_BRANCHES) -> None:
        self._most = most
        self._accesses: dict[int, list[tuple[int, int, int, bool]]] = defaultdict(list)
        self._before: list[int] = []  # of each launch, those that end before it begins: a bit each
        self._last: list[int] = []  # of each branch

    def add(self, reads: Sequence[Range], writes: Sequence[Range]) -> tuple[int, list[int]]:
        """The next launch.

        Returns:
            its branch, and the launches, by number, that it waits for besides its predecessor there.
        """
        launch = len(self._before)
        needed = self._conflicts(reads, False) | self._conflicts(writes, True)
        waits = [one for one in sorted(needed) if not any(self._before[other] >> one & 1 for other in needed)]
        before = 0
        for one in waits:
            before |= self._before[one] | 1 << one
        branch = self._branch(waits, before)
        if branch < len(self._last):
            last = self._last[branch]
            before |= self._before[last] | 1 << last
            waits = [one for one in waits if one != last and not self._before[last] >> one & 1]
            self._last[branch] = launch
        else:
            self._last.append(launch)
        self._before.append(before)
        self._access(reads, False)
        self.wrote(writes)
        return branch, waits

    def wrote(self, ranges: Iterable[Range]) -> None:
        """What the latest launch has written besides."""
        self._access(ranges, True)

    def _access(self, ranges: Iterable[Range], written: bool) -> None:
        for storage, start, end in ranges:
            found = self._accesses[storage]
            if written:  # which waits for what it writes over, and later ones for it
                found = [one for one in found if one[0] < start or end < one[1]]
            self._accesses[storage] = [*found, (start, end, len(self._before) - 1, written)]

    def _conflicts(self, ranges: Iterable[Range], written: bool) -> set[int]:
        return {
            launch
            for storage, start, end in ranges
            for other_start, other_end, launch, other_written in self._accesses[storage]
            if (written or other_written) and start < other_end and other_start < end
        }

    def _branch(self, waits: Sequence[int], before: int) -> int:
        """One that ends with what is waited for; else one that is behind; else another."""
        for one in reversed(waits):
            if one in self._last:
                return self._last.index(one)
        behind = [branch for branch, last in enumerate(self._last) if before >> last & 1]
        if behind:
            return behind[0]
        if len(self._last) < self._most:
            return len(self._last)
        return min(range(self._most), key=self._last.__getitem__)


@contextmanager
def side_by_side() -> Iterator[Launches]:
    """While a CUDA graph is captured: launches become branches of it, ordered by the memory that they read and write.

    The kernels and what each computes stay the same, and so do results, bit for bit. Launches are those of PyTorch's
    operators and of the compiler's Triton kernels, which name the pointers that they read ``in_ptr``, those that they
    write ``out_ptr``, and those of both ``in_out_ptr``.

    Yields:
        what has been launched, when it is over.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    launches = Launches()
    run = CachingAutotuner.run

    def run_beside(self: Any, *args: Any, stream: int, **kwargs: Any) -> Any:
        launches.of_compiler += 1
        names = self.fn.arg_names
        tensors = [(name, arg) for name, arg in zip(names, args, strict=False) if isinstance(arg, Tensor)]
        return launches(
            [arg for name, arg in tensors if not name.startswith("out_ptr")],
            [arg for name, arg in tensors if not name.startswith("in_ptr")],
            lambda: run(self, *args, stream=torch.cuda.current_stream().cuda_stream, **kwargs),
        )

    CachingAutotuner.run = run_beside
    try:
        with _Operators(launches):
            yield launches
    finally:
        CachingAutotuner.run = run
        launches.join()


class _Operators(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_cuda]
        if func.is_view or func in _ALLOCATIONS or not (given or _on_gpu(kwargs)):
            return func(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        written = [
            leaf
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(named.get(argument.name))
            if isinstance(leaf, Tensor)
        ]
        return self._launches(given, written, lambda: func(*args, **kwargs))


_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten._unsafe_view.default,
}


def _on_gpu(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cuda"


class Launches:
    """Launches on streams that begin where the capturing one is now, until :meth:`join`.

    Attributes:
        of_compiler: how many were the compiler's kernels.
    """

    def __init__(self) -> None:
        self.of_compiler = 0
        self._schedule = Schedule()
        self._main = torch.cuda.current_stream()
        self._start = torch.cuda.Event()
        self._start.record(self._main)
        self._streams: list[torch.cuda.Stream] = []
        self._ends: list[torch.cuda.Event] = []
        # Memory that is given back here would be given out again, and its new use would wait for its last.
        self._kept: list[Any] = []

    def __call__(self, reads: Sequence[Tensor], writes: Sequence[Tensor], launch: Callable[[], Any]) -> Any:
        branch, waits = self._schedule.add([_range(one) for one in reads], [_range(one) for one in writes])
        if branch == len(self._streams):
            self._streams.append(torch.cuda.Stream())
            self._streams[branch].wait_event(self._start)
        stream = self._streams[branch]
        for one in waits:
            stream.wait_event(self._ends[one])
        with torch.cuda.stream(stream):
            result = launch()
        end = torch.cuda.Event()
        end.record(stream)
        self._ends.append(end)
        self._kept += [reads, writes, result]
        self._schedule.wrote(
            map(_range, (one for one in tree_leaves(result) if isinstance(one, Tensor) and one.is_cuda))
        )
        return result

    def join(self) -> None:
        """The capturing stream goes on when all branches have ended."""
        for stream in self._streams:
            self._main.wait_stream(stream)


def _range(tensor: Tensor) -> Range:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    bytes_ = extent * tensor.element_size() if tensor.numel() else 0
    return tensor.untyped_storage().data_ptr(), start, start + bytes_
