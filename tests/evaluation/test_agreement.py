"""How estimates are measured against the truth."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from iql_torchrl.evaluation.agreement import agreement, normalised_absolute_error, regret_at, spearman


def test_the_rank_correlation_is_scipys_ties_included():
    random = np.random.default_rng(0)
    for _ in range(20):
        one, other = random.integers(5, size=(2, 12))
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_regret_is_what_the_best_of_the_chosen_lacks_in_units_of_the_range():
    truths, estimates = [0.0, 10.0, 6.0, 2.0], [3.0, 1.0, 2.0, 4.0]
    # Chosen in the order 3, 0, 2, 1, whose true values are 2, 0, 6, 10.
    assert [regret_at(k, estimates, truths) for k in (1, 2, 3, 4)] == pytest.approx([0.8, 0.8, 0.4, 0.0])
    assert regret_at(5, estimates, truths) == 0
    assert regret_at(1, [1.0, 2.0], [5.0, 5.0]) == 0


def test_the_absolute_error_is_in_units_of_the_range():
    assert normalised_absolute_error([1.0, 4.0, 9.0], [2.0, 2.0, 7.0]) == pytest.approx((1 + 2 + 2) / 3 / 5)


def test_an_error_is_told_only_of_what_is_in_the_same_units():
    random = np.random.default_rng(0)
    truths = random.normal(size=30).tolist()
    estimates = [value + 0.3 * noise for value, noise in zip(truths, random.normal(size=30), strict=True)]
    found = agreement(estimates, truths, comparable=True)
    assert found["spearman_low"] < found["spearman"] < found["spearman_high"] <= 1
    assert found["policies"] == 30 and found["normalised_absolute_error"] > 0
    assert agreement(estimates, truths, comparable=False)["normalised_absolute_error"] is None
    exact = agreement(truths, truths, comparable=True)
    assert [exact[key] for key in ("spearman", "spearman_low", "regret_at_1")] == pytest.approx([1, 1, 0])
