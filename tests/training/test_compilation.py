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
