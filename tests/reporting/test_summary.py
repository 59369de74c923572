"""Statistics over seeds against numbers worked out by hand."""

import itertools
import json
import math
import warnings
from statistics import fmean

import pytest

from iql_torchrl.reporting.summary import score_statistics

KEYS = {"mean", "mean_interval", "interquartile_mean", "interquartile_mean_interval"}


@pytest.mark.parametrize(
    ("scores", "mean", "interquartile_mean"),
    [
        ([1.0, 2.0], 1.5, 1.5),
        ([1.0, 2.0, 6.0], 3.0, 3.0),  # a quarter of three is less than one score: none is left out
        ([0.0, 10.0, 20.0, 90.0], 30.0, 15.0),
        ([7.0, -100.0, 5.0, 6.0, 1000.0], 183.6, 6.0),  # order does not matter
        ([100.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 15.125, 3.5),
        ([float(score) for score in range(10)], 4.5, 4.5),
    ],
)
def test_the_mean_is_that_of_all_scores_and_the_interquartile_mean_that_of_the_middle_half(
    scores, mean, interquartile_mean
):
    found = score_statistics(scores)
    assert found.keys() == KEYS
    assert found["mean"] == pytest.approx(mean) and found["interquartile_mean"] == pytest.approx(interquartile_mean)


def test_one_score_has_no_interval():
    found = score_statistics([7.0])  # of several seeds of which the others have diverged
    assert found == {"mean": 7.0, "mean_interval": None, "interquartile_mean": 7.0, "interquartile_mean_interval": None}


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
