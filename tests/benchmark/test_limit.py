"""The matrix products alone: the right ones, whoever multiplies."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from iql_torchrl.benchmark.case import Case
from iql_torchrl.benchmark.limit import MatrixProducts, limit_row, multiplications, products
from iql_torchrl.benchmark.rows import our_row

SMALL = {"observation_dim": 5, "action_dim": 3, "hidden_dims": (8, 6), "batch_size": 4, "transitions": 64}
BATCH = 4
# Multiplications in the layers of V (5 -> 8 -> 6 -> 1), of a critic (8 -> 8 -> 6 -> 1) and of the policy
# (5 -> 8 -> 6 -> 3), for one row of a batch.
VALUE, CRITIC, POLICY = 5 * 8 + 8 * 6 + 6, 8 * 8 + 8 * 6 + 6, 5 * 8 + 8 * 6 + 6 * 3
# A backward pass is the gradients of the weights, and those of the inputs of all layers but the first.
BACKWARD = (2 * VALUE - 5 * 8) + 2 * (2 * CRITIC - 8 * 8) + (2 * POLICY - 5 * 8)
JOINT = 2 * BATCH * (2 * VALUE + 4 * CRITIC + POLICY + BACKWARD)
PAPER = JOINT + 2 * BATCH * VALUE


@pytest.mark.parametrize(("order", "flops"), [("joint", JOINT), ("paper", PAPER)])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_products_of_an_update_are_those_counted_by_hand(order, flops, seeds):
    case = Case(name="small", seeds=seeds, **SMALL)
    assert sum(product.flops for product in products(case, order)) == flops
    measured = limit_row(case, order).build()
    measured()
    assert measured.flops == seeds * flops
    assert sum(measured.shares.values()) == pytest.approx(1.0)


def test_critics_of_discrete_actions_read_no_action_and_value_each():
    case = Case(name="small", discrete=True, **SMALL)
    critic = 5 * 8 + 8 * 6 + 6 * 3
    backward = (2 * VALUE - 5 * 8) + 2 * (2 * critic - 5 * 8) + (2 * POLICY - 5 * 8)
    flops = 2 * BATCH * (2 * VALUE + 4 * critic + POLICY + backward)
    assert sum(product.flops for product in products(case, "joint")) == flops


@pytest.mark.parametrize("seeds", [1, 2])
def test_whatever_is_chosen_multiplies_as_much_as_the_update(seeds):
    """Counted from the memory that the calls are given."""
    case = Case(name="small", seeds=seeds, **SMALL)
    measured = MatrixProducts(case, "paper")
    done = 0
    measured()
    for left, right, _ in measured.operands:
        batch = len(left) if left.ndim == 3 else 1
        assert left.shape[-1] == right.shape[-2]
        done += 2 * batch * left.shape[-2] * left.shape[-1] * right.shape[-1]
    assert done == measured.flops == seeds * PAPER


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_implementation_multiplies(dtype):
    found = multiplications(torch.device("cpu"), dtype)
    assert "mm" in found and ("mkldnn linear" in found) == (
        dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )
    left, right = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in [(7, 5), (5, 3)])
    expected = left @ right
    for name, multiply in found.items():
        for one in (left, left.mT.contiguous().mT):
            for other in (right, right.mT.contiguous().mT):
                out = torch.zeros_like(expected)
                returned = multiply(one, other, out)
                result = returned if isinstance(returned, torch.Tensor) else out
                torch.testing.assert_close(result, expected, msg=name)


@pytest.mark.parametrize("extraction", ["awr", "ddpgbc", "flow", "diffusion"])
def test_an_update_does_no_fewer_operations_and_hardly_more(extraction):
    case = Case(name="small", extraction=extraction, batch_size=32, hidden_dims=(48, 32), transitions=64)
    step = our_row(case, order="paper", mode="eager").build()
    with FlopCounterMode(display=False) as counter:
        step._update(step._draw()[0])
    least = sum(product.flops for product in products(case, "paper"))
    # What a diffusion's frequencies, and the gradients of whole inputs where a part is needed, take besides.
    assert least <= counter.get_total_flops() < 1.1 * least
