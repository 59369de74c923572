"""What the rows do when they are called: updates, and nothing less."""

from dataclasses import replace

import numpy as np
import pytest
import reference_iql
import torch
from torch import nn

from iql_torchrl.benchmark.case import Case
from iql_torchrl.benchmark.plain_pytorch import PlainIQL, plain_row
from iql_torchrl.benchmark.rows import our_row
from iql_torchrl.benchmark.torchrl_rows import recipe_row, shipped_row, tuned_row

SMALL = {"observation_dim": 5, "action_dim": 3, "hidden_dims": (8, 8), "batch_size": 8, "transitions": 64}
KINDS = {
    "continuous": Case(name="continuous", **SMALL),
    "layer norm": Case(name="layer norm", layer_norm=True, **SMALL),
    "discrete": Case(name="discrete", discrete=True, **SMALL),
    "float64": Case(name="float64", precision="float64", **SMALL),
}
each_kind = pytest.mark.parametrize("case", KINDS.values(), ids=list(KINDS))

pytestmark = pytest.mark.filterwarnings("ignore:.*lock_.*:UserWarning")


def parameters_of(loss):
    return {name: leaf.detach().clone() for name, leaf in loss.named_parameters()} | {
        f"target {name}": leaf.clone() for name, leaf in loss.named_buffers() if "target" in name
    }


def assert_every_parameter_moves(call, loss):
    call()
    before = parameters_of(loss)
    for _ in range(3):
        call()
    after = parameters_of(loss)
    assert any("target" in name for name in before)
    assert [name for name in before if before[name].equal(after[name])] == []


@each_kind
@pytest.mark.parametrize("build", [recipe_row, shipped_row], ids=["recipe", "shipped"])
def test_the_recipe_of_torchrl_changes_every_parameter(case, build, tmp_path):
    update = build(case, str(tmp_path), mode="eager").build()
    assert_every_parameter_moves(update, update.loss)


@each_kind
def test_the_tuned_row_of_torchrl_changes_every_parameter(case):
    update = tuned_row(case, mode="eager").build()
    assert_every_parameter_moves(update, update.loss)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layer norm", "discrete"])
def test_compiled_rows_of_torchrl_change_every_parameter(kind, tmp_path):
    case = replace(KINDS[kind], hidden_dims=(8,))  # the compiler reads a layer's Python for each network and layer
    for row in (shipped_row(case, str(tmp_path), mode="compiled"), tuned_row(case, mode="compiled")):
        update = row.build()
        assert_every_parameter_moves(update, update.loss)


def test_the_rows_of_torchrl_do_the_same_update(tmp_path):
    """On data of one row, every batch is the same whatever draws it."""
    case = Case(name="one row", **(SMALL | {"transitions": 1, "batch_size": 1}))
    rows = [
        recipe_row(case, f"{tmp_path}/recipe", mode="eager"),
        shipped_row(case, f"{tmp_path}/shipped", mode="eager"),
    ]
    found = []
    for row in [*rows, tuned_row(case, mode="eager")]:
        update = row.build()
        for _ in range(3):
            update()
        found.append(parameters_of(update.loss))
    for other in found[1:]:
        for name, parameter in found[0].items():
            torch.testing.assert_close(other[name], parameter, rtol=1e-4, atol=1e-6, msg=name)


@each_kind
@pytest.mark.parametrize("order", ["joint", "paper"])
def test_our_row_changes_every_parameter(case, order):
    step = our_row(case, order=order, mode="eager").build()
    assert_every_parameter_moves(step, step.loss)
    assert step.count == 4


def test_our_row_counts_the_updates_of_all_seeds():
    case = Case(name="several", seeds=2, updates_per_call=3, **SMALL)
    row = our_row(case, order="paper", mode="eager")
    step = row.build()
    step()
    assert row.updates == 6 and step.count == 3 and len(step.losses) == 2


def numpy_network(module):
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return {
        "weights": [layer.weight.detach().numpy() for layer in layers],
        "biases": [layer.bias.detach().numpy() for layer in layers],
    }


def numpy_networks(plain):
    networks = {
        "actor": numpy_network(plain.actor) | {"log_std": plain.actor.log_std.detach().numpy()},
        "value": numpy_network(plain.value),
        "qvalue": [numpy_network(plain.qvalue.first), numpy_network(plain.qvalue.second)],
        "target_qvalue": [numpy_network(plain.target_qvalue.first), numpy_network(plain.target_qvalue.second)],
    }
    return reference_iql.copy_networks(networks)


def test_plain_pytorch_is_the_reference_of_corl():
    case = Case(name="float64", precision="float64", **SMALL)
    plain = PlainIQL(case, total_steps=4)
    plain.data[4].copy_(torch.arange(case.transitions)[:, None] % 3 == 0)
    networks, batches, losses = numpy_networks(plain), [], []
    for _ in range(3):
        batch = plain.sample()
        observation, action, reward, following, terminated = (entry.numpy() for entry in batch)
        names = ("observation", "action", "reward", "next_observation", "terminated")
        batches.append(dict(zip(names, (observation, action, reward[:, 0], following, terminated[:, 0]), strict=True)))
        losses.append(plain.update(*batch))
    hyperparameters = reference_iql.Hyperparameters(total_steps=4)
    expected, expected_losses = reference_iql.train(reference_iql.VARIANTS["corl"], networks, batches, hyperparameters)
    for found, wanted in zip(losses, expected_losses, strict=True):
        assert found == pytest.approx(wanted, rel=1e-10)
    found = numpy_networks(plain)
    for one, other in [
        (found["actor"], expected["actor"]),
        (found["value"], expected["value"]),
        *zip(found["qvalue"], expected["qvalue"], strict=True),
        *zip(found["target_qvalue"], expected["target_qvalue"], strict=True),
    ]:
        reference_iql.map_parameters(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one, other)


def test_plain_pytorch_normalises_layers_where_asked():
    plain = plain_row(KINDS["layer norm"]).build()
    norms = [layer for layer in plain.value.modules() if isinstance(layer, nn.LayerNorm)]
    assert len(norms) == 2
    before = norms[0].weight.detach().clone()
    plain()
    assert not norms[0].weight.equal(before)
