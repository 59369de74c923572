"""The picture of a run, by what is in it: nothing is cut off, hidden, or without its name."""

import io
import math
from functools import cache

import pytest

from iql_torchrl.reporting.curves import curves
from iql_torchrl.reporting.run_folder import Records

LOSSES, ACTOR, VALUES, WEIGHTS = 1, 4, 2, 3


def records_of(seeds=(0,), first=100, last=2000, *, simulator=True, score=lambda step, seed: 0.01 * step + seed):
    """Rows of a run; Q and V lie on each other, and the share of clipped weights is 0."""
    found = Records()
    for step in range(first, last + 1, 100):
        for seed in seeds:
            share = step / last
            row = {"loss_qvalue": 1 + share, "loss_value": 0.1 * share, "loss_actor": 5 - share + seed}
            row |= {"qvalue": step + seed, "value": step + seed, "effective_sample_size": 1.0, "clipped_fraction": 0.0}
            row |= {"log_prob": -share}
            if not simulator and step % 500 == 0:
                row["validation_log_prob"] = -share
            found.log_metrics({"step": step, "seed": seed, **row})
            if simulator and step % 500 == 0:
                value = score(step, seed)
                found.log_evaluation({"step": step, "seed": seed, "episode_return_mean": value})
    return found


def drawn(records, **options):
    """The figure as it is drawn, with all places known."""
    figure = curves(records, title="a run", **options)
    figure.savefig(io.BytesIO(), dpi=120, format="png")
    return figure


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


RUNS = {
    "one seed": (records_of(), {"data_score": 12.0}),
    "three seeds": (records_of((3, 4, 5)), {"data_score": -4.0}),
    "scores of zero": (records_of(score=lambda step, seed: 0.0), {}),
    "returns below zero": (records_of(score=lambda step, seed: -1500.0 + step), {"data_score": -1200.0}),
    "no simulator": (records_of(simulator=False), {}),
    "online from a checkpoint": (records_of((0, 1), first=2100, last=3500), {"hand_over": 2000}),
    "online after its offline part": (records_of(last=3000), {"hand_over": 1000}),
    "interrupted": (records_of(last=1400), {"updates": 1437}),
    "one row": (records_of(last=100), {}),
    "no row": (Records(), {}),
    "a million updates": (records_of(first=1_000, last=1_000_000), {}),
}


@cache
def figure_of(name):
    records, options = RUNS[name]
    return drawn(records, **options)


@pytest.mark.parametrize("name", RUNS)
def test_no_line_marker_or_band_is_cut_off(name):
    figure = figure_of(name)
    points = 120 / 72  # pixels
    for axis in figure.axes:
        for line in axis.get_lines():
            if line.get_label() == "mean of the data":  # across the whole axes
                assert axis.get_ylim()[0] < line.get_ydata()[0] < axis.get_ylim()[1]
                continue
            if line.get_transform() != axis.transData:
                continue
            size = line.get_markersize() if line.get_marker() not in (None, "None") else 0
            radius = points * max(line.get_linewidth(), size) / 2
            for x, y in axis.transData.transform(line.get_xydata()):
                assert axis.bbox.x0 + radius <= x <= axis.bbox.x1 - radius, (axis.get_title(), line.get_label())
                assert axis.bbox.y0 + radius <= y <= axis.bbox.y1 - radius, (axis.get_title(), line.get_label())
        for band in axis.collections:
            box = band.get_window_extent()
            assert (
                axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and axis.bbox.y0 <= box.y0 <= box.y1 <= axis.bbox.y1
            )


@pytest.mark.parametrize("name", RUNS)
def test_all_axes_have_the_updates_of_the_run_and_no_other(name):
    figure, (records, options) = figure_of(name), RUNS[name]
    ((low, high),) = {axis.get_xlim() for axis in figure.axes}
    first = 2000 if name == "online from a checkpoint" else 0
    rows = records.metrics()
    last = options.get("updates", rows[-1]["step"] if rows else 1)
    room = 0.03 * (last - first)
    assert (low, high) == pytest.approx((first - room, last + room))


@pytest.mark.parametrize("name", RUNS)
def test_no_legend_lies_on_data_or_another_text(name):
    figure = figure_of(name)
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend() is not None)]
    assert len(legends) >= 4 or name == "no row"
    for legend in legends:
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        others = [one.get_window_extent() for one in legends if one is not legend]
        others += [axis.bbox for axis in figure.axes]
        words = [text for axis in figure.axes for text in (axis.title, axis.xaxis.label) if text.get_text()]
        others += [text.get_window_extent() for text in words]
        assert not any(box.overlaps(other) for other in others)


def test_bands_and_the_hand_over_are_named_once_for_all_axes():
    figure = drawn(records_of((3, 4, 5), last=3000), hand_over=1000)
    (legend,) = figure.legends
    assert texts(legend) == ["lowest to highest of 3 seeds; the lines are their means", "online from here"]
    assert all(axis.collections for axis in figure.axes)
    assert drawn(records_of()).legends == [] and not any(axis.collections for axis in drawn(records_of()).axes)


def test_a_hand_over_that_is_still_to_come_is_not_drawn():
    figure = drawn(records_of(last=500), hand_over=1000)
    assert figure.legends == [] and figure.axes[0].get_xlim()[1] == pytest.approx(515)


def test_lines_that_lie_on_each_other_are_told_apart_by_style_and_width():
    figure = drawn(records_of(simulator=False))
    assert texts(figure.axes[0].get_legend()) == ["training", "held out"]
    assert texts(figure.axes[LOSSES].get_legend()) == ["Q", "V", "policy (right)"]
    assert texts(figure.axes[VALUES].get_legend()) == ["min target Q", "V"]
    for places in ((0,), (LOSSES, ACTOR), (VALUES,), (WEIGHTS,)):
        lines = [line for place in places for line in figure.axes[place].get_lines()]
        assert len({line.get_color() for line in lines}) == len(lines) > 1
        assert lines[0].get_linestyle() == "-" and all(line.get_linestyle() == "--" for line in lines[1:])
        assert len({str(line._dash_pattern) for line in lines}) == len(lines)
        assert all(line.get_linewidth() < lines[0].get_linewidth() for line in lines[1:])


def test_each_evaluation_has_a_marker_unless_there_are_too_many_and_a_single_row_is_seen():
    def markers(records, place):
        return {line.get_marker() for line in drawn(records).axes[place].get_lines()}

    assert markers(records_of(), 0) == {"o"} and markers(records_of(), VALUES) == {"None"}
    assert markers(records_of(last=100), VALUES) == {"o"}
    assert markers(records_of(first=500, last=100_000), 0) == {"None"}


def test_numbers_that_are_none_are_left_out_of_their_lines():
    records = records_of()
    records.log_metrics({"step": 2100, "seed": 0, "value": math.nan, "qvalue": math.inf, "loss_value": 0.0})
    figure = drawn(records, updates=2100)
    assert [line.get_xdata()[-1] for line in figure.axes[VALUES].get_lines()] == [2000, 2000]
    assert figure.axes[0].get_xlim()[1] == pytest.approx(1.03 * 2100)
