"""Rewards, observations, actions, the buffer and the split."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from iql_torchrl import load_transitions, make_buffer
from iql_torchrl.data.actions import action_bounds, normalise_actions
from iql_torchrl.data.buffer import split_episodes
from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.data.rewards import transform_rewards
from iql_torchrl.errors import ConfigurationError, DatasetError


@pytest.fixture
def transitions_of(write_log):
    def load(arrays):
        return load_transitions("hdf5", path=write_log(arrays))

    return load


# ---- rewards


def test_return_range_scales_the_returns_to_a_range_of_a_thousand(log_arrays, transitions_of):
    arrays = log_arrays(200, terminals=[9, 10, 63, 140], timeouts=[100, 180])
    transitions = transitions_of(arrays)
    returns, running = [], 0.0
    for row in range(199):
        if not arrays["timeouts"][row]:
            running += float(arrays["rewards"][row])
        if arrays["terminals"][row] or arrays["timeouts"][row]:
            returns, running = [*returns, running], 0.0
    returns.append(running)
    kept = arrays["rewards"][:-1][~arrays["timeouts"][:-1]].astype(np.float64)

    scale, shift = transform_rewards(transitions, "return_range")
    assert scale == pytest.approx(1000 / (max(returns) - min(returns)), rel=1e-9) and shift == 0
    np.testing.assert_allclose(transitions["next", "reward"][:, 0].numpy(), kept * scale, rtol=1e-6)


def test_minus_one_subtracts_one(log_arrays, transitions_of):
    arrays = log_arrays()
    transitions = transitions_of(arrays)
    assert transform_rewards(transitions, "minus_one") == (1, -1)
    np.testing.assert_array_equal(transitions["next", "reward"][:, 0].numpy(), arrays["rewards"][:-1] - np.float32(1))


def test_none_leaves_the_rewards_as_they_are(log_arrays, transitions_of):
    arrays = log_arrays()
    transitions = transitions_of(arrays)
    assert transform_rewards(transitions, "none") == (1, 0)
    np.testing.assert_array_equal(transitions["next", "reward"][:, 0].numpy(), arrays["rewards"][:-1])


@pytest.mark.parametrize("terminals", [(), (9, 19, 29)], ids=["one episode", "four equal episodes"])
def test_return_range_refuses_episodes_of_equal_returns(terminals, log_arrays, transitions_of):
    arrays = log_arrays(41, terminals=terminals)
    arrays["rewards"][:] = 0.5
    transitions = transitions_of(arrays)
    before = transitions.clone()
    with pytest.raises(DatasetError, match=r"return_range.*algorithm.reward_transform=none"):
        transform_rewards(transitions, "return_range")
    assert transitions["next", "reward"].equal(before["next", "reward"])


def test_an_unknown_reward_transform_is_refused_with_the_nearest_known_one(log_arrays, transitions_of):
    with pytest.raises(ConfigurationError, match=r"algorithm\.reward_transform.*did you mean 'return_range'"):
        transform_rewards(transitions_of(log_arrays()), "return-range")


# ---- observations


@pytest.mark.parametrize("rows", [3, 50, 250_001])
def test_the_normaliser_holds_float64_moments_of_the_observations(rows, log_arrays, transitions_of):
    arrays = log_arrays(rows, seed=3, observation_dim=2, action_dim=1)
    # A far mean with a small spread: float32 sums would lose the spread.
    arrays["observations"] = arrays["observations"] * np.float32([0.01, 5]) + np.float32([1000, -2])
    normaliser = ObservationNormaliser.fit(transitions_of(arrays))
    exact = arrays["observations"][:-1].astype(np.float64)
    assert normaliser.mean.dtype == normaliser.std.dtype == torch.float32
    np.testing.assert_allclose(normaliser.mean.numpy(), exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(normaliser.std.numpy(), exact.std(0) + 1e-3, rtol=1e-6)


def test_observations_and_next_observations_are_normalised_alike(log_arrays, transitions_of):
    arrays = log_arrays(300, terminals=[50], timeouts=[120])
    transitions = transitions_of(arrays)
    before = transitions.clone()
    normaliser = ObservationNormaliser.fit(transitions)
    normaliser.apply_(transitions)
    mean, std = before["observation"].double().mean(0), before["observation"].double().std(0, correction=0) + 1e-3
    for key in ("observation", ("next", "observation")):
        torch.testing.assert_close(transitions[key], ((before[key] - mean) / std).float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(normaliser(before[key]), transitions[key])
    for key in ("action", "episode", ("next", "reward"), ("next", "done")):
        assert transitions[key].equal(before[key])


def test_an_observation_that_never_changes_becomes_zero(log_arrays, transitions_of):
    arrays = log_arrays()
    arrays["observations"][:, 1] = 7
    transitions = transitions_of(arrays)
    ObservationNormaliser.fit(transitions).apply_(transitions)
    assert transitions["observation"][:, 1].tolist() == [0] * 39


def test_the_normaliser_takes_single_observations_and_any_batch(log_arrays, transitions_of):
    transitions = transitions_of(log_arrays())
    normaliser = ObservationNormaliser.fit(transitions)
    observation = transitions["observation"][:6]
    assert torch.equal(normaliser(observation)[2], normaliser(observation[2]))
    assert torch.equal(normaliser(observation.reshape(2, 3, 3)), normaliser(observation).reshape(2, 3, 3))


# ---- actions

UNIT = torch.ones(2)


def with_actions(arrays, low, high):
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    arrays["actions"] = (low + (arrays["actions"].astype(np.float64) + 1) / 2 * (high - low)).astype(np.float32)
    return arrays


@pytest.mark.parametrize(
    ("low", "high"), [([-2, -2], [2, 2]), ([0, -1], [10, 1]), ([-0.4, 3], [0.4, 3.5]), ([-1000, -1], [3000, -0.5])]
)
def test_actions_are_rescaled_from_their_box_to_the_unit_box(low, high, log_arrays, transitions_of):
    arrays = with_actions(log_arrays(500), low, high)
    transitions = transitions_of(arrays)
    normalise_actions(transitions, torch.tensor(low).float(), torch.tensor(high).float())
    exact = 2 * (arrays["actions"][:-1].astype(np.float64) - low) / (np.subtract(high, low)) - 1
    np.testing.assert_allclose(
        transitions["action"].numpy(), exact.clip(-1 + 1e-5, 1 - 1e-5), rtol=0, atol=4e-6 if low[1] == 3 else 5e-7
    )


def test_actions_at_the_bounds_are_clipped_to_just_inside(log_arrays, transitions_of):
    arrays = log_arrays(5)
    arrays["actions"][:4] = [[-2, 2], [2, -2], [0, 1.99999999], [1, -1]]
    transitions = transitions_of(arrays)
    normalise_actions(transitions, -2 * UNIT, 2 * UNIT)
    inside = np.float32(1 - 1e-5)
    assert transitions["action"].numpy().tolist() == [[-inside, inside], [inside, -inside], [0, inside], [0.5, -0.5]]


def test_without_clip_the_bounds_themselves_stay(log_arrays, transitions_of):
    arrays = log_arrays(3)
    arrays["actions"][:2] = [[-2, 2], [2, -2]]
    transitions = transitions_of(arrays)
    normalise_actions(transitions, -2 * UNIT, 2 * UNIT, clip=0)
    assert transitions["action"].tolist() == [[-1, 1], [1, -1]]


def test_actions_of_the_unit_box_are_clipped_and_otherwise_unchanged(log_arrays, transitions_of):
    arrays = log_arrays(500)
    arrays["actions"][:3] = [[-1, 1], [1e-9, -3e-8], [0.1, -0.3]]
    transitions = transitions_of(arrays)
    normalise_actions(transitions, -UNIT, UNIT)
    expected = arrays["actions"][:-1].clip(np.float32(-1 + 1e-5), np.float32(1 - 1e-5))
    np.testing.assert_array_equal(transitions["action"].numpy(), expected)


@pytest.mark.parametrize("beyond", [1e-7, 1e-6, 5e-6])
def test_an_action_beyond_a_bound_by_rounding_is_clipped(beyond, log_arrays, transitions_of):
    arrays = log_arrays()
    arrays["actions"][4] = [2 * (1 + beyond), -2 * (1 + beyond)]
    transitions = transitions_of(arrays)
    normalise_actions(transitions, -2 * UNIT, 2 * UNIT)
    assert transitions["action"][4].numpy().tolist() == [np.float32(1 - 1e-5), -np.float32(1 - 1e-5)]


@pytest.mark.parametrize(("column", "value"), [(0, 2.001), (1, -2.5), (1, 300.0)])
def test_an_action_outside_its_box_is_named_with_its_place_and_value(column, value, log_arrays, transitions_of):
    arrays = log_arrays(40)
    arrays["actions"][[11, 25], column] = value
    with pytest.raises(DatasetError, match=f"transition 11, dimension {column}") as error:
        normalise_actions(transitions_of(arrays), -2 * UNIT, 2 * UNIT)
    found = float(re.search(r"action (\S+) in", str(error.value))[1])
    assert found == pytest.approx(value, rel=1e-5)
    assert "[-2, 2]" in str(error.value) and "(2 such transitions)" in str(error.value)


@pytest.mark.parametrize("size", [1, 3])
def test_bounds_of_another_size_are_refused_with_both_sizes(size, log_arrays, transitions_of):
    transitions = transitions_of(log_arrays())
    with pytest.raises(DatasetError, match=f"have 2 dimensions but the action space has {size}"):
        normalise_actions(transitions, -torch.ones(size), torch.ones(size))
    with pytest.raises(DatasetError, match="have 2 dimensions"):
        normalise_actions(transitions, -UNIT, torch.ones(size))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ([-np.inf, -1], [1, 1]),
        ([-1, -1], [1, np.inf]),
        ([-1, np.nan], [1, 1]),
        ([1, -1], [-1, 1]),
        ([-1, 0.5], [1, 0.5]),
    ],
)
def test_bounds_that_are_infinite_or_not_ordered_are_refused(low, high, log_arrays, transitions_of):
    transitions = transitions_of(log_arrays())
    before = transitions["action"].clone()
    with pytest.raises(DatasetError, match="finite, ordered bounds"):
        normalise_actions(transitions, torch.tensor(low).float(), torch.tensor(high).float())
    assert transitions["action"].equal(before)


def test_without_an_environment_actions_within_the_unit_box_have_its_bounds(log_arrays, transitions_of):
    arrays = log_arrays()
    arrays["actions"] *= 0.3
    low, high = action_bounds(transitions_of(arrays))
    assert low.tolist() == [-1, -1] and high.tolist() == [1, 1]


def test_without_an_environment_larger_actions_have_the_bounds_of_their_own_range(log_arrays, transitions_of):
    arrays = log_arrays()
    arrays["actions"] *= np.float32([8, 0.25])
    actions = arrays["actions"][:-1]
    transitions = transitions_of(arrays)
    low, high = action_bounds(transitions)
    assert low.numpy().tolist() == actions.min(0).tolist() and high.numpy().tolist() == actions.max(0).tolist()
    normalise_actions(transitions, low, high, clip=0)
    np.testing.assert_allclose(transitions["action"].amin(0).numpy(), [-1, -1], atol=1e-6)
    np.testing.assert_allclose(transitions["action"].amax(0).numpy(), [1, 1], atol=1e-6)


def test_an_action_that_never_moves_still_has_a_range(log_arrays, transitions_of):
    arrays = log_arrays()
    arrays["actions"] *= 3
    arrays["actions"][:, 1] = 5
    transitions = transitions_of(arrays)
    normalise_actions(transitions, *action_bounds(transitions))
    assert transitions["action"][:, 1].tolist() == [0] * 39


# ---- buffer


@pytest.fixture
def transitions(log_arrays, transitions_of):
    """120 of them; the first observation entry is the row's number."""
    arrays = log_arrays(121, terminals=[30, 60, 90, 110])
    arrays["observations"][:, 0] = np.arange(121)
    return transitions_of(arrays)


def rows_of(batch):
    return batch["observation"][:, 0].long().tolist()


def test_the_buffer_does_not_copy_the_transitions(transitions):
    buffer = make_buffer(transitions, batch_size=10)
    stored = buffer[:]
    for key in ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "terminated")):
        assert stored[key].data_ptr() == transitions[key].data_ptr(), key


@pytest.mark.parametrize("replacement", [True, False])
def test_a_batch_holds_whole_transitions(replacement, transitions):
    batch = make_buffer(transitions, batch_size=50, replacement=replacement, seed=0).sample()
    assert batch.batch_size == (50,)
    expected = transitions[torch.tensor(rows_of(batch))]
    for key in ("observation", "action", *(("next", key) for key in ("observation", "reward", "done", "terminated"))):
        assert batch[key].equal(expected[key]), key


def test_a_buffer_has_every_transition_and_takes_no_more(transitions):
    buffer = make_buffer(transitions, batch_size=10)
    assert len(buffer) == 120
    with pytest.raises(RuntimeError):
        buffer.extend(transitions.exclude("episode"))


@pytest.mark.parametrize("batch_size", [0, -1, 121])
def test_a_batch_size_that_cannot_be_drawn_is_refused_with_the_possible_ones(batch_size, transitions):
    with pytest.raises(ConfigurationError, match=f"algorithm.batch_size .*between 1 and .* 120; got {batch_size}"):
        make_buffer(transitions, batch_size=batch_size)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("batch_size", [1, 120])
def test_the_smallest_and_the_largest_batch_can_be_drawn(batch_size, replacement, transitions):
    buffer = make_buffer(transitions, batch_size=batch_size, replacement=replacement)
    assert len(buffer.sample()) == batch_size


@pytest.mark.parametrize("replacement", [True, False])
def test_a_seed_fixes_the_samples_whatever_else_draws_random_numbers(replacement, transitions):
    def draw(seed):
        buffer = make_buffer(transitions, batch_size=10, replacement=replacement, seed=seed)
        return [rows_of(buffer.sample()) for _ in range(30)]

    first = draw(7)
    torch.manual_seed(123)
    torch.rand(5)
    assert draw(7) == first
    assert draw(8) != first


def test_a_seeded_buffer_leaves_the_global_random_numbers_alone(transitions):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_buffer(transitions, batch_size=10, seed=1).sample()
    assert torch.rand(3).equal(expected)


def test_without_a_seed_the_global_one_fixes_the_samples(transitions):
    def draw():
        torch.manual_seed(3)
        buffer = make_buffer(transitions, batch_size=10)
        return [rows_of(buffer.sample()) for _ in range(5)]

    assert draw() == draw()


def test_without_replacement_every_pass_visits_every_transition_once_in_another_order(transitions):
    buffer = make_buffer(transitions, batch_size=10, replacement=False, seed=0)
    passes = [[row for _ in range(12) for row in rows_of(buffer.sample())] for _ in range(3)]
    assert all(sorted(visited) == list(range(120)) for visited in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != list(range(120))


def test_without_replacement_no_transition_comes_twice_in_a_pass_that_does_not_divide(transitions):
    buffer = make_buffer(transitions, batch_size=50, replacement=False, seed=0)
    for _ in range(3):
        visited = rows_of(buffer.sample()) + rows_of(buffer.sample())
        assert len(set(visited)) == 100


def test_with_replacement_transitions_are_drawn_uniformly(transitions):
    buffer = make_buffer(transitions, batch_size=120, seed=0)
    counts = np.bincount([row for _ in range(500) for row in rows_of(buffer.sample())], minlength=120)
    chi_squared = float(((counts - 500) ** 2 / 500).sum())
    assert len(set(rows_of(buffer.sample()))) < 120
    assert 60 < chi_squared < 190  # 119 degrees of freedom


# ---- split


@pytest.fixture
def episodes(log_arrays, transitions_of):
    """Ten episodes of 5 to 14 transitions; the first observation entry is the row's number."""
    lengths = range(5, 15)
    arrays = log_arrays(sum(lengths) + 1, terminals=np.cumsum(lengths) - 1)
    arrays["observations"][:, 0] = np.arange(sum(lengths) + 1)
    return transitions_of(arrays)


@pytest.mark.parametrize(("fraction", "held_out"), [(0.001, 1), (0.1, 1), (0.3, 3), (0.5, 5), (0.99, 9)])
def test_a_split_holds_out_that_share_of_whole_episodes(fraction, held_out, episodes):
    training, validation = split_episodes(episodes, fraction)
    inside, outside = set(training["episode"].tolist()), set(validation["episode"].tolist())
    assert len(outside) == held_out and len(inside) == 10 - held_out and not inside & outside
    assert sorted(rows_of(training) + rows_of(validation)) == list(range(95))
    assert rows_of(training) == sorted(rows_of(training)) and rows_of(validation) == sorted(rows_of(validation))


def test_a_split_keeps_the_entries_of_a_transition_together(episodes):
    for part in split_episodes(episodes, 0.3):
        expected = episodes[torch.tensor(rows_of(part))]
        for key in ("action", "episode", ("next", "observation"), ("next", "reward"), ("next", "terminated")):
            assert part[key].equal(expected[key])


def test_a_split_follows_its_seed(episodes):
    drawn = [set(split_episodes(episodes, 0.3, seed)[1]["episode"].tolist()) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert any(other != drawn[0] for other in drawn[2:])


def test_a_split_of_one_episode_is_refused(log_arrays, transitions_of):
    with pytest.raises(DatasetError, match=r"two episodes.*dataset.validation_fraction=0"):
        split_episodes(transitions_of(log_arrays()), 0.1)
