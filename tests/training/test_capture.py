"""CUDA graphs: a call captured once is the call; and what a machine without a GPU can tell."""

import copy

import pytest
import torch
from problems import random_transitions, small_loss

from iql_torchrl import TrainingStep, make_buffer
from iql_torchrl.training.devices import resolve_device

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COMPILED = [False, pytest.param(True, marks=pytest.mark.slow)]
# The first calls run as they are; these are enough for the capture and replays after it.
CALLS = 12
LOSSES = {"loss_actor", "loss_qvalue", "loss_value", "entropy"}


def step_on_the_gpu(seeds, *, cudagraphs, compile=False, replacement=True, dtype=torch.float32, **options):
    transitions = random_transitions().apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    losses, buffers = [], []
    for seed in seeds:
        loss = small_loss(seed)
        loss.make_value_estimator(gamma=0.97)
        losses.append(loss.to("cuda", dtype))
        buffers.append(make_buffer(transitions, batch_size=32, seed=seed, replacement=replacement, device="cuda"))
    alone = len(seeds) == 1
    return TrainingStep(
        losses[0] if alone else losses,
        buffers[0] if alone else buffers,
        total_steps=100,
        compile=compile,
        cudagraphs=cudagraphs,
        **options,
    )


def assert_close(expected, found, where="state"):
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), where
        for key in expected:
            assert_close(expected[key], found[key], f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        # Another kernel may round otherwise; an update left out or done twice moves parameters by the rate, 3e-4.
        options = {"rtol": 1e-3, "atol": 1e-4} if expected.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found, expected, **options, msg=lambda message: f"{where}: {message}")
    else:
        assert expected == found, where


@gpu
@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("updates_per_call", [1, 4])
@pytest.mark.parametrize(
    ("seeds", "stacked"),
    [((3,), True), ((3, 4, 5), True), ((3, 4, 5), False)],
    ids=["one run", "three runs", "three runs, one after another"],
)
@pytest.mark.parametrize("compile", COMPILED)
def test_the_captured_step_equals_the_eager_one(compile, seeds, stacked, updates_per_call, order):
    options = {"updates_per_call": updates_per_call, "order": order, "stacked": stacked}
    eager = step_on_the_gpu(seeds, cudagraphs=False, **options)
    captured = step_on_the_gpu(seeds, cudagraphs=True, compile=compile, **options)
    assert captured.captured and not eager.captured
    kept = []
    for call in range(1, CALLS + 1):
        expected, found = eager(), captured()
        assert found.keys() == LOSSES
        for name, loss in found.items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-3, atol=1e-4)
        kept.append((found, {name: loss.clone() for name, loss in found.items()}))
        assert captured.count == eager.count == call * updates_per_call
        for run in range(len(seeds)):
            assert torch.equal(captured.batch(run)["action"], eager.batch(run)["action"])
    assert captured.learning_rates == pytest.approx(eager.learning_rates)
    for run in range(len(seeds)):
        assert_close(eager.state_dict(run), captured.state_dict(run))
    for returned, clones in kept:  # a replay writes over what an earlier one returned only if that is not copied
        for name, loss in returned.items():
            assert torch.equal(loss, clones[name])


@gpu
@pytest.mark.parametrize("seeds", [(3,), (3, 4)], ids=["one run", "two runs"])
@pytest.mark.parametrize("compile", COMPILED)
def test_branches_side_by_side_change_no_bit(compile, seeds):
    in_order = step_on_the_gpu(seeds, cudagraphs=False, compile=compile, updates_per_call=4)
    branched = step_on_the_gpu(seeds, cudagraphs=True, compile=compile, updates_per_call=4)
    for _ in range(CALLS):
        in_order(), branched()
    for run in range(len(seeds)):
        expected, found = in_order.state_dict(run)["loss"], branched.state_dict(run)["loss"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@gpu
@pytest.mark.parametrize("calls_before_loading", [1, 3, 8])
def test_a_state_loaded_into_a_captured_step_is_where_it_goes_on(calls_before_loading):
    straight = step_on_the_gpu((3, 4), cudagraphs=True, replacement=False)
    for _ in range(5):
        straight()
    states = [copy.deepcopy(straight.state_dict(run)) for run in range(2)]
    for _ in range(5):
        straight()
    resumed = step_on_the_gpu((8, 9), cudagraphs=True, replacement=False)
    for _ in range(calls_before_loading):
        resumed()
    for run, state in enumerate(states):
        resumed.load_state_dict(state, run)
    for _ in range(5):
        resumed()
    for run in range(2):
        assert_close(straight.state_dict(run), resumed.state_dict(run))


@gpu
def test_a_hyperparameter_assigned_after_the_capture_takes_effect_at_the_next_update():
    step = step_on_the_gpu((3,), cudagraphs=True)
    for _ in range(6):
        before = step()
    assert abs(float(before["loss_actor"] - before["entropy"])) > 1e-6
    step.loss.temperature = 0.0
    reported = step()
    # With every weight 1, the policy's loss is the negative log-likelihood, as is the entropy reported.
    torch.testing.assert_close(reported["loss_actor"], reported["entropy"])


@gpu
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_captured_steps_of_lower_precision_stay_close_to_float32(precision):
    before = torch.get_float32_matmul_precision()
    try:
        exact = step_on_the_gpu((3, 4), cudagraphs=True)
        expected = [exact() for _ in range(8)]
        step = step_on_the_gpu((3, 4), cudagraphs=True, precision=precision)
        for losses in expected:
            for name, loss in step().items():
                assert torch.isfinite(loss).all()
                torch.testing.assert_close(loss.float(), losses[name], rtol=0.05, atol=0.02)
    finally:
        torch.set_float32_matmul_precision(before)


@gpu
@pytest.mark.parametrize("cudagraphs", [False, True])
def test_float64_trains_on_a_gpu_as_on_the_cpu(cudagraphs):
    step = step_on_the_gpu((3,), cudagraphs=cudagraphs, dtype=torch.float64, order="joint")
    for _ in range(8):
        losses = step()
    reference = small_loss(3)
    reference.make_value_estimator(gamma=0.97)
    reference.double().load_state_dict({name: value.cpu() for name, value in step.loss.state_dict().items()})
    torch.testing.assert_close(
        step.loss(step.batch())["loss_qvalue"].cpu(), reference(step.batch().cpu())["loss_qvalue"], rtol=1e-9, atol=1e-9
    )
    assert all(torch.isfinite(loss) and loss.dtype == torch.float64 for loss in losses.values())


@gpu
def test_the_gpu_need_not_be_numbered():
    assert resolve_device("cuda").type == resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:0") == torch.device("cuda:0")


@gpu
def test_on_a_gpu_auto_captures():
    assert step_on_the_gpu((3,), cudagraphs="auto").captured
    assert not step_on_the_gpu((3,), cudagraphs=False).captured


def test_on_the_cpu_auto_captures_nothing_and_the_step_trains(buffer):
    step = TrainingStep(small_loss(), buffer, compile=False, cudagraphs="auto")
    assert step.captured is False
    assert all(torch.isfinite(loss) for loss in step().values())
    assert TrainingStep(small_loss(), buffer, compile=False, cudagraphs=False).captured is False
