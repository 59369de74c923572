"""Numbers far outside all others are found, and nothing in data that are as they should be."""

from __future__ import annotations

import numpy as np
import pytest

from iql_torchrl.data.log import ROWS_AT_A_TIME
from iql_torchrl.data.outliers import FACTORS, far_from_references, find_outliers, outliers_of, sentence
from iql_torchrl.environments.specification import EnvironmentSpec

KINDS = ["reward", "observation", "action"]
SCORE = EnvironmentSpec.of("Hopper-v5").score


def column(rows=30_000, size=1, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, size)).astype(np.float32)


@pytest.mark.parametrize("value", [-1e30, 3e38, -99_999.0, 1e20])
@pytest.mark.parametrize("row", [0, 17, 29_999])
@pytest.mark.parametrize("kind", KINDS)
def test_one_sentinel_is_found_with_its_row_and_value(kind, row, value):
    values = column()
    expected = np.delete(values, row)
    values[row] = value
    (found,) = outliers_of(kind, values)
    assert found.dimension == 0 and found.rows.tolist() == [row] and found.values.tolist() == [np.float32(value)]
    assert found.others == (expected.min(), expected.max())
    assert found.usual == pytest.approx((-1.645, 1.645), abs=0.05)


@pytest.mark.parametrize("rows", [20, 100, 3 * ROWS_AT_A_TIME + 5])
def test_a_sentinel_is_found_whatever_the_number_of_rows(rows):
    for row in {0, rows // 2, rows - 1, min(rows - 1, ROWS_AT_A_TIME)}:
        values = column(rows, 3)
        values[row, 1] = 1e9
        (found,) = outliers_of("observation", values)
        assert (found.dimension, found.rows.tolist()) == (1, [row])


def test_an_action_needs_less_than_a_reward_or_an_observation_to_be_one():
    values = np.random.default_rng(0).uniform(-2, 2, size=(5000, 2)).astype(np.float32)
    values[123, 1] = 500
    assert outliers_of("reward", values) == outliers_of("observation", values) == []
    (found,) = outliers_of("action", values)
    assert (found.dimension, found.rows.tolist(), found.values.tolist()) == (1, [123], [500])


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.04])
def test_a_sentinel_in_many_rows_is_found_in_all_of_them(share):
    values = column()
    rows = np.sort(np.random.default_rng(1).choice(30_000, int(share * 30_000), replace=False))
    values[rows] = -1e6
    (found,) = outliers_of("reward", values)
    assert found.rows.tolist() == rows.tolist()


def test_several_kinds_of_sentinels_are_found_together_in_all_their_dimensions():
    values = column(size=4)
    values[[5, 700], 3] = [-1e30, 1e30]
    values[[9, 5], 1] = [-99_999, 1e30]
    found = {one.dimension: one for one in outliers_of("observation", values)}
    assert {dimension: one.rows.tolist() for dimension, one in found.items()} == {1: [5, 9], 3: [5, 700]}
    text = sentence("observation", list(found.values()), 30_000, "row")
    assert text.startswith(
        "3 rows (0.01%) have an outlying observation: 1e+30 in row 5, dimension 1, where 90% lie in ["
    )
    assert "(outliers in dimension 3 too)" in text


def test_the_sentence_names_row_value_and_share():
    values = column()
    values[1234] = -1e30
    text = sentence("reward", outliers_of("reward", values), 30_000, "transition")
    assert text.startswith("1 transition (0.00333%) has an outlying reward: -1e+30 in transition 1234, where 90% lie")


@pytest.mark.parametrize("value", [-1e30, 1e7])
def test_a_sentinel_among_numbers_that_are_all_the_same_is_found(value):
    values = np.full((1000, 1), 3.0, np.float32)
    values[77] = value
    (found,) = outliers_of("reward", values)
    assert found.rows.tolist() == [77] and found.others == (3, 3)


def test_a_sentinel_among_rare_ones_is_found_and_the_ones_are_not():
    values = np.zeros((30_000, 1), np.float32)
    values[::1000] = 1
    values[77] = -9999
    (found,) = outliers_of("reward", values)
    assert found.rows.tolist() == [77] and found.others == (0, 1) and found.usual == (0, 0)


def test_a_sentinel_among_bonuses_over_a_small_noise_is_found_and_the_bonuses_are_not():
    random = np.random.default_rng(0)
    values = (1e-3 * random.normal(size=30_000) + rare(30_000, 1e-3, [100.0]))[:, None]
    values[77] = -1e30
    (found,) = outliers_of("reward", values)
    assert found.rows.tolist() == [77] and found.others[1] == pytest.approx(100, abs=0.1)


# ---- healthy data


def rare(rows, share, values, seed=0):
    """Zeros, and some of the values in a share of the rows."""
    random = np.random.default_rng(seed)
    return np.where(random.random(rows) < share, random.choice(values, size=rows), 0.0)


def heavy_tails(random, rows):
    return np.exp(random.normal(scale=3, size=rows))


HEALTHY = {
    "rewards of 0 and a rare 1": lambda random, rows: rare(rows, 1e-3, [1.0]),
    "a single reward": lambda random, rows: (np.arange(rows) == 77).astype(float),
    "rare scores of many sizes": lambda random, rows: rare(rows, 0.02, [1, 10, 100, 1000, 4000.0]),
    "rare scores of one size": lambda random, rows: rare(rows, 1e-3, [40_000.0]),
    "a cost of a step and a rare large bonus": lambda random, rows: rare(rows, 0.005, [1000.0]) - 1,
    "a small noisy cost and a bonus": lambda random, rows: 1e-3 * random.normal(size=rows) + rare(rows, 0.005, [100.0]),
    "a flag over a resting sensor": lambda random, rows: 1e-7 * random.normal(size=rows) + rare(rows, 1e-3, [1.0]),
    "contact forces": lambda random, rows: rare(rows, 0.03, heavy_tails(random, 1000)),
    "lognormal tails": heavy_tails,
    "Student's tails": lambda random, rows: random.standard_t(1.5, size=rows),
    "spikes at resets": lambda random, rows: np.where(np.arange(rows) % 1000 == 0, 40, 1) * random.normal(size=rows),
    "large numbers": lambda random, rows: 1e6 * random.normal(size=rows) + 1e9,
    "a counter": lambda random, rows: np.arange(rows, dtype=float) * 1000,
    "two regimes": lambda random, rows: np.where(random.random(rows) < 0.2, 1e6, 0.0) + random.normal(size=rows),
    "a constant": lambda random, rows: np.full(rows, 1e12),
    "times as numbers of seconds": lambda random, rows: 1.7e9 + 0.05 * np.arange(rows),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_healthy_numbers(name, seed):
    values = HEALTHY[name](np.random.default_rng(seed), 30_000)[:, None]
    assert outliers_of("reward", values) == outliers_of("observation", values.astype(np.float32)) == []


def test_actions_that_mostly_rest_have_no_outliers():
    random = np.random.default_rng(0)
    bursts = np.where(random.random((30_000, 2)) < 0.02, random.uniform(-1, 1, size=(30_000, 2)), 0.0)
    assert outliers_of("action", bursts) == outliers_of("action", bursts + 1e-4 * random.normal(size=(30_000, 2))) == []


@pytest.mark.parametrize("rows", [1, 2, 19])
def test_a_few_rows_do_not_tell_what_is_usual(rows):
    values = column(rows)
    values[0] = 1e30
    assert outliers_of("reward", values) == []


# ---- reading


def test_what_cannot_have_outliers_by_its_range_is_not_read():
    def unread():
        raise AssertionError

    low, high = np.zeros(3), np.full(3, FACTORS["reward"])
    assert find_outliers("reward", unread, 100, low, high) == []


@pytest.mark.parametrize("rows", [20, 371, ROWS_AT_A_TIME, ROWS_AT_A_TIME + 1])
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_pieces_of_any_size_give_the_outliers_of_the_whole(size, rows):
    if size * rows > 10**7:
        rows = 2000
    values = column(rows, size)
    values[rows // 2, size - 1] = -1e12
    (found,) = outliers_of("observation", values)

    def pieces():
        for start in range(0, rows, 13):
            yield start, values[start : start + 13]

    (other,) = find_outliers("observation", pieces, rows, values.min(0), values.max(0))
    assert found.rows.tolist() == other.rows.tolist() == [rows // 2] and found.dimension == other.dimension == size - 1
    assert (found.others, found.usual) == (other.others, other.usual)


# ---- returns


def test_returns_that_no_policy_has_are_found_by_their_normalised_score():
    returns = np.array([3000.0, -1e30, 20.0, 10_000.0, 30_000.0, 4500.0, -7000.0])
    assert far_from_references(returns, SCORE).tolist() == [1, 4, 6]
    assert far_from_references(returns, lambda _: None).tolist() == []
    assert far_from_references(returns[[0, 2, 5]], SCORE).tolist() == []
