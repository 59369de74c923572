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
