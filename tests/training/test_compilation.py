"""Functions as the compiler gets them, against formulas."""

import numpy as np
import pytest
import torch
from torch import nn

from iql_torchrl.training.compilation import compile_update


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 1e-15)], ids=["float32", "float64"]
)
def test_compiled_mish_and_its_gradient_are_those_of_its_definition(dtype, tolerance):
    x = np.concatenate([np.linspace(-110, 110, 4001), [-1e30, -1e3, -0.0, 1e3, 1e30]]).astype(str(dtype)[6:])
    given = {"x": torch.tensor(x, requires_grad=True)}

    def mish(gradient):
        y = nn.functional.mish(given["x"])
        return {"y": y.detach(), "gradient": torch.autograd.grad(y, given["x"], gradient)[0]}

    compiled = compile_update(mish, torch.full((len(x),), 2.0, dtype=dtype), [(given, "x")])
    found = compiled(torch.full((len(x),), 3.0, dtype=dtype))

    x = x.astype(np.longdouble)
    within = np.tanh(np.logaddexp(0, x))
    sigmoid = np.exp(-np.logaddexp(0, -x))
    slope = 3 * (within + x * sigmoid * (1 - within) * (1 + within))
    for name, expected in (("y", x * within), ("gradient", slope)):
        error = np.abs(found[name].numpy().astype(np.longdouble) - expected) / np.maximum(np.abs(expected), 1e-20)
        assert error[np.abs(expected) > 1e-30].max() < 20 * tolerance, name
        assert found[name].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [256, 320, 1000])  # summed in one step, in two, and in one for 16 does not divide it
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("networks", [1, 2])
def test_compiled_gradients_of_a_layer_norm_are_those_of_its_formula(networks, dtype, tolerance, rows):
    random = np.random.default_rng(0)
    x = random.normal(size=(networks, rows, 48)) * random.uniform(0.5, 2, size=(1, rows, 1)) + 3
    scale, shift = random.normal(size=(2, networks, 1, 48))
    given = {
        name: torch.tensor(value, dtype=dtype, requires_grad=True)
        for name, value in (("x", x), ("scale", scale), ("shift", shift))
    }

    def gradients(factor):
        norms = nn.functional.layer_norm(given["x"], (48,)) * given["scale"] + given["shift"]
        loss = (norms.relu().square() * factor).sum()
        return dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))

    slots = [(given, name) for name in given]
    example = torch.tensor(random.normal(size=(rows, 48)), dtype=dtype)
    found = compile_update(gradients, torch.zeros_like(example), slots)(example)

    x, scale, shift = (given[name].detach().double().numpy().astype(np.longdouble) for name in given)
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    centred = (x - x.mean(axis=-1, keepdims=True)) / deviation
    slope = 2 * np.maximum(centred * scale + shift, 0) * example.double().numpy()
    of_centred = slope * scale
    along = of_centred - of_centred.mean(axis=-1, keepdims=True)
    expected = {
        "x": (along - centred * (of_centred * centred).mean(axis=-1, keepdims=True)) / deviation,
        "scale": (slope * centred).sum(axis=-2, keepdims=True),
        "shift": slope.sum(axis=-2, keepdims=True),
    }
    for name, value in expected.items():
        error = np.abs(found[name].double().numpy() - value)
        assert found[name].shape == value.shape
        assert error.max() < tolerance * np.abs(value).max(), name


@pytest.mark.slow
def test_data_are_given_to_the_compiler_once(monkeypatch):
    data, given, seen = torch.randn(50, 4), {"x": torch.ones(3, 4)}, []
    compile = torch._inductor.compile

    def compile_and_tell(graph, inputs, options):
        seen.extend([len(inputs), list(graph.buffers())])
        return compile(graph, inputs, options)

    monkeypatch.setattr(torch._inductor, "compile", compile_and_tell)
    rows = torch.tensor([7, 0, 49])
    compiled = compile_update(lambda rows: {"y": data[rows] + given["x"]}, torch.zeros_like(rows), [(given, "x")])
    assert seen == [3, []]  # rows, x and the data; what stays an attribute would be an input of every call besides
    assert torch.equal(compiled(rows)["y"], data[rows] + 1)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [6, 100])
def test_compiled_noise_is_of_independent_standard_normal_numbers(columns):
    def draw(x):
        noise = torch.randn(4096, columns)
        return {"noise": noise, "sum": noise + x[:, :1] * torch.rand(4096, 1)}

    example = torch.zeros(4096, columns)
    compiled = compile_update(draw, example, [])
    torch.manual_seed(3)
    first, second = (compiled(example)["noise"].double().numpy().copy() for _ in range(2))
    torch.manual_seed(3)
    assert np.array_equal(compiled(example)["noise"].double().numpy(), first)

    numbers = np.concatenate([first, second])
    assert numbers.shape == (8192, columns)
    assert len(np.unique(numbers)) > 0.99 * numbers.size  # of 2^24, some of a thousand agree
    # Five standard errors, of moments and of the correlations of columns, neighbouring rows and calls.
    within = 5 / np.sqrt(len(numbers) / 2)
    assert np.abs(numbers.mean(axis=0)).max() < within
    assert np.abs(numbers.var(axis=0) - 1).max() < within * np.sqrt(2)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(columns)).max() < within
    assert np.abs((first[1:] * first[:-1]).mean(axis=0)).max() < within
    assert np.abs((first * second).mean(axis=0)).max() < within
