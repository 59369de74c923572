"""The update as one compiled function."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.inductor_prims import force_stride_order
from torch._inductor.inductor_prims import random as inductor_random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import GraphAppendingTracer

from iql_torchrl.training.products import call, hash_of_products, join_vectors, use_in_compiled
from iql_torchrl.training.recording import (
    ONE_THREAD,
    Recording,
    Slot,
    draws_random_numbers,
    remove_what_has_no_effect,
    trace,
)
from iql_torchrl.training.tensor_cores import use_tensor_cores

_aten = torch.ops.aten
# Sums over more rows than these are made of sums over so many.
_FEW_ROWS, _ROWS = 256, 16
# Rows of fewer numbers than these leave much of vectors empty.
_FEW_COLUMNS = 64
_WITHOUT_BIAS = {_aten.addmm.default: _aten.mm.default, _aten.baddbmm.default: _aten.bmm.default}


def resolve_compile(compile: bool | str, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and why not where ``"auto"`` decided against it."""
    if compile == "auto":
        if device.type == "cpu":
            names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
            if not any(shutil.which(name) for name in names):
                return False, f"no C++ compiler found (looked for {', '.join(names)}); running eagerly"
        elif importlib.util.find_spec("triton") is None:
            return False, "Triton is not installed, without which nothing compiles for a GPU; running eagerly"
        return True, ""
    return bool(compile), ""


def compile_update(
    function: Callable[[Tensor], dict[str, Tensor]],
    example: Tensor,
    slots: Sequence[Slot],
    products: str = "mkl",
) -> Recording:
    """``function`` as one compiled graph, from a trace of it and not of the Python around it, which takes the longer.

    Args:
        function, example, slots, products: as of :func:`iql_torchrl.training.recording.record`.
    """
    with enable_python_dispatcher():  # dropout as one operation, which the compiler draws itself
        graph, tensors, names = trace(function, example, slots)
    draws = draws_random_numbers(graph)
    if products == "tensor_cores":
        remove_what_has_no_effect(graph)
        use_tensor_cores(graph)
    _take_one_exponential(graph.graph)
    constants = _make_inputs_of_constants(graph)
    options: dict[str, Any] = {}
    if example.device.type == "cpu":
        options["cpp_wrapper"] = True  # some hundred calls into Python less
        options["cpp_cache_precompile_headers"] = False  # takes longer than it saves where one file includes them
        # The processor's own word is enough: a file compiled and loaded by a process of its own for each kind of vector
        # instructions takes seconds.
        options["cpp.vec_isa_ok"] = True
        options["post_grad_custom_post_pass"] = _Products(products)
    else:  # for a CUDA graph of branches (branches.py), which a kernel less and a wait less make shorter
        options["allow_buffer_reuse"] = False
        options["shape_padding"] = False
        options["split_reductions"] = False
        options["post_grad_custom_post_pass"] = _Vectors()
    inputs = [example, *(tensor.detach() for tensor in (*tensors, *constants))]
    # Without symbols for shapes, of which there are none, the compiler would not look into its cache.
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))
    with ONE_THREAD, torch.no_grad(), tracing(context):
        compiled: Any = torch._inductor.compile(graph, inputs, options)  # pyright: ignore[reportArgumentType]
    return Recording(compiled, tensors, names, lambda _: constants, draws)


def _take_one_exponential(graph: Graph) -> None:
    """Mish by one exponential instead of an exponential, a logarithm and a hyperbolic tangent, a fifth of a diffusion's
    update: with e the exponential, tanh(log(1 + e)) = n / (n + 2), where n = e (e + 2)."""
    for node in list(graph.nodes):
        if node.target in _BY_ONE_EXPONENTIAL and not node.kwargs:
            with graph.inserting_before(node):
                arguments = [Proxy(argument, GraphAppendingTracer(graph)) for argument in node.args]
                node.replace_all_uses_with(_BY_ONE_EXPONENTIAL[node.target](*arguments).node)
            graph.erase_node(node)


def _mish(x: Any) -> Any:
    e = x.exp()
    n = e * (e + 2)
    return torch.where(x > _ONE, x, x * (n / (n + 2)))


def _mish_backward(gradient: Any, x: Any) -> Any:
    e = x.exp()
    n = e * (e + 2)
    inverse = 1 / (n + 2)
    return gradient * torch.where(x > _ONE, 1.0, n * inverse + x * (4 * e * (e + 1)) * inverse * inverse)


# Beyond it the quotient and the slope are 1 in double precision, and up to it nothing overflows in single precision.
_ONE = 20
_BY_ONE_EXPONENTIAL = {_aten.mish.default: _mish, _aten.mish_backward.default: _mish_backward}


def _make_inputs_of_constants(graph: GraphModule) -> list[Tensor]:
    """Tensors outside the slots, the data above all, become further inputs: the compiler would copy and hash them."""
    *_, last = (node for node in graph.graph.nodes if node.op == "placeholder")
    inputs: dict[str, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            if node.target not in inputs:
                with graph.graph.inserting_after(last):
                    last = inputs[node.target] = graph.graph.placeholder(node.target)
            node.replace_all_uses_with(inputs[node.target])
            graph.graph.erase_node(node)
    for node in graph.graph.nodes:
        node.meta = {}  # of another tracer, with which the compiler's own does not mix
    graph.recompile()
    constants = [getattr(graph, name) for name in inputs]
    for name in inputs:
        delattr(graph, name)  # or the compiler would make inputs of them once more
    return constants


class _Products(CustomGraphPass):
    """What the compiler makes slow kernels of on a CPU, in other words; products by oneDNN where those were chosen."""

    def __init__(self, products: str) -> None:
        self._products = products

    def __call__(self, graph: Graph) -> None:
        self._separate_bias(graph)
        has_norms = self._compute_norms_once(graph)
        self._draw_noise_flat(graph)
        if self._products == "onednn":
            use_in_compiled(graph)
        if has_norms:
            self._sum_in_two_steps(graph)

    def _separate_bias(self, graph: Graph) -> None:
        """Product plus bias in two steps.

        In one, the CPU copies the bias over the whole result before it multiplies; as a step of its own the compiler
        joins it with the activation that follows. A twentieth of an update.
        """
        for node in list(graph.nodes):
            if node.target in _WITHOUT_BIAS and not node.kwargs:
                bias, left, right = node.args
                with graph.inserting_before(node):
                    product = call(graph, _WITHOUT_BIAS[node.target], left, right)
                    total = call(graph, _aten.add.Tensor, product, bias)
                node.replace_all_uses_with(total)
                graph.erase_node(node)

    def _compute_norms_once(self, graph: Graph) -> bool:
        """The compiler would repeat a layer norm's root for every few numbers of a row, in every kernel with it.

        Returns:
            whether the graph has a layer norm.
        """
        roots = [node for node in graph.nodes if node.target is _aten.rsqrt.default and node.meta["val"].ndim > 1]
        for node in roots:
            with graph.inserting_after(node):
                kept = call(graph, force_stride_order, node, node.meta["val"].stride())
            node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
        return bool(roots)

    def _draw_noise_flat(self, graph: Graph) -> None:
        """The compiler would draw as many numbers as a vector has for each row of noise, of which an action has few.

        In one dimension none are wasted. A further number, not used, keeps it from two dimensions again, where it would
        join the draw with what follows. A number is of its seed and place: all are those that they were.
        """
        for node in list(graph.nodes):
            if node.target is not inductor_random or node.kwargs:
                continue
            shape, *more = node.args
            if len(shape) < 2 or shape[-1] >= _FEW_COLUMNS:
                continue
            count = math.prod(shape)
            with graph.inserting_before(node):
                flat = call(graph, inductor_random, [count + 1], *more)
                used = call(graph, _aten.slice.Tensor, flat, 0, 0, count)
                noise = call(graph, _aten.reshape.default, used, shape)
            node.replace_all_uses_with(noise)
            graph.erase_node(node)

    def _sum_in_two_steps(self, graph: Graph) -> None:
        """The gradients of a layer norm's parameters, which are sums over a batch, of a few rows at a time first.

        The compiler would go through all rows for every few columns, of which it has so many tensors to read here that
        they do not stay in the cache; a fifth of the time of a layer norm's gradients at batch 1024. Batches of up to
        256, and networks without layer norm, keep their sums, and so their last bits.
        """
        for node in list(graph.nodes):
            if node.target is not _aten.sum.dim_IntList or node.kwargs:
                continue
            summands, dimensions, *keepdim = node.args
            shape = summands.meta["val"].shape
            if len(shape) < 2 or [dimension % len(shape) for dimension in dimensions] != [len(shape) - 2]:
                continue
            *batch, rows, columns = shape
            if rows <= _FEW_ROWS or rows % _ROWS or columns == 1:
                continue
            with graph.inserting_before(node):
                groups = call(graph, _aten.reshape.default, summands, [*batch, rows // _ROWS, _ROWS, columns])
                partial = call(graph, _aten.sum.dim_IntList, groups, [-2])
                total = call(graph, _aten.sum.dim_IntList, partial, [-2], *keepdim)
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> str:
        version = hash_of_products() if self._products == "onednn" else ""
        return f"iql_torchrl: separate bias, norms once, noise flat, sums in two steps, 1, {self._products} {version}"


class _Vectors(CustomGraphPass):
    """Products with vectors as operations that the compiler joins with those around them."""

    def __call__(self, graph: Graph) -> None:
        join_vectors(graph)

    def uuid(self) -> str:
        return f"iql_torchrl: vectors, {hash_of_products()}"
