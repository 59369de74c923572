"""Products on tensor cores: the graph with them computes the same, and their kernel is as exact as float32."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from iql_torchrl.training.products import resolve_products
from iql_torchrl.training.recording import record, remove_what_has_no_effect, trace
from iql_torchrl.training.tensor_cores import layer, use_tensor_cores

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
BATCHES = [(), (2,), (3, 2)]


def gradients(networks, rows, widths=(9, 16, 16, 3)):
    """A function of ``rows`` that returns loss and gradient of networks with ReLU whose weights lie in one tensor."""
    shapes = [shape for pair in zip(widths[1:], widths[:-1], strict=True) for shape in (pair, pair[:1])]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    flat = (0.3 * torch.randn(*networks, sum(sizes), generator=generator)).requires_grad_()
    holder = {"flat": flat}

    def loss(flat, rows):
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        for weight, bias in zip(parts[::2], parts[1::2], strict=True):
            rows = nn.functional.linear(rows, weight, bias)
            rows = rows.relu() if weight is not parts[-2] else rows
        return rows.square().mean()

    for _ in networks:
        loss = torch.vmap(loss, in_dims=(0, None))

    def function(rows):
        value = loss(holder["flat"], rows)
        (gradient,) = torch.autograd.grad(value.sum(), [holder["flat"]])
        return {"loss": value, "gradient": gradient}

    return function, torch.randn(rows, widths[0], generator=generator), [(holder, "flat")]


@pytest.mark.parametrize("networks", BATCHES)
def test_a_graph_with_them_computes_what_it_did(networks):
    function, rows, slots = gradients(networks, 8)
    expected = function(rows)
    found = record(function, rows, slots, "tensor_cores")(rows)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("networks", BATCHES)
def test_every_product_is_one_of_them_with_its_bias_relu_and_gate(networks):
    function, rows, slots = gradients(networks, 8)
    module, _, _ = trace(function, rows, slots)
    remove_what_has_no_effect(module)
    use_tensor_cores(module)
    layers = [node.args for node in module.graph.nodes if node.target is torch.ops.iql_torchrl.layer.default]
    names = [str(node.target) for node in module.graph.nodes]
    assert not any(name.startswith(("aten.mm", "aten.bmm", "aten.addmm")) for name in names)
    assert not any(name.startswith(("aten.relu", "aten.threshold_backward")) for name in names)
    # Three layers forwards, two of which end in ReLU; backwards three weights, and two layers with a gate.
    assert len(layers) == 8
    assert [sum(bool(one[place] is not None and one[place]) for one in layers) for place in (2, 3, 4)] == [3, 2, 2]


def test_products_with_vectors_stay_as_they_are():
    function, rows, slots = gradients((), 8, widths=(9, 16, 1))
    module, _, _ = trace(function, rows, slots)
    before = [node for node in module.graph.nodes if "mm" in str(node.target)]
    use_tensor_cores(module)
    layers = [node for node in module.graph.nodes if node.target is torch.ops.iql_torchrl.layer.default]
    after = [node for node in module.graph.nodes if "mm" in str(node.target)]
    assert len(layers) == 2 and len(after) == len(before) - 2


def test_double_precision_stays_as_it_is():
    def function(rows):
        return {"product": rows @ rows.mT}

    module, _, _ = trace(function, torch.ones(4, 4, dtype=torch.float64), [])
    use_tensor_cores(module)
    assert not any(node.target is torch.ops.iql_torchrl.layer.default for node in module.graph.nodes)


def test_they_are_refused_where_there_are_none():
    with pytest.raises(
        ValueError, match="products must be auto or mkl here, got 'tensor_cores': tensor cores are a GPU's"
    ):
        resolve_products("tensor_cores", torch.device("cpu"), torch.float32, [(8, 1, 4, 4)])


KERNEL = """
    import itertools
    import torch
    from iql_torchrl.training import tensor_cores
    device = torch.device("{device}")
    generator = torch.Generator(device).manual_seed(0)
    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device)
    sizes, batches = {sizes}, {batches}
    for batch, (rows, inner, columns), transposed in itertools.product(batches, sizes, [False, True]):
        left, right = random(*batch, rows, inner), random(*batch, inner, columns)
        if transposed:
            left, right = random(*batch, inner, rows).mT, random(*batch, columns, inner).mT
        bias, gate = random(*batch, 1, columns), random(*batch, rows, columns).relu()
        others = [(None, None), (bias, None), (random(columns), None), (None, gate)]
        for given, relu in itertools.product(others, [False, True]):
            found = tensor_cores.launch(left, right, *given, relu)
            operands = [None if one is None else one.double().cpu() for one in (left, right, *given)]
            expected = tensor_cores.layer(*operands, relu)
            error = (found.double().cpu() - expected).norm() / expected.norm()
            assert error < 1e-6, (batch, rows, inner, columns, transposed, relu, float(error))
    nan = tensor_cores.launch(random(16, 16) * torch.nan, random(16, 16), None, None, True)
    assert nan.isnan().all()  # as ReLU lets it through, so that a run that diverges is noticed
"""


@needs_triton
@pytest.mark.slow
def test_the_kernel_as_triton_interprets_it():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    code = textwrap.dedent(KERNEL.format(device="cpu", sizes=[(20, 17, 40), (16, 140, 6)], batches=[(), (3, 2)]))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)


@gpu
def test_the_kernel_is_as_exact_as_float32():
    sizes = [(256, 17, 256), (33, 256, 23), (256, 256, 6), (128, 80, 512)]
    exec(textwrap.dedent(KERNEL.format(device="cuda", sizes=sizes, batches=[(), (2,), (3, 2), (8, 2)])), {})


@gpu
@pytest.mark.parametrize("batch", BATCHES)
def test_its_error_is_of_the_size_of_cublass(batch):
    left, right = (torch.randn(*batch, 256, 256, device="cuda") for _ in range(2))
    exact = left.double() @ right.double()
    own, other = (
        float((found.double() - exact).norm()) for found in (layer(left, right, None, None, False), left @ right)
    )
    assert own < 2 * other
