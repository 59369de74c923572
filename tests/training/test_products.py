"""Matrix products by oneDNN: their numbers, who chooses them, and what a run remembers of the choice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import random_transitions, small_loss
from torch import nn
from torchrl.modules import ValueOperator

from iql_torchrl import IQLLoss, TrainingStep, build_actor, build_qvalues, build_value, make_buffer, train
from iql_torchrl.configuration.declaring import ConfigurationError
from iql_torchrl.training import products
from iql_torchrl.training.checkpoints import load_checkpoint
from iql_torchrl.training.products import multiply, multiply_all, resolve_products, why_not

CPU = torch.device("cpu")
COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]
needs_onednn = pytest.mark.skipif(bool(why_not(CPU, torch.float32)), reason=why_not(CPU, torch.float32))


def in_memory(tensor, layout):
    """The same numbers by rows, by columns, in a wider matrix, or from every other element."""
    if layout == "columns":
        return tensor.mT.contiguous().mT
    if layout == "wider":
        return torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., : tensor.shape[-1]]
    if layout == "scattered":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]
    return tensor


@needs_onednn
@pytest.mark.parametrize("right_layout", ["rows", "columns", "wider", "scattered"])
@pytest.mark.parametrize("left_layout", ["rows", "columns", "wider", "scattered"])
@pytest.mark.parametrize(
    ("left_shape", "right_shape"),
    [
        ((5, 7), (7, 3)),
        ((256, 23), (23, 256)),
        ((100, 70), (70, 300)),
        ((1, 9), (9, 33)),
        ((33, 9), (9, 1)),
        ((17, 1), (1, 19)),
        ((1, 1), (1, 1)),
        ((2, 40, 17), (2, 17, 65)),
        ((5, 1, 6), (5, 6, 1)),
        ((150, 1100), (1100, 75)),  # more summands and columns than a panel has
        ((2, 40, 700), (2, 700, 200)),
    ],
)
def test_products_equal_those_in_double_precision(left_shape, right_shape, left_layout, right_layout):
    torch.manual_seed(0)
    left, right = torch.randn(left_shape), torch.randn(right_shape)
    expected = (left.double() @ right.double()).float()
    found = multiply(in_memory(left, left_layout), in_memory(right, right_layout))
    tolerance = {"atol": max(3e-5, 5e-7 * left.shape[-1]), "rtol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)
    out = torch.full_like(expected, torch.nan)
    assert multiply(left, right, out) is out
    torch.testing.assert_close(out, expected, **tolerance)


@needs_onednn
def test_several_products_in_one_call_are_those_of_a_call_each():
    torch.manual_seed(0)
    pairs = [(torch.randn(30, 20), torch.randn(20, 50)), (torch.randn(3, 40, 9), torch.randn(3, 9, 8))]
    pairs.append((torch.randn(20, 30).mT, in_memory(torch.randn(20, 5), "scattered")))
    results = [torch.full((*left.shape[:-1], right.shape[-1]), torch.nan) for left, right in pairs]
    multiply_all([(left, right, out) for (left, right), out in zip(pairs, results, strict=True)])()
    for (left, right), out in zip(pairs, results, strict=True):
        assert torch.equal(out, multiply(left, right))


@needs_onednn
def test_operands_that_several_products_share_are_not_copied_first():
    left, right = torch.randn(8, 5), torch.randn(3, 5, 6)
    torch.testing.assert_close(multiply(left.expand(3, 8, 5), right), left @ right)


@needs_onednn
@pytest.mark.parametrize("inner", [20, 1050])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_what_follows_a_product_is_relu_of_the_sum_or_the_gradient_of_relu(batch, inner):
    torch.manual_seed(1)
    left, right = torch.randn(*batch, 150, inner), torch.randn(*batch, inner, 70)
    bias, gate = torch.randn(*batch, *([1] if batch else []), 70), torch.randn(*batch, 150, 70)
    gate[..., 3, 4], gate[..., 5, 6] = 0.0, torch.nan
    left[..., 7, 2] = torch.nan
    product = (left.double() @ right.double()).float()
    tolerance = {"atol": max(3e-6, 5e-7 * inner), "rtol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(multiply(left, right, bias=bias), (product + bias).relu(), **tolerance)
    for operand in (right, in_memory(right, "columns")):
        found = multiply(left, operand, gate=gate)
        torch.testing.assert_close(found, torch.where(gate <= 0, 0.0, product), **tolerance)


@needs_onednn
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads):
    torch.manual_seed(2)
    left, right = torch.randn(200, 90), torch.randn(90, 130)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [multiply(left, right), multiply(left, right.mT.contiguous().mT), multiply(left.mT, left)]
        torch.set_num_threads(threads)
        found = [multiply(left, right), multiply(left, right.mT.contiguous().mT), multiply(left.mT, left)]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found, expected))


def parameters_after(updates, choice, *, seeds=1, **options):
    losses = [small_loss(seed) for seed in range(seeds)]
    buffers = [make_buffer(random_transitions(), batch_size=32, seed=seed) for seed in range(seeds)]
    several = seeds > 1
    step = TrainingStep(
        losses if several else losses[0],
        buffers if several else buffers[0],
        products=choice,
        total_steps=50,
        **options,
    )
    for _ in range(updates):
        step()
    assert step.products == choice
    return [dict(loss.state_dict()) for loss in losses], step


@needs_onednn
@pytest.mark.parametrize(
    ("seeds", "stacked", "compile"),
    [
        *((1, False, False), (3, False, False), (3, True, False)),
        *(pytest.param(seeds, True, True, marks=pytest.mark.slow) for seeds in (1, 3)),
    ],
)
@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_an_update_is_that_of_pytorchs_products_within_rounding(order, seeds, stacked, compile):
    options = {"compile": compile, "order": order, "seeds": seeds, "stacked": stacked}
    expected, _ = parameters_after(5, "mkl", **options)
    found, step = parameters_after(5, "onednn", **options)
    again, _ = parameters_after(5, "onednn", **options)
    assert not step.compile_note
    for reference, other, same in zip(expected, found, again, strict=True):
        for name, value in reference.items():
            torch.testing.assert_close(other[name], value, atol=2e-5, rtol=1e-4)
            assert torch.equal(other[name], same[name]), name


def test_double_precision_keeps_pytorchs_products():
    step = TrainingStep(small_loss().double(), make_buffer(random_transitions().double(), batch_size=8), compile=False)
    assert step.products == "mkl" and not step.products_note


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.float32, "products must be auto or mkl here, got 'onednn': oneDNN is for CPUs, .* is cuda."),
        ("cpu", torch.float64, "oneDNN's products are of float32, and the parameters are float64."),
    ],
)
def test_onednn_is_refused_where_it_cannot_be(device, dtype, expected):
    with pytest.raises(ValueError, match=expected):
        resolve_products("onednn", torch.device(device), dtype, [(8, 1, 4, 4)])
    assert resolve_products("auto", torch.device(device), dtype, [(8, 1, 4, 4)]) == ("mkl", "")


def test_onednn_is_refused_with_other_precisions():
    buffer = make_buffer(random_transitions(), batch_size=8)
    with pytest.raises(ValueError, match="products must be auto or mkl with precision=bfloat16, got 'onednn'"):
        TrainingStep(small_loss(), buffer, products="onednn", precision="bfloat16", compile=False)
    assert TrainingStep(small_loss(), buffer, precision="bfloat16", compile=False).products == "mkl"


def test_without_avx_512_onednn_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(ValueError, match="needs AVX-512, which this processor has not"):
        resolve_products("onednn", CPU, torch.float32, [(8, 1, 4, 4)])


@needs_onednn
@pytest.mark.parametrize(("ratio", "choice"), [(2.0, "onednn"), (1.05, "mkl"), (0.5, "mkl")])
def test_the_choice_is_measured_once_on_a_machine(tmp_path, monkeypatch, ratio, choice):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    products._faster_by.cache_clear()
    try:
        random_state = torch.get_rng_state()
        resolve_products("auto", CPU, torch.float32, [(64, 1, 32, 32)])
        # Or a run's first dropout would depend on whether the machine had been measured before.
        assert torch.equal(torch.get_rng_state(), random_state)
        (file,) = tmp_path.glob("*.json")
        ((key, measured),) = json.loads(file.read_text()).items()
        assert measured > 0
        file.write_text(json.dumps({key: ratio, "another": 1.0}))
        products._faster_by.cache_clear()
        found, note = resolve_products("auto", CPU, torch.float32, [(64, 1, 32, 32)])
        assert found == choice and f"take {1 / ratio:.2f} times as long as MKL's" in note
        assert json.loads(file.read_text()) == {key: ratio, "another": 1.0}
        file.write_text("{damaged")
        products._faster_by.cache_clear()
        resolve_products("auto", CPU, torch.float32, [(64, 1, 32, 32)])
        assert list(json.loads(file.read_text())) == [key]
    finally:
        products._faster_by.cache_clear()


@needs_onednn
@pytest.mark.parametrize(("compile", "how"), [(False, "alone"), (True, "in an update")])
def test_what_is_measured_are_the_weights_of_the_networks_as_the_update_multiplies_with_them(
    tmp_path, monkeypatch, compile, how
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    actor, critics, value = (
        build(5, *more, hidden_dims=(16, 8), layer_norm=True)
        for build, more in ((build_actor, (2,)), (build_qvalues, (2,)), (build_value, ()))
    )
    buffer = make_buffer(random_transitions(), batch_size=32, seed=0)
    products._faster_by.cache_clear()
    try:
        TrainingStep(IQLLoss(actor, critics, value), buffer, compile=compile)
    finally:
        products._faster_by.cache_clear()
    (file,) = tmp_path.glob("*.json")
    (key,) = json.loads(file.read_text())
    # Batch, networks, inputs, outputs: neither the biases of two critics nor their layer norms are a layer.
    layers = [
        (32, 1, 5, 16),
        (32, 1, 8, 1),
        (32, 1, 8, 2),
        (32, 1, 16, 8),
        (32, 2, 7, 16),
        (32, 2, 8, 1),
        (32, 2, 16, 8),
    ]
    assert key.endswith(f"threads, {how}, {tuple(layers)}")


@needs_onednn
@pytest.mark.parametrize("fused", [False, True])
def test_layers_that_onednn_does_not_multiply_decide_nothing(tmp_path, monkeypatch, fused):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    choice, note = resolve_products("auto", CPU, torch.float32, [(256, 1, 64, 1), (256, 2, 1, 64)], fused=fused)
    assert choice == "mkl" and "take 1.00 times as long as MKL's" in note


class Table(nn.Module):
    """V and its like without a matrix product."""

    def __init__(self, inputs=5):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(inputs))

    def forward(self, observation):
        return (observation * self.scale).sum(-1, keepdim=True)


@needs_onednn
@pytest.mark.parametrize("compile", COMPILED)
def test_networks_that_are_partly_not_linear_keep_what_they_did(compile):
    def parameters(choice):
        torch.manual_seed(0)
        actor, critics = build_actor(5, 2, hidden_dims=(16,)), build_qvalues(5, 2, hidden_dims=(16,))
        loss = IQLLoss(actor, critics, ValueOperator(Table(), in_keys=["observation"]))
        buffer = make_buffer(random_transitions(), batch_size=32, seed=0)
        step = TrainingStep(loss, buffer, products=choice, compile=compile)
        for _ in range(3):
            step()
        return loss.state_dict()

    expected, found = parameters("mkl"), parameters("onednn")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_without_a_linear_layer_onednn_changes_nothing_and_says_so():
    choice, note = resolve_products("onednn", CPU, torch.float32, [])
    assert why_not(CPU, torch.float32) or (choice == "mkl" and "no linear layer" in note)


# ------------------------------------------------------------------------------------------ of a run


def log():
    rng = np.random.default_rng(0)
    observations, actions = rng.standard_normal((400, 4)), rng.uniform(-0.9, 0.9, (400, 2))
    return {"observations": observations, "actions": actions, "rewards": observations[:, 0]} | {
        "terminals": np.arange(400) % 40 == 39
    }


def trained(folder, steps, choice, **options):
    options = {"train.compile": False, "train.products": choice, "checkpoint.interval": 20, **options}
    return train(
        log(),
        environment=None,
        steps=steps,
        folder=folder,
        options=options,
        hidden_dims=[32, 32],
        opt_decay_schedule=None,
    )


@needs_onednn
@pytest.mark.parametrize("choice", ["mkl", "onednn"])
def test_a_resumed_run_keeps_its_products_bit_for_bit(tmp_path, choice, capsys):
    straight = trained(tmp_path / "straight", 40, choice, **{"train.log_interval": 20})
    trained(tmp_path / "resumed", 20, choice, **{"train.log_interval": 20})
    options = {"train.steps": 40, "train.products": "auto", "resume_with_changes": True}
    resumed = train(log(), environment=None, folder=tmp_path / "resumed", resume=True, options=options)
    assert resumed.step.count == 40 and resumed.step.products == straight.step.products == choice
    assert resumed.summary["products"] == choice
    for name, value in straight.step.loss.state_dict().items():
        assert torch.equal(resumed.step.loss.state_dict()[name], value), name
    assert "other rounding" not in capsys.readouterr().out


@needs_onednn
def test_a_run_resumed_with_other_products_says_that_bits_will_differ(tmp_path, capsys):
    trained(tmp_path / "run", 20, "onednn")
    options = {"train.steps": 40, "train.products": "mkl", "resume_with_changes": True}
    resumed = train(log(), environment=None, folder=tmp_path / "run", resume=True, options=options)
    assert resumed.step.products == "mkl"
    assert "step-00000020.pt were onednn, and are mkl now: the run goes on with other rounding" in (
        capsys.readouterr().out
    )


@needs_onednn
def test_checkpoints_that_name_no_products_had_pytorchs(tmp_path):
    run = trained(tmp_path / "run", 20, "mkl")
    (path,) = Path(tmp_path, "run", "checkpoints").glob("step-*.pt")
    content = load_checkpoint(path)
    assert content.pop("products") == "mkl"
    torch.save(content, path)
    options = {"train.steps": 40, "train.products": "auto", "resume_with_changes": True}
    resumed = train(log(), environment=None, folder=tmp_path / "run", resume=True, options=options)
    assert resumed.step.products == run.step.products == "mkl"


def test_an_unknown_choice_is_one_clear_error():
    with pytest.raises(
        ConfigurationError, match=r"train.products must be one of auto, mkl, onednn, tensor_cores, got 'openblas'"
    ):
        trained(None, 5, "openblas")
