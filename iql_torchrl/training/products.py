"""Float32 matrix products: PyTorch's own (MKL's), or those that are faster on this processor or GPU.

MKL leaves half of some processors unused (AVX-512 on AMD). oneDNN's kernel, which PyTorch has as
``at::native::cpublas::brgemm``, uses all of it; ``products.cpp`` beside this file calls it. Both compute in float32 and
differ in rounding, as do those on a GPU's tensor cores (``tensor_cores.py``) and cuBLAS's, PyTorch's own there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch._inductor.virtualized import V
from torch.fx import Graph
from torch.fx import Node as TypedNode

from iql_torchrl.atomic import write_text_atomically
from iql_torchrl.errors import first_line
from iql_torchrl.training.tensor_cores import why_not_tensor_cores

# Whose arguments may be anything, which a type checker cannot follow.
Node = Any
# Batch, number of networks, inputs and outputs of a linear layer.
Layer = tuple[int, int, int, int]

SOURCE = Path(__file__).with_name("products.cpp")
_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default)
# oneDNN's must be this much faster to be chosen: choosing between equals would only change the rounding.
_MARGIN = 1.05
# Tensor cores are for the products of one run, which leave most of a GPU idle: those of many at once keep it busy, and
# cuBLAS then needs less of it (an H100 at batch 256: 1.5 times as fast for one run, 0.5 times for 16).
_FEW_ROWS = 1024


def resolve_products(
    choice: str, device: torch.device, dtype: torch.dtype, layers: Sequence[Layer], *, fused: bool = True
) -> tuple[str, str]:
    """Which products an update uses, and what a user should know of that.

    Args:
        choice: ``"mkl"``, ``"onednn"``, ``"tensor_cores"``, or ``"auto"``: on a CPU the faster ones for ``layers``,
            measured once on a machine; on a GPU its tensor cores, where the update is compiled and of one run.
        device, dtype: of the parameters.
        layers: of the networks.
        fused: whether the update is compiled, and products come with what follows them.

    Returns:
        ``"mkl"``, ``"onednn"`` or ``"tensor_cores"``, and what was measured or is odd; empty where there was nothing to
        choose.

    Raises:
        ValueError: a choice that cannot be here.
    """
    if choice == "mkl":
        return "mkl", ""
    asked = choice if choice != "auto" else "tensor_cores" if device.type == "cuda" else "onednn"
    reason = why_not(device, dtype, asked)
    if reason:
        if choice != "auto":
            raise ValueError(f"products must be auto or mkl here, got {choice!r}: {reason}")
        return "mkl", ""
    if not layers:
        return "mkl", f"no linear layer in the networks: products={choice} changes nothing." if choice != "auto" else ""
    if choice != "auto":
        return choice, ""
    if asked == "tensor_cores":
        few = max(batch * networks for batch, networks, *_ in layers) <= _FEW_ROWS
        return (asked, "") if fused and few else ("mkl", "")
    ratio = _faster_by(tuple(layers), fused)
    measured = f"oneDNN's take {1 / ratio:.2f} times as long as MKL's for these layers on this processor"
    return ("onednn", f"products by oneDNN: {measured}") if ratio > _MARGIN else ("mkl", f"products by MKL: {measured}")


def multiply(
    left: Tensor,
    right: Tensor,
    out: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``left`` times ``right`` by oneDNN, and what follows a product in a network with ReLU.

    Args:
        left: ``[M, K]`` or ``[batch, M, K]``, float32 on the CPU, of any strides; transposed ones cost little.
        right: ``[K, N]`` or ``[batch, K, N]``.
        out: where to write ``[M, N]`` or ``[batch, M, N]``, contiguous; allocated where not given.
        bias: ``[N]`` or ``[batch, 1, N]``: added, and what is negative then is set to 0.
        gate: of the result's shape: what stands where it is not positive is set to 0.
    """
    left, right = _as_matrices(left), _as_matrices(right)
    bias, gate = (None if rows is None else _as_rows(rows) for rows in (bias, gate))
    if out is None:
        out = left.new_empty((*left.shape[:-1], right.shape[-1]))
    _library().iql_torchrl_multiply(*_arguments(left, right, out, bias, gate))
    return out


def multiply_all(products: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], None]:
    """A call that does several products one after the other, without Python between them.

    Args:
        products: left, right and out of each, as of :func:`multiply`, which stay where they are.
    """
    operands = [(_as_matrices(left), _as_matrices(right), out) for left, right, out in products]
    arguments = torch.tensor([_arguments(*one, None, None) for one in operands])

    def call() -> None:
        _library().iql_torchrl_multiply_all(len(operands), arguments.data_ptr())

    return call


def _arguments(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None, gate: Tensor | None) -> list[int]:
    """As ``products.cpp`` wants them; 0 is no pointer."""
    *batch, rows, inner = left.shape
    count, *between = (batch[0], left.stride(0), right.stride(0), out.stride(0)) if batch else (1, 0, 0, 0)
    found = [count, rows, right.shape[-1], inner]
    found += [left.data_ptr(), between[0], left.stride(-2), left.stride(-1)]
    found += [right.data_ptr(), between[1], right.stride(-2), right.stride(-1)]
    found += [out.data_ptr(), between[2], out.stride(-2)]
    found += [0, 0] if bias is None else [bias.data_ptr(), bias.stride(0) if bias.ndim == 3 else 0]
    return found + ([0, 0, 0] if gate is None else [gate.data_ptr(), gate.stride(0) if batch else 0, gate.stride(-2)])


def use_in_recording(graph: Graph) -> None:
    """Let :func:`multiply` compute the float32 products of a graph that runs as it is."""

    def multiply_and_add(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return multiply(left, right).add_(bias)

    for node, shapes in _float32_products(graph, _aten.addmm.default, *_PRODUCTS):
        if 1 not in shapes and not node.kwargs:
            node.target = multiply_and_add if node.target is _aten.addmm.default else multiply


def use_in_compiled(graph: Graph) -> None:
    """The same for a graph that the compiler is about to translate, with what follows a product in one kernel."""
    _lower_for_inductor()
    join_vectors(graph)
    operators = torch.ops.iql_torchrl
    for node, _ in _float32_products(graph, *_PRODUCTS):
        node.target = operators.multiply.default
        follower = next(iter(node.users)) if len(node.users) == 1 else None
        if follower is None:
            continue
        if follower.target is _aten.add.Tensor and not follower.kwargs and len(follower.users) == 1:
            bias = follower.args[follower.args[0] is node]
            activation = next(iter(follower.users))
            if activation.target is _aten.relu.default and _is_bias(bias, node):
                _replace(graph, activation, operators.multiply_add_relu.default, (*node.args, bias), follower, node)
        elif follower.target is _aten.where.self and follower.args[2] is node:
            condition, zero, _ = follower.args
            is_gate = condition.target is _aten.le.Scalar and condition.args[1] == 0 and _is_zero(zero)
            if is_gate and condition.args[0].meta["val"].shape == node.meta["val"].shape:
                _replace(graph, follower, operators.multiply_gated.default, (*node.args, condition.args[0]), node)
        elif follower.target is _aten.reshape.default and follower.meta["val"].ndim == 1:
            # The gradient of a weight, for that of a flat tensor: one dimension can be written there and not copied.
            _replace(graph, follower, operators.multiply_flat.default, node.args, node)


@functools.cache
def hash_of_products() -> str:
    """Of what this module does to a graph: the compiler must not find code in its cache that another version made."""
    return hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def _is_bias(node: Any, product: Node) -> bool:
    """Whether it has a number for each column of the product."""
    if not isinstance(node, TypedNode) or node is product:
        return False
    *batch, _, columns = product.meta["val"].shape
    return tuple(node.meta["val"].shape) in ((columns,), (*batch, 1, columns))


def _is_zero(node: Any) -> bool:
    return isinstance(node, TypedNode) and node.target is _aten.full.default and bool(node.args[1] == 0)


def _replace(graph: Graph, node: Node, target: Callable[..., Tensor], arguments: Any, *absorbed: Node) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, arguments)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    for one in (node, *absorbed):
        graph.erase_node(one)


def join_vectors(graph: Graph) -> None:
    """Write float32 products with vectors as operations that the compiler joins with those around them.

    A last layer of one output, and its gradients, are little more than reading the layer before.
    """
    for node, (rows, columns, inner) in _float32_products(graph, *_PRODUCTS):
        left, right = node.args
        if 1 not in (rows, columns, inner):
            continue
        with graph.inserting_before(node):
            if inner == 1:
                result = call(graph, _aten.mul.Tensor, left, right)
            elif columns == 1:
                product = call(graph, _aten.mul.Tensor, left, _transposed(graph, right))
                result = call(graph, _aten.sum.dim_IntList, product, [-1], True)
            else:
                product = call(graph, _aten.mul.Tensor, _transposed(graph, left), right)
                result = call(graph, _aten.sum.dim_IntList, product, [-2], True)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _float32_products(graph: Graph, *targets: Any) -> list[tuple[Node, tuple[int, int, int]]]:
    """The products of matrices in a graph, with rows, columns and summands."""

    def value(node: Any) -> Any:
        return node.meta.get("val", node.meta.get("tensor_meta"))

    found = [node for node in graph.nodes if node.target in targets and value(node).dtype == torch.float32]
    return [(node, (*value(node).shape[-2:], value(node.args[-1]).shape[-2])) for node in found]


def _transposed(graph: Graph, node: Any) -> Node:
    order = list(range(node.meta["val"].ndim))
    return call(graph, _aten.permute.default, node, [*order[:-2], order[-1], order[-2]])


def call(graph: Graph, target: Callable[..., Tensor], *arguments: Any) -> Node:
    """A further operation of a graph, with the value that the compiler wants to know."""
    node = graph.call_function(target, arguments)
    values = [argument.meta["val"] if isinstance(argument, TypedNode) else argument for argument in arguments]
    with V.fake_mode:
        node.meta["val"] = target(*values)
    return node


# ---------------------------------------------------------------------- which is faster


def why_not(device: torch.device, dtype: torch.dtype, products: str = "onednn") -> str:
    """Why products by oneDNN, or on tensor cores, cannot be used; empty where they can."""
    if products == "tensor_cores":
        return why_not_tensor_cores(device, dtype)
    if device.type != "cpu":
        return f"oneDNN is for CPUs, and the device is {device}."
    if dtype != torch.float32:
        return f"oneDNN's products are of float32, and the parameters are {str(dtype).removeprefix('torch.')}."
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN."
    if not torch.cpu._is_avx512_supported():
        return "oneDNN's kernel needs AVX-512, which this processor has not."
    try:
        usable = _library().iql_torchrl_can_multiply()
    except Exception as error:  # whatever the compiler, the linker or the loader says
        return f"the C++ around oneDNN's kernel does not compile or load: {first_line(error)}"
    return "" if usable else "this build of PyTorch has no oneDNN kernel for this processor."


@functools.cache
def _faster_by(layers: tuple[Layer, ...], fused: bool) -> float:
    """How many times as fast oneDNN's products are as MKL's, remembered on disk."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir()) / "iql_torchrl_products.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # 2: an earlier way to measure products alone favoured oneDNN's, and what it has written does not count.
    key = f"2, {torch.__version__}, {torch.get_num_threads()} threads, {'in an update' if fused else 'alone'}, {layers}"
    with FileLock(f"{path}.lock"):  # so that processes that start together choose alike
        try:
            known = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # none yet, or damaged
            known = {}
        if not isinstance(known.get(key), float):
            known[key] = _measure(layers, fused)
            text = json.dumps(known, indent=2)
            write_text_atomically(path, text)
    return known[key]


def _measure(layers: Sequence[Layer], fused: bool, rounds: int = 9) -> float:
    """Median, over rounds, of the time of the layers' products by MKL over that by oneDNN."""
    mkl: list[Callable[[], Any]] = []
    onednn: list[Callable[[], Any]] = []
    in_update: list[list[int]] = []
    kept: list[Any] = []  # whose addresses are among the arguments
    # Not the generator of the process, which a run has seeded.
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    for batch, networks, inputs, outputs in layers:
        if 1 in (inputs, outputs):  # which are not multiplied by oneDNN
            continue
        layer = random(networks, batch, inputs), random(networks, batch, outputs)
        weight, bias = random(networks, inputs, outputs), random(networks, 1, outputs)
        if networks == 1:
            layer, weight, bias = (layer[0][0], layer[1][0]), weight[0], bias[0]
        by_mkl = torch.mm if networks == 1 else torch.bmm
        # Forward, and the two products of the backward pass.
        for left, right, add, gate in (
            (layer[0], weight, bias, None),
            (layer[1], weight.mT, None, layer[0]),
            (layer[0].mT, layer[1], None, None),
        ):
            if not fused:  # as a recording calls them: small products take less time than Python's way to them
                mkl.append(functools.partial(by_mkl, left, right))
                onednn.append(functools.partial(multiply, left, right))
                continue
            out = left.new_empty((*left.shape[:-1], right.shape[-1]))
            mkl.append(functools.partial(by_mkl, left, right, out=out))
            # One pass more: the compiler joins bias, ReLU and gate, and copies the gradient of a weight.
            of_weight = add is None and gate is None
            mkl.append(functools.partial(torch.empty_like(out).copy_, out) if of_weight else out.relu_)
            in_update.append(_arguments(left, right, out, add, gate))
            kept.append((left, right, out, add, gate))
    if in_update:
        arguments = torch.tensor(in_update)
        onednn.append(lambda: _library().iql_torchrl_multiply_all(len(in_update), arguments.data_ptr()))
    ratios = []
    for _ in range(rounds if onednn else 0):
        start = time.perf_counter()
        for call in mkl:
            call()
        between = time.perf_counter()
        for call in onednn:
            call()
        ratios.append((between - start) / (time.perf_counter() - between))
    return statistics.median(ratios) if ratios else 1.0


# ---------------------------------------------------------------------- the C++ and its ways in


@functools.cache
def _library() -> ctypes.CDLL:
    """``products.cpp``, compiled once on a machine; compiled updates find its function by name."""
    from torch._inductor.codecache import CppCodeCache

    # The compiler writes its own vector operations and forbids others; ours are left to the C++ compiler.
    loaded = CppCodeCache.load(SOURCE.read_text(), extra_flags=("-ftree-loop-vectorize",), needs_vec_isa=False)
    library = ctypes.CDLL(loaded._name, mode=ctypes.RTLD_GLOBAL)  # pyright: ignore[reportAttributeAccessIssue]
    size, matrix = ctypes.c_int64, ctypes.c_void_p
    of_products = [*[size] * 4, matrix, *[size] * 3, matrix, *[size] * 3, matrix, *[size] * 2]
    library.iql_torchrl_multiply.argtypes = [*of_products, matrix, size, matrix, size, size]
    library.iql_torchrl_multiply.restype = None
    library.iql_torchrl_multiply_all.argtypes = [size, matrix]
    library.iql_torchrl_multiply_all.restype = None
    library.iql_torchrl_can_multiply.restype = ctypes.c_bool
    return library


def _is_matrix(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether rows or columns are contiguous and do not overlap."""
    *_, rows, columns = shape
    *_, row, column = stride
    by_rows = (column == 1 or columns == 1) and (row >= columns or rows == 1)
    by_columns = (row == 1 or rows == 1) and (column >= rows or columns == 1)
    return bool(by_rows or by_columns)


def _as_matrices(tensor: Tensor) -> Tensor:
    return tensor if _is_matrix(tensor.shape, tensor.stride()) else tensor.contiguous()


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_result(name: str, left: Tensor, right: Tensor, *_: Tensor) -> Tensor:
    result = left.new_empty((*left.shape[:-1], right.shape[-1]))
    return result.flatten() if name == "multiply_flat" else result


_namespace = torch.library.Library("iql_torchrl", "DEF")
_OPERATORS = {
    "multiply": multiply,
    "multiply_add_relu": lambda left, right, bias: multiply(left, right, bias=bias),
    "multiply_gated": lambda left, right, gate: multiply(left, right, gate=gate),
    "multiply_flat": lambda left, right: multiply(left, right).flatten(),
}
for _name, _function in _OPERATORS.items():
    _third = {"multiply_add_relu": ", Tensor bias", "multiply_gated": ", Tensor gate"}.get(_name, "")
    _namespace.define(f"{_name}(Tensor left, Tensor right{_third}) -> Tensor")
    _namespace.impl(_name, _function, "CPU")
    _namespace.impl(_name, functools.partial(_empty_result, _name), "Meta")

# What compiled code calls: of tensors, as all kernels that the compiler knows.
_SHIM = """
extern "C" void iql_torchrl_multiply(int64_t, int64_t, int64_t, int64_t, const float*, int64_t, int64_t, int64_t,
                                     const float*, int64_t, int64_t, int64_t, float*, int64_t, int64_t, const float*,
                                     int64_t, const float*, int64_t, int64_t);

namespace {
struct Matrices {
  void* data = nullptr;
  int64_t batch = 1, rows = 0, columns = 0, batch_stride = 0, row_stride = 0, column_stride = 0;

  explicit Matrices(AtenTensorHandle tensor) {
    if (!tensor) return;
    int64_t dimensions;
    aoti_torch_get_data_ptr(tensor, &data);
    aoti_torch_get_dim(tensor, &dimensions);
    if (dimensions == 3) {
      aoti_torch_get_size(tensor, 0, &batch);
      aoti_torch_get_stride(tensor, 0, &batch_stride);
    }
    if (dimensions > 1) {
      aoti_torch_get_size(tensor, dimensions - 2, &rows);
      aoti_torch_get_stride(tensor, dimensions - 2, &row_stride);
    }
    aoti_torch_get_size(tensor, dimensions - 1, &columns);
    aoti_torch_get_stride(tensor, dimensions - 1, &column_stride);
  }
};

void multiply(AtenTensorHandle out_tensor, AtenTensorHandle left_tensor, AtenTensorHandle right_tensor,
              AtenTensorHandle bias_tensor, AtenTensorHandle gate_tensor) {
  const Matrices out(out_tensor), left(left_tensor), right(right_tensor), bias(bias_tensor), gate(gate_tensor);
  iql_torchrl_multiply(left.batch, left.rows, right.columns, left.columns, static_cast<const float*>(left.data),
                       left.batch_stride, left.row_stride, left.column_stride, static_cast<const float*>(right.data),
                       right.batch_stride, right.row_stride, right.column_stride, static_cast<float*>(out.data),
                       left.rows * right.columns, right.columns, static_cast<const float*>(bias.data),
                       bias.batch_stride, static_cast<const float*>(gate.data), gate.batch_stride, gate.row_stride);
}
}  // namespace

static AOTITorchError aoti_torch_cpu_iql_torchrl_multiply(AtenTensorHandle out, AtenTensorHandle left,
                                                          AtenTensorHandle right) {
  multiply(out, left, right, nullptr, nullptr);
  return 0;
}

static AOTITorchError aoti_torch_cpu_iql_torchrl_multiply_add_relu(AtenTensorHandle out, AtenTensorHandle left,
                                                                   AtenTensorHandle right, AtenTensorHandle bias) {
  multiply(out, left, right, bias, nullptr);
  return 0;
}

static AOTITorchError aoti_torch_cpu_iql_torchrl_multiply_gated(AtenTensorHandle out, AtenTensorHandle left,
                                                                AtenTensorHandle right, AtenTensorHandle gate) {
  multiply(out, left, right, nullptr, gate);
  return 0;
}
"""


@functools.cache
def _lower_for_inductor() -> None:
    from torch._inductor import ir
    from torch._inductor.lowering import register_lowering
    from torch._inductor.utils import sympy_product

    class Product(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            if _SHIM not in wrapper.header.getvalue():
                wrapper.header.splice(_SHIM)
            super().codegen(wrapper)

    def frozen(box: Any) -> Any:
        box = ir.ExternKernel.realize_input(box)
        box.freeze_layout()
        return box

    def matrices(box: Any) -> Any:
        box = frozen(box)
        whole = _is_matrix([int(size) for size in box.get_size()], [int(stride) for stride in box.get_stride()])
        return box if whole else ir.ExternKernel.require_contiguous(box)

    def rows(box: Any) -> Any:
        box = frozen(box)
        return box if box.get_stride()[-1] == 1 else ir.ExternKernel.require_contiguous(box)

    def lowering(name: str) -> Callable[..., Any]:
        def lower(left: Any, right: Any, *others: Any) -> Any:
            left, right = matrices(left), matrices(right)
            size, layout = [*left.get_size()[:-1], right.get_size()[-1]], ir.FixedLayout
            if name == "multiply_flat":  # flexible: a part of another tensor, if the compiler wants
                size, layout = [sympy_product(size)], ir.FlexibleLayout
            product = Product(
                layout(left.get_device(), left.get_dtype(), size),
                [left, right, *map(rows, others)],
                cpp_kernel_name=f"aoti_torch_cpu_iql_torchrl_{name.removesuffix('_flat')}",
                op_overload=getattr(torch.ops.iql_torchrl, name).default,
            )
            return ir.TensorBox.create(product)

        return lower

    for name in _OPERATORS:
        register_lowering(getattr(torch.ops.iql_torchrl, name).default, type_promotion_kind=None)(lowering(name))
