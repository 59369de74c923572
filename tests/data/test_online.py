"""Batches of a dataset and of what is added to it."""

import pytest
import torch
from problems import random_transitions
from torchrl.data import RandomSampler

from iql_torchrl.data.buffer import make_buffer
from iql_torchrl.data.online import Draws, OnlineSampler, with_room

OFFLINE, START, ROOM = 500, 700, 200


def rows(draws, added, batch_size=100, batches=200):
    sampler = OnlineSampler(OFFLINE, START, ROOM, draws)
    buffer = make_buffer(with_room(random_transitions(), 400), batch_size=batch_size, seed=0, sampler=sampler)
    sampler.added = added
    return torch.stack([sampler.sample(buffer.storage, batch_size)[0] for _ in range(batches)])


def test_uniform_draws_are_from_the_dataset_and_what_was_added_by_this_run_alone():
    found = rows(Draws(), added=100)
    allowed = torch.cat([torch.arange(OFFLINE), torch.arange(START, START + 100)])
    counts = torch.bincount(found.flatten(), minlength=900)
    assert counts[allowed].min() > 0 and counts.sum() == counts[allowed].sum()
    # 20,000 draws from 600 rows: a sixth are of those added, within five standard deviations.
    assert abs(int(counts[START:].sum()) - 20_000 / 6) < 5 * (20_000 * 5 / 36) ** 0.5


@pytest.mark.parametrize(("fraction", "anneal_to", "added", "expected"), [
    (0.5, None, 50, 50), (0.25, None, 1, 25), (0.0, None, 9, 0), (1.0, None, 9, 100),
    (0.5, 0.0, 100, 25), (0.5, 0.0, 200, 0), (0.2, 1.0, 50, 40),
])  # fmt: skip
def test_a_batch_has_exactly_its_share_of_the_dataset(fraction, anneal_to, added, expected):
    found = rows(Draws(fraction, anneal_to), added)
    assert ((found < OFFLINE).sum(1) == expected).all()
    own = found[found >= OFFLINE]
    assert ((own >= START) & (own < START + added)).all()
    if expected < 100:
        assert own.unique().numel() == added


def test_before_anything_is_added_batches_are_those_of_an_offline_run():
    buffer = make_buffer(random_transitions(), batch_size=100, seed=0)
    assert isinstance(buffer.sampler, RandomSampler)
    expected = torch.stack([buffer.sampler.sample(buffer.storage, 100)[0] for _ in range(3)])
    torch.testing.assert_close(rows(Draws(0.5), added=0, batches=3), expected)


def test_the_room_lies_behind_the_dataset_which_is_unchanged():
    transitions = random_transitions()
    found = with_room(transitions, 30)
    assert len(found) == 530 and "episode" not in found.keys()  # noqa: SIM118
    for key, value in found.items(True, True):
        torch.testing.assert_close(value[:500], transitions.get(key))
