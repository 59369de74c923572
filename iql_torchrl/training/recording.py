"""A function of tensors recorded once as the kernels that it calls, and replayed without the Python around them."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from iql_torchrl.training.products import use_in_recording
from iql_torchrl.training.tensor_cores import use_tensor_cores

Slot = tuple[MutableMapping[str, Any], str]

# Tracers and random generators belong to the process: a thread that records or compiles puts the generators back as
# they were before, which must not fall between another's seeding and drawing. One at a time does any of it.
ONE_THREAD = threading.RLock()

_aten = torch.ops.aten
# Nothing is differentiated when a recording is replayed.
_NO_EFFECT = {_aten.detach.default, _aten.alias.default}
_SAME_SHAPE = {_aten.view.default, _aten._unsafe_view.default, _aten.expand.default}
# The same kernels through PyTorch's own bindings, which parse their arguments in half the time of torch.ops.
_BINDINGS = {
    overload: getattr(torch, name)
    for name in ("mm", "bmm", "addmm", "relu", "tanh", "exp", "neg", "log")
    for overload in (getattr(_aten, name).default,)
} | {getattr(_aten, name).Tensor: getattr(torch, name) for name in ("mul", "sub", "add", "div")}
_IN_PLACE = {_aten.relu.default: torch.relu_, _aten.tanh.default: torch.tanh_}


def record(
    function: Callable[[Tensor], dict[str, Tensor]], example: Tensor, slots: Sequence[Slot], products: str = "mkl"
) -> Recording:
    """Record what ``function`` does, gradients and changes in place included.

    The eager update spends most of its time between kernels: TensorDict lookups, ``vmap``, autograd's bookkeeping,
    views of parameters. A recording calls the same kernels in the same order, so that its results are the same bit for
    bit, and compiles nothing. What Python decides while it is recorded is decided once; a decision that depends on a
    tensor's content cannot be recorded.

    Args:
        function: of one tensor; returns tensors by name.
        example: an argument of the shape and dtype of all later ones.
        slots: mapping and key of every tensor that ``function`` reads or changes and whose content may change between
            calls. While recording, clones stand there: nothing is changed.
        products: of :func:`iql_torchrl.training.products.resolve_products`.

    Raises:
        Exception: whatever ``make_fx`` raises for a function that cannot be recorded.
    """
    graph, tensors, names = trace(function, example, slots)
    draws = draws_random_numbers(graph)
    remove_what_has_no_effect(graph)
    if products == "tensor_cores":
        use_tensor_cores(graph)
    views = _view_once(graph)
    _overwrite_temporaries(graph)
    if products == "onednn":
        use_in_recording(graph.graph)
    for node in graph.graph.nodes:
        if node.target in _BINDINGS and not node.kwargs:
            node.target = _BINDINGS[node.target]
    graph.recompile()
    return Recording(graph.forward, tensors, names, views, draws)


def trace(
    function: Callable[[Tensor], dict[str, Tensor]], example: Tensor, slots: Sequence[Slot]
) -> tuple[GraphModule, list[Tensor], list[str]]:
    """What :func:`record` and the compiler start from.

    Returns:
        the kernels that ``function`` calls, as a graph of its argument and the tensors in ``slots``; those tensors;
        and the names of the results.
    """
    tensors = [mapping[key] for mapping, key in slots]
    names: list[str] = []

    def of_tensors(argument: Tensor, *stand_ins: Tensor) -> list[Tensor]:
        for (mapping, key), stand_in in zip(slots, stand_ins, strict=True):
            mapping[key] = stand_in
        try:
            out = function(argument)
        finally:
            for (mapping, key), tensor in zip(slots, tensors, strict=True):
                mapping[key] = tensor
        names[:] = out
        return list(out.values())

    clones = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]
    devices = [example.device] if example.device.type == "cuda" else []
    with ONE_THREAD, torch.random.fork_rng(devices):
        return make_fx(of_tensors)(example, *clones), tensors, names


class Recording:
    """What :func:`record` returns: call it like the function.

    Args:
        replay: of the argument, the tensors in slots and further ones.
        tensors: those in slots.
        names: of the results.
        further: from the tensors in slots the further ones, once.
        draws: whether it draws random numbers.
    """

    def __init__(
        self,
        replay: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        names: list[str],
        further: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        draws: bool,
    ) -> None:
        self._replay = replay
        self._tensors = [tensor.detach() for tensor in (*tensors, *further(tensors))]
        self._names = names
        self._further = further
        self.draws = draws

    def at(self, tensors: Sequence[Tensor]) -> Recording:
        """The same with other tensors in the slots, of the same shapes, strides and dtypes."""
        return Recording(self._replay, tensors, self._names, self._further, self.draws)

    @torch.no_grad()
    def __call__(self, argument: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, self._replay(argument, *self._tensors), strict=True))


def draws_random_numbers(graph: GraphModule) -> bool:
    seeded = torch.Tag.nondeterministic_seeded
    return any(seeded in getattr(node.target, "tags", ()) for node in graph.graph.nodes)


def remove_what_has_no_effect(graph: GraphModule) -> None:
    for node in list(graph.graph.nodes):
        same_shape = node.target in _SAME_SHAPE and _layout(node) == _layout(node.args[0])
        times_one = node.target is _aten.mul.Scalar and node.args[1] == 1
        if node.target in _NO_EFFECT or same_shape or times_one:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _view_once(graph: GraphModule) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Views of the tensors in slots stay views of them: they become inputs, taken once and not at every call.

    Returns:
        the function that takes them.
    """
    argument, *sources = (node for node in graph.graph.nodes if node.op == "placeholder")
    taking = Graph()
    copies = {source: taking.placeholder(source.name) for source in sources}
    for node in graph.graph.nodes:
        if _is_view(node) and all(source in copies for source in node.all_input_nodes):
            copies[node] = taking.node_copy(node, lambda source: copies[source])
    last, taken = [argument, *sources][-1], []
    for node, copy in copies.items():
        if node.op == "call_function" and any(user not in copies for user in node.users):
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"view_{len(taken)}")
            last.meta = node.meta
            node.replace_all_uses_with(last)
            taken.append(copy)
    graph.graph.eliminate_dead_code()
    taking.output(taken)
    views = GraphModule({}, taking)
    return lambda tensors: views(*tensors)


def _overwrite_temporaries(graph: GraphModule) -> None:
    """Write a result over an input that nothing else reads, which saves the time to allocate it."""
    temporary = {node for node in graph.graph.nodes if _computes(node) and len(node.users) == 1}
    for node in graph.graph.nodes:
        if node.target in _IN_PLACE and node.args[0] in temporary and _layout(node.args[0]) == _layout(node):
            node.target = _IN_PLACE[node.target]
        elif node.target is _aten.add.Tensor and not node.kwargs:
            for written, other in (node.args, node.args[::-1]):
                if written in temporary and _layout(written) == _layout(node):
                    node.target, node.args = _aten.add_.Tensor, (written, other)
                    break
        elif node.target is _aten.threshold_backward.default:
            gradient = node.args[0]
            if gradient in temporary and _layout(gradient) == _layout(node):
                node.target, node.kwargs = _aten.threshold_backward.grad_input, {"grad_input": gradient}


def _is_view(node: Node) -> bool:
    views = (operator.getitem, _aten._unsafe_view.default)
    return node.op == "call_function" and (node.target in views or getattr(node.target, "is_view", False))


def _computes(node: Node) -> bool:
    """Whether a node allocates its result, which is then a part of nothing else."""
    return node.op == "call_function" and not _is_view(node) and not node.target._schema.is_mutable  # type: ignore[union-attr]


def _layout(node: Any) -> Any:
    meta = node.meta.get("tensor_meta") if isinstance(node, Node) else None
    return None if meta is None else (meta.shape, meta.stride, meta.dtype)
