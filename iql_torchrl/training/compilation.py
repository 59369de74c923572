"""The update as one compiled function."""

from __future__ import annotations

import importlib.util
import os
import shutil
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from iql_torchrl.training.products import hash_of_products, use_in_compiled
from iql_torchrl.training.recording import ONE_THREAD

_aten = torch.ops.aten
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


def compile_method(
    method: Callable[..., Any], instance: Any, device: torch.device, products: str = "mkl"
) -> Callable[[Tensor], Any]:
    """``method`` of ``instance``, compiled into one graph at its first call.

    Nothing that it reads of ``instance`` may change afterwards except the content of tensors: what the compiler would
    check on every call, some hundred guards and a twentieth of an update, is not checked.

    Args:
        method: takes the instance and one tensor, whose shape never changes.
        instance: what to bind it to.
        device: where it computes.
        products: of :func:`iql_torchrl.training.products.resolve_products`.
    """
    # Without guards, compiled code is told apart by its code object alone: each instance needs one of its own.
    function = types.FunctionType(method.__code__.replace(), method.__globals__, method.__name__)
    on_cpu = device.type == "cpu"
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    if on_cpu:
        options["cpp_wrapper"] = True  # some hundred calls into Python less
        options["post_grad_custom_post_pass"] = _Products(products)
    # Not dynamic: sizes never change, and those of a second instance would be taken for variable ones.
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    traced = False

    def call(argument: Tensor) -> Any:
        nonlocal traced
        if traced:
            return compiled(instance, argument)
        with ONE_THREAD, warnings.catch_warnings(), torch._dynamo.config.patch(trace_autograd_ops=True):
            # tensordict reads an option that PyTorch has retired.
            warnings.filterwarnings("ignore", message=".*inline_inbuilt_nn_modules.*", category=FutureWarning)
            out = compiled(instance, argument)
        traced = True
        return out

    return call


class _Products(CustomGraphPass):
    """Product plus bias in two steps, and the product by oneDNN where that was chosen.

    In one step, the CPU copies the bias over the whole result before it multiplies; as a step of its own the compiler
    joins it with the activation that follows. A twentieth of an update.
    """

    def __init__(self, products: str) -> None:
        self._products = products

    def __call__(self, graph: Graph) -> None:
        self._separate_bias(graph)
        if self._products == "onednn":
            use_in_compiled(graph)

    def _separate_bias(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target in _WITHOUT_BIAS and not node.kwargs:
                bias, left, right = node.args
                with graph.inserting_before(node):
                    product = graph.call_function(_WITHOUT_BIAS[node.target], (left, right))
                    total = graph.call_function(_aten.add.Tensor, (product, bias))
                product.meta = dict(node.meta)
                total.meta = dict(node.meta)
                node.replace_all_uses_with(total)
                graph.erase_node(node)

    def uuid(self) -> str:
        version = hash_of_products() if self._products == "onednn" else ""
        return f"iql_torchrl: separate bias, 1, {self._products} {version}"
