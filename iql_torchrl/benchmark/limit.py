"""The limit: the matrix products that an update cannot do without, and nothing else, by whatever is fastest for each.

There is no bias, activation, loss, optimizer or sampling. On a GPU they follow each other in one CUDA graph; an update
that has several of them at work at once can be faster. A forward pass multiplies once a layer, a backward pass twice
but once in the first layer, whose input needs no gradient.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from iql_torchrl.benchmark.case import Case, Row
from iql_torchrl.benchmark.timing import milliseconds
from iql_torchrl.training.products import multiply, multiply_all, why_not
from iql_torchrl.training.tensor_cores import launch

Multiply = Callable[[Tensor, Tensor, Tensor], object]
# Of :func:`multiplications`, those that multiply batches.
_OF_BATCHES = ("bmm", "tensor cores")
Operands = tuple[Tensor, Tensor, Tensor]

# Passes that depend on no other's result may be done together. V(s) and V(s') have the weights in common, the two
# critics and their targets the input of the first layer. The paper's order has V(s) once more, before V's update.
# Only advantages need V(s) after V's update.
_FORWARDS = {
    "joint": ("vv", "qqqq", "a"),
    "paper": ("v", "vv", "qqqq", "a"),
}
_FORWARDS_WITHOUT_ADVANTAGES = {**_FORWARDS, "paper": ("v", "v", "qqqq", "a")}
_BACKWARDS = ("v", "qq", "a")


@dataclass(frozen=True)
class Product:
    """``[rows, inner] @ [inner, columns]``, ``copies`` times.

    Attributes:
        shared: the operand that all copies have in common, ``"left"``, ``"right"`` or none: copies can be one product
            with more columns, or with more rows.
    """

    rows: int
    inner: int
    columns: int
    copies: int = 1
    shared: str = ""

    @property
    def flops(self) -> int:
        """Floating-point operations of all copies."""
        return 2 * self.rows * self.inner * self.columns * self.copies


@dataclass(frozen=True)
class _Way:
    """A product done ``times`` times over in one way.

    Attributes:
        batch: how many products a call does as a batch; 0: one, of matrices.
        column_major: whether the left and the right operand lie in memory column by column.
    """

    name: str
    batch: int
    rows: int
    inner: int
    columns: int
    column_major: tuple[bool, bool]
    times: int


class MatrixProducts:
    """The products of an update of all seeds, each in the way that a short measurement finds fastest for its shape.

    Attributes:
        updates: that a call does, one a seed.
        flops: floating-point operations of a call.
        operands: left, right and result of each product or batch of products.
        shares: of these, by implementation.
    """

    def __init__(self, case: Case, order: str) -> None:
        self.updates = case.seeds
        self.flops = case.seeds * sum(product.flops for product in products(case, order))
        dtype = torch.bfloat16 if case.precision == "bfloat16" else case.dtype
        self._calls: list[Callable[[], object]] = []
        flops: Counter[str] = Counter()
        prepared: list[tuple[str, Operands]] = []
        self.operands: list[Operands] = []
        for product in products(case, order):
            way = _fastest(product, case.seeds, case.device, dtype)
            flops[way.name] += product.flops * case.seeds
            prepared += [(way.name, _operands(way, case.device, dtype)) for _ in range(way.times)]
        for name, group in groupby(prepared, key=lambda one: one[0]):
            operands = [one[1] for one in group]
            self.operands += operands
            multiply = _implementations(case.device, dtype)[name]
            self._calls += (
                [multiply_all(operands)] if name == "oneDNN" else [partial(multiply, *one) for one in operands]
            )
        if case.device.type == "cuda":
            self._calls = [_replay(self._calls)]
        self.shares = {name: count / self.flops for name, count in flops.most_common()}

    def __call__(self) -> None:
        for call in self._calls:
            call()


def limit_row(case: Case, order: str) -> Row:
    """:class:`MatrixProducts` as a row, in ``order``, ``"joint"`` or ``"paper"``."""
    return Row("matrix products alone", order, order, lambda: MatrixProducts(case, order), case.seeds)


def products(case: Case, order: str) -> list[Product]:
    """Those of an update of one seed."""
    batch, found = case.batch_size, []
    of_q = ("qq",) if case.extraction == "ddpgbc" else ()  # at the policy's action
    forwards = _FORWARDS if case.extraction == "awr" else _FORWARDS_WITHOUT_ADVANTAGES
    for group in (*forwards[order], *of_q):
        for index, layer in enumerate(_layers(case, group[0])):
            shared = "right" if group[0] == "v" else "left" if index == 0 else ""
            copies = len(group)
            found.append(Product(batch, layer.inputs, layer.outputs, copies, shared if copies > 1 else ""))
    for group in _BACKWARDS:
        for index, layer in enumerate(_layers(case, group[0])):
            together = len(group) > 1 and index == 0
            found.append(Product(layer.outputs, batch, layer.inputs, len(group), "right" if together else ""))
            if layer.learnt_inputs:
                found.append(Product(batch, layer.outputs, layer.learnt_inputs, len(group)))
    for group in of_q:  # of the critics' inputs alone, and of these the action
        for layer in _layers(case, group[0]):
            found.append(Product(batch, layer.outputs, layer.learnt_inputs or case.action_dim, len(group)))
    return found


def multiplications(device: torch.device, dtype: torch.dtype) -> dict[str, Multiply]:
    """The implementations of ``out = left @ right`` that there are, by name.

    One may return the result in memory of its own instead.
    """
    found: dict[str, Multiply] = {"mm": _mm}
    if not why_not(device, dtype, "tensor_cores"):
        found["tensor cores"] = _on_tensor_cores
    if device.type == "cpu" and dtype == torch.float32:
        if torch.backends.mkldnn.is_available():
            found["mkldnn linear"] = _linear
            found["mkldnn linear, transposed"] = _linear_transposed
        if not why_not(device, dtype):
            found["oneDNN"] = multiply
    return found


def _implementations(device: torch.device, dtype: torch.dtype) -> dict[str, Multiply]:
    return multiplications(device, dtype) | {"bmm": _bmm}


def _mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.mm(left, right, out=out)


def _bmm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.bmm(left, right, out=out)


def _on_tensor_cores(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return launch(left, right, None, None, False)


def _linear(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], "")


def _linear_transposed(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(right.mT, left, None, "none", [], "").mT


class _Layer(NamedTuple):
    """Sizes of a linear layer, and how many of its inputs need a gradient."""

    inputs: int
    outputs: int
    learnt_inputs: int


def _layers(case: Case, network: str) -> list[_Layer]:
    """The linear layers of V, a critic or the policy."""
    observations, actions = case.observation_dim, case.action_dim
    if network == "a" and case.extraction == "diffusion":
        width = case.hidden_dims[-1]
        block = [_Layer(width, 4 * width, width), _Layer(4 * width, width, 4 * width)]
        time = [_Layer(64, 128, 64), _Layer(128, 128, 128)]
        return [*time, _Layer(actions + observations + 128, width, 128), *block * 3, _Layer(width, actions, width)]
    reads_action = network == "q" and not case.discrete
    inputs = observations + (actions if reads_action else 0)
    if network == "a" and case.extraction == "flow":
        inputs += actions + 1
    outputs = actions if network == "a" or (network == "q" and case.discrete) else 1
    sizes = list(itertools.pairwise([inputs, *case.hidden_dims, outputs]))
    return [_Layer(*size, learnt_inputs=size[0] if index else 0) for index, size in enumerate(sizes)]


def _ways(product: Product, seeds: int, names: Iterable[str]) -> Iterator[_Way]:
    rows, inner, columns, copies = product.rows, product.inner, product.columns, product.copies
    layouts = [(left, right) for left in (False, True) for right in (False, True)]
    for layout in layouts:
        for together in _divisors(copies) if product.shared else [1]:
            wider = (rows, inner, columns * together) if product.shared == "left" else (rows * together, inner, columns)
            for name in names:
                if name != "bmm":
                    yield _Way(name, 0, *wider, layout, copies // together * seeds)
        for together in _divisors(copies * seeds)[1:]:
            for name in names:
                if name in _OF_BATCHES:
                    yield _Way(name, together, rows, inner, columns, layout, copies * seeds // together)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


@cache
def _fastest(product: Product, seeds: int, device: torch.device, dtype: torch.dtype) -> _Way:
    calls: dict[_Way, Callable[[], object]] = {}
    times: dict[_Way, float] = {}
    for way in _ways(product, seeds, _implementations(device, dtype)):
        call = _prepared(way, device, dtype)
        try:
            milliseconds(call, 1, device)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            continue  # an implementation need not take every layout
        calls[way], times[way] = call, way.times * milliseconds(call, 1, device)
    for _ in range(5):
        best = min(times.values())
        for way in [way for way, time in times.items() if time < 1.5 * best]:
            times[way] = min(times[way], way.times * milliseconds(calls[way], 3, device))
    return min(times, key=times.__getitem__)


def _prepared(way: _Way, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A call in memory of its own; on a GPU of ten, which take longer than to launch them."""
    call = partial(_implementations(device, dtype)[way.name], *_operands(way, device, dtype))
    return _replay([call] * 10) if device.type == "cuda" else call


def _replay(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """Calls on a GPU, one after the other, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # where libraries set themselves up
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _operands(way: _Way, device: torch.device, dtype: torch.dtype) -> Operands:
    batch = [way.batch] if way.batch else []

    def random(rows: int, columns: int, column_major: bool) -> Tensor:
        if column_major:
            return torch.randn(*batch, columns, rows, device=device, dtype=dtype).mT
        return torch.randn(*batch, rows, columns, device=device, dtype=dtype)

    left = random(way.rows, way.inner, way.column_major[0])
    right = random(way.inner, way.columns, way.column_major[1])
    return left, right, random(way.rows, way.columns, False)
