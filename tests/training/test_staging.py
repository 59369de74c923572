"""Batches of data that lie elsewhere than on the training device; on the CPU, where both are one."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import ACTION_DIM, OBSERVATION_DIM, random_transitions, small_loss

from iql_torchrl import TrainingStep, make_buffer
from iql_torchrl.training.staging import Staging

CPU = torch.device("cpu")
SHAPES = [(1, (8,)), (3, (8,)), (1, (2, 8)), (4, (3, 8))]
each_shape = pytest.mark.parametrize(("updates", "shape"), SHAPES)


def draw(updates, shape, seed, rows=500):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(rows, (updates, *shape), generator=generator)


def entries(tensordict):
    return dict(tensordict.items(True, True))


# ---- what is staged


@each_shape
def test_each_staged_batch_holds_the_rows_asked_for(updates, shape, transitions):
    staging = Staging(transitions, CPU)
    for seed in range(5):
        index = draw(updates, shape, seed)
        staged, places = staging(index)
        assert len(places) == updates
        for rows, place in zip(index, places, strict=True):
            assert place.shape == rows.shape == shape
            expected, found = entries(transitions[rows]), entries(staged[place])
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@each_shape
def test_every_call_fills_the_same_tensors(updates, shape, transitions):
    staging = Staging(transitions, CPU)
    staged, _ = staging(draw(updates, shape, 0))
    addresses = {key: value.data_ptr() for key, value in entries(staged).items()}
    before = staged["observation"].clone()
    for seed in range(1, 5):
        again, _ = staging(draw(updates, shape, seed))
        assert again is staged
        assert {key: value.data_ptr() for key, value in entries(again).items()} == addresses
    assert not torch.equal(staged["observation"], before)


def test_the_staged_rows_are_copies_and_as_many_as_asked_for(transitions):
    before = transitions.clone()
    staged, _ = Staging(transitions, CPU)(draw(3, (2, 8), 0))
    assert staged.batch_size == (48,)
    for value in entries(staged).values():
        value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in entries(transitions).items())


def test_rows_drawn_twice_are_staged_twice(transitions):
    staged, (places,) = Staging(transitions, CPU)(torch.tensor([[7, 7, 499, 0, 7]]))
    assert torch.equal(staged["observation"][places], transitions["observation"][[7, 7, 499, 0, 7]])


def test_data_that_change_are_staged_as_they_are_at_the_call(transitions):
    staging, index = Staging(transitions, CPU), draw(1, (8,), 0)
    staging(index)
    transitions["next", "reward"].add_(1)
    staged, (places,) = staging(index)
    assert torch.equal(staged["next", "reward"][places], transitions["next", "reward"][index[0]])


# ---- training on what is staged


@pytest.fixture
def as_if_elsewhere(monkeypatch):
    """Make steps built from now on take their data to lie on another device."""

    def pretend():
        monkeypatch.setattr("iql_torchrl.training.staging._device_of", lambda data: torch.device("meta"))

    return pretend


def build(runs=None, *, replacement=True, compile=False, **options):
    losses = [small_loss(seed, dropout=options.pop("dropout", None)) for seed in range(runs or 1)]
    data = random_transitions()
    buffers = [make_buffer(data, batch_size=32, seed=10 + seed, replacement=replacement) for seed in range(runs or 1)]
    if runs is None:
        return TrainingStep(losses[0], buffers[0], compile=compile, **options)
    return TrainingStep(losses, buffers, compile=compile, **options)


def assert_same_training(plain, staged, calls):
    assert plain._staging is None and staged._staging is not None
    random_state = torch.get_rng_state()
    reported = []
    for step in (plain, staged):
        torch.set_rng_state(random_state)
        reported.append([{key: value.clone() for key, value in step().items()} for _ in range(calls)])
    for found, expected in zip(reported[1], reported[0], strict=True):
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert plain.count == staged.count == calls * plain.updates_per_call
    for run in range(len(plain.losses)):
        expected, found = plain.state_dict(run), staged.state_dict(run)
        for name, value in expected["loss"].items():
            assert torch.equal(found["loss"][name], value), name
        for name, states in expected["optimizers"].items():
            for key, value in states.items():
                assert torch.equal(found["optimizers"][name][key], value), (name, key)
        assert torch.equal(found["generator"], expected["generator"])
        batches = [entries(step.batch(run)) for step in (plain, staged)]
        assert all(torch.equal(batches[1][key], value) for key, value in batches[0].items())


OPTIONS = {
    "sequential": {},
    "joint": {"order": "joint"},
    "schedule": {"total_steps": 20},
    "dropout": {"dropout": 0.2},
    "passes": {"replacement": False},
    "several updates a call": {"updates_per_call": 3},
    "two runs": {"runs": 2},
    "two runs, several updates a call": {"runs": 2, "updates_per_call": 3},
    "two runs, stacked": {"runs": 2, "stacked": True},
    "two runs, stacked, several updates a call": {"runs": 2, "stacked": True, "updates_per_call": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_on_staged_batches_equals_training_on_the_data_bit_for_bit(options, as_if_elsewhere):
    plain = build(**options)
    as_if_elsewhere()
    staged = build(**options)
    assert_same_training(plain, staged, calls=8)
    assert not staged.compile_note  # it was recorded, and not run as it stands


@pytest.mark.slow
def test_compiled_training_on_staged_batches_equals_training_on_the_data_bit_for_bit(as_if_elsewhere):
    options = {"updates_per_call": 2, "total_steps": 20, "compile": True}
    plain = build(**options)
    as_if_elsewhere()
    staged = build(**options)
    assert_same_training(plain, staged, calls=8)
    assert plain.compiled and staged.compiled


@pytest.mark.parametrize(
    "options",
    [{}, {"runs": 2, "updates_per_call": 3}, {"runs": 2, "updates_per_call": 3, "stacked": True}],
    ids=["one run", "two runs", "two runs, stacked"],
)
def test_a_recorded_update_finds_every_new_batch(options, as_if_elsewhere):
    as_if_elsewhere()
    step = build(**options)
    seen = []
    for _ in range(5):
        step()
        seen.append(step.batch()["observation"].clone())
    assert all(not torch.equal(first, second) for first, second in itertools.pairwise(seen))
    assert seen[0].shape == (32, OBSERVATION_DIM) and step.batch()["action"].shape == (32, ACTION_DIM)


@pytest.mark.parametrize("replacement", [True, False])
def test_a_staged_run_resumes_bit_for_bit(replacement, as_if_elsewhere):
    as_if_elsewhere()
    straight = build(replacement=replacement, updates_per_call=2)
    for _ in range(5):
        straight()
    state = straight.state_dict()
    for _ in range(5):
        straight()
    resumed = build(replacement=replacement, updates_per_call=2)
    resumed()  # anything that it did before must not matter
    resumed.load_state_dict(state)
    for _ in range(5):
        resumed()
    expected, found = straight.state_dict()["loss"], resumed.state_dict()["loss"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_data_on_the_training_device_are_not_staged(buffer):
    assert TrainingStep(small_loss(), buffer, compile=False)._staging is None
