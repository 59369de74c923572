"""CUDA graphs: a whole call captured once, and launched again without the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from iql_torchrl.training.branches import side_by_side

_WARM_UP_CALLS = 3


def resolve_cudagraphs(cudagraphs: bool | str, device: torch.device) -> bool:
    """Whether to capture; ``"auto"`` does on a GPU.

    Raises:
        ValueError: asked for on another device.
    """
    if cudagraphs == "auto":
        return device.type == "cuda"
    if cudagraphs and device.type != "cuda":
        raise ValueError(f"cudagraphs=true needs a GPU, but the networks are on {device}; use 'auto'.")
    return bool(cudagraphs)


class CapturedFunction:
    """A function of one tensor on a GPU as a CUDA graph.

    The first calls run as they are, on a stream of their own, which libraries use to set themselves up and a compiler
    to compile; then one is captured. Captured with ``torch.cuda.graph`` itself: tensordict's ``CudaGraphModule``
    synchronises the device at every call. Kernels that do not need each other's results become branches of the graph.

    Args:
        function: changes tensors in place and returns tensors by name; reads nothing from the device.
        compiled: whether some of its kernels are the compiler's, asked when it is captured.
    """

    def __init__(self, function: Callable[[Tensor], dict[str, Tensor]], compiled: Callable[[], bool]) -> None:
        self._function = function
        self._compiled = compiled
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._argument = torch.empty(0)
        self._losses: dict[str, Tensor] = {}

    def __call__(self, argument: Tensor) -> dict[str, Tensor]:
        self._calls += 1
        if self._calls <= _WARM_UP_CALLS:
            return self._on_another_stream(argument)
        if self._graph is None:
            self._argument = argument.clone()
            self._graph = self._capture()
        self._argument.copy_(argument)
        self._graph.replay()
        # Copies, because the next replay writes over what this one returned.
        names, values = zip(*self._losses.items(), strict=True)
        return dict(zip(names, torch.stack(values).unbind(), strict=True))

    def _capture(self) -> torch.cuda.CUDAGraph:
        with _new_graph() as graph, side_by_side() as launches:
            self._losses = self._function(self._argument)
        if self._compiled() and not launches.of_compiler:
            # A compiler that launches its kernels in a way unknown here: in the order of the calls, as they come.
            with _new_graph() as graph:
                self._losses = self._function(self._argument)
        return graph

    def _on_another_stream(self, argument: Tensor) -> dict[str, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            losses = self._function(argument)
        torch.cuda.current_stream().wait_stream(stream)
        return losses


@contextmanager
def _new_graph() -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is launched meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        yield graph
