"""Statistics over seeds and tasks against numbers worked out by hand, all resamples, and rliable."""

import itertools
import json
import math
import warnings
from statistics import fmean, stdev

import numpy as np
import pytest

from iql_torchrl.reporting.statistics import (
    interquartile_mean,
    on_few_seeds,
    probability_of_improvement,
    score_statistics,
    scores_by_seed,
    share_above,
    stratified_interval,
)

KEYS = {
    "mean",
    "mean_interval",
    "interquartile_mean",
    "interquartile_mean_interval",
    "standard_deviation",
    "interval_note",
}


@pytest.mark.parametrize(
    ("scores", "mean", "middle"),
    [
        ([1.0, 2.0], 1.5, 1.5),
        ([1.0, 2.0, 6.0], 3.0, 3.0),  # a quarter of three is less than one score: none is left out
        ([0.0, 10.0, 20.0, 90.0], 30.0, 15.0),
        ([7.0, -100.0, 5.0, 6.0, 1000.0], 183.6, 6.0),  # order does not matter
        ([100.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 15.125, 3.5),
        ([float(score) for score in range(10)], 4.5, 4.5),
    ],
)
def test_the_mean_is_that_of_all_scores_and_the_interquartile_mean_that_of_the_middle_half(scores, mean, middle):
    found = score_statistics(scores)
    assert found.keys() == KEYS
    assert found["mean"] == pytest.approx(mean) and found["interquartile_mean"] == pytest.approx(middle)
    assert found["standard_deviation"] == pytest.approx(stdev(scores))


def test_one_score_has_no_interval_and_no_deviation():
    found = score_statistics([7.0])  # of several seeds of which the others have diverged
    assert found.keys() == KEYS and found["mean"] == found["interquartile_mean"] == 7.0
    for key in ("mean_interval", "interquartile_mean_interval", "standard_deviation"):
        assert found[key] is None, key


def test_of_fewer_than_five_scores_it_is_said_that_an_interval_over_so_few_is_not_one():
    for count, number in ((2, "two"), (3, "three"), (4, "four")):
        note = score_statistics([float(score) for score in range(count)])["interval_note"]
        assert note == on_few_seeds(count) and note.startswith(f"A 95% interval over {number} seeds is not one")
    assert on_few_seeds(1) == "Nothing tells how sure the score of one seed is."
    assert score_statistics([1.0] * 5)["interval_note"] is None


def test_seeds_that_diverged_have_no_final_score():
    summary = {"seed": 4, "final_score": 2.0, "final_scores": {"4": 1.0, "5": 3}, "diverged": None}
    assert scores_by_seed(summary) == {4: 1.0, 5: 3.0}
    assert scores_by_seed(summary | {"diverged": [{"seed": 5}]}) == {4: 1.0}
    assert scores_by_seed({"seed": 4, "final_score": 2.0}) == {4: 2.0}
    assert scores_by_seed({"seed": 4, "final_score": None}) == {} == scores_by_seed({})


@pytest.mark.parametrize("scores", [[1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 5.0, 5.5, 6.0, 50.0], [-3.0, -1.0, 0.0, 7.0]])
def test_the_intervals_contain_their_means_and_lie_among_the_scores(scores):
    found = score_statistics(scores)
    for name in ("mean", "interquartile_mean"):
        low, high = found[f"{name}_interval"]
        assert min(scores) <= low < found[name] < high <= max(scores)


def test_the_interval_of_a_mean_is_that_of_all_resamples():
    scores = [0.0, 1.0, 3.0, 7.0]
    means = sorted(fmean(resample) for resample in itertools.product(scores, repeat=4))  # all 256 of them
    low, high = score_statistics(scores)["mean_interval"]
    share_below, share_above = (sum(mean < low for mean in means) / 256, sum(mean > high for mean in means) / 256)
    assert share_below == pytest.approx(0.025, abs=0.015) and share_above == pytest.approx(0.025, abs=0.015)


@pytest.mark.parametrize("scores", [[5.0] * 3, [0.1] * 5, [0.0] * 2, [-1e6] * 10])
def test_equal_scores_give_an_interval_of_one_point_without_a_warning(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score_statistics(scores)
    for value in (found["mean"], found["interquartile_mean"]):
        assert value == pytest.approx(scores[0])
    for bound in (*found["mean_interval"], *found["interquartile_mean_interval"]):
        assert math.isfinite(bound) and bound == pytest.approx(scores[0])


def test_statistics_of_the_same_scores_are_the_same_and_are_plain_numbers():
    scores = [12.5, 80.0, 43.0, 44.0, 51.0]
    found = score_statistics(scores)
    assert score_statistics(tuple(scores)) == found
    assert json.loads(json.dumps(found)) == found
    assert all(type(bound) is float for bound in found["mean_interval"])


def test_statistics_by_hand():
    assert interquartile_mean(np.arange(10.0)) == pytest.approx(4.5)
    assert interquartile_mean(np.array([0.0, 10.0, 20.0, 90.0])) == pytest.approx(15.0)
    np.testing.assert_allclose(
        share_above(np.array([-1.0, 0.0, 1.5, 3.0]))(np.array([0.0, 1.0, 2.0, 3.0])), [1, 0.75, 0.5, 0]
    )
    point, low, high = probability_of_improvement([np.array([2.0, 3.0])], [np.array([1.0, 2.0])])
    assert point == pytest.approx(3.5 / 4) and low <= point <= high == 1
    point, low, high = stratified_interval([np.array([5.0, 5.0]), np.array([7.0])], interquartile_mean)
    assert point == low == high == pytest.approx(17 / 3)


def test_a_resample_takes_from_each_task_as_many_runs_as_it_has():
    scores = [np.array([0.0, 0.0, 0.0]), np.array([100.0])]
    seen = []
    stratified_interval(scores, lambda drawn: seen.append(drawn) or drawn.mean(-1))
    assert (seen[0] == np.array([0, 0, 0, 100.0])).all()


@pytest.mark.slow
def test_statistics_are_those_of_rliable():
    library, metrics = pytest.importorskip("rliable.library"), pytest.importorskip("rliable.metrics")
    random = np.random.default_rng(3)
    one, other = random.normal(50, 20, size=(5, 4)), random.normal(45, 25, size=(5, 4)).round()
    for scores in (one, other):
        tasks = list(scores.T)
        levels = np.linspace(0, 100, 21)
        for statistic, theirs in (
            (interquartile_mean, lambda values: np.array([metrics.aggregate_iqm(values)])),
            (lambda values: values.mean(-1), lambda values: np.array([metrics.aggregate_mean(values)])),
        ):
            points, intervals = library.get_interval_estimates({"a": scores}, theirs, reps=4000)
            point, low, high = stratified_interval(tasks, statistic, 4000)
            assert point == pytest.approx(points["a"].item(), rel=1e-12)
            np.testing.assert_allclose([low, high], intervals["a"][:, 0], atol=1.0)
        points, intervals = library.create_performance_profile({"a": scores}, levels, reps=2000)
        point, low, high = stratified_interval(tasks, share_above(levels))
        np.testing.assert_allclose(point, points["a"])
        np.testing.assert_allclose([low, high], intervals["a"], atol=0.06)
    points, intervals = library.get_interval_estimates(
        {"a": [one, other]}, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=2000
    )
    point, low, high = probability_of_improvement(list(one.T), list(other.T))
    assert point == pytest.approx(points["a"].item())
    np.testing.assert_allclose([low, high], intervals["a"][:, 0], atol=0.04)
