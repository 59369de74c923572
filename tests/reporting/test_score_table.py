"""The tables of scores that a run of several seeds and a sweep end with."""

import math
from statistics import stdev

from iql_torchrl.reporting.score_table import of_jobs, of_seeds
from iql_torchrl.reporting.statistics import score_statistics


def summary_of(final, best, steps, *, seeds, diverged=None):
    return {
        "seed": seeds[0],
        "num_seeds": len(seeds),
        "final_scores": final,
        "best_scores": best,
        "best_steps": steps,
        "diverged": diverged,
        **score_statistics(list(final.values())),
    }


def test_each_seed_has_a_line_with_its_final_and_best_score_and_the_statistics_stand_below():
    final = {5: 40.0, 6: 41.5, 7: 44.0, 8: 43.0, 9: 50.25}
    table = of_seeds(summary_of(final, final | {6: 60.0}, dict.fromkeys(final, 2000), seeds=range(5, 10)))
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["seed", "final", "score", "best", "score", "at", "step"]
    assert lines[1] == ["5", "40.00", "40.00", "2,000"] and lines[2] == ["6", "41.50", "60.00", "2,000"]
    assert lines[6][:2] == ["mean", "43.75"] and lines[6][2:4] == ["95%", "interval"]
    assert lines[7] == ["standard", "deviation", f"{stdev(final.values()):.2f}"]
    assert lines[8][:3] == ["interquartile", "mean", "42.83"] and len(lines) == 9


def test_seeds_that_diverged_stay_listed():
    diverged = [{"seed": 1, "step": 1500, "what": "seed 1 diverged"}]
    summary = summary_of(
        {0: 4.0, 2: 6.0}, {0: 5.0, 1: 9.0, 2: 6.0}, {0: 1, 1: 1, 2: 2}, seeds=range(4), diverged=diverged
    )
    lines = of_seeds(summary).splitlines()
    assert lines[2].split() == ["1", "-", "9.000", "1", "diverged", "at", "step", "1,500"]
    assert lines[4].split() == ["3", "-", "-", "-"]  # had diverged before it was resumed
    assert "A 95% interval over two seeds is not one" in " ".join(lines)


def test_one_seed_that_is_left_has_no_interval():
    table = of_seeds(summary_of({1: 0.0}, {0: 1.0, 1: 2.0}, {0: 5, 1: 5}, seeds=range(2)))
    assert "95%" not in table and "Nothing tells how sure" in table


def test_numbers_of_a_table_have_as_many_decimals_as_the_largest_needs_for_four_digits():
    for largest, shown in ((12345.678, "12,345.7"), (123.456, "123.5"), (-1.23456, "-1.235"), (0.00123456, "0.001235")):
        final = {0: largest, 1: 0.0}
        assert shown in of_seeds(summary_of(final, final, {0: 1, 1: 1}, seeds=range(2))), largest


def job(number, score=None, status="finished", reason=None):
    measure = None if score is None else "final_score"
    return {"job": number, "status": status, "objective": score, "objective_is": measure, "reason": reason}


def group(options, jobs, scores, counts):
    statistics = score_statistics(scores) if scores else {}
    return {"options": options, "jobs": jobs, "scores": scores, "counts": counts, **statistics}


def test_jobs_are_named_by_their_options_and_those_that_differ_in_their_seed_have_one_line_more():
    jobs = [job(0, 10.0), job(1, 14.0), job(2, status="failed", reason="no memory\nat all"), job(3, 20.0)]
    names = ["tau=0.1 train.seed=0", "tau=0.1 train.seed=1", "tau=0.2 train.seed=0", "tau=0.2 train.seed=1"]
    groups = [
        group({"tau": "0.1"}, [0, 1], [10.0, 14.0], {"finished": 2}),
        group({"tau": "0.2"}, [2, 3], [20.0], {"failed": 1, "finished": 1}),
    ]
    lines = of_jobs(jobs, names, groups)
    assert lines[0].split() == ["run", "status", "final", "score", "folder"]
    assert lines[1].split() == ["tau=0.1", "train.seed=0", "finished", "10.00", "0"]
    assert lines[3].split() == ["tau=0.2", "train.seed=0", "failed", "-", "2", "no", "memory"]
    assert lines[6].split() == ["tau=0.1", "2", "12.00", "2.83", "12.00", "10.00", "to", "14.00"]
    assert lines[7].split() == ["tau=0.2", "1", "20.00", "-", "20.00", "1", "failed"]
    assert "A 95% interval over two seeds is not one" in lines[8]


def test_jobs_without_another_seed_have_no_lines_over_seeds():
    jobs = [job(0, 10.0), job(1, status="missing")]
    groups = [group({"tau": "0.1"}, [0], [10.0], {"finished": 1}), group({"tau": "0.2"}, [1], [], {"missing": 1})]
    assert len(of_jobs(jobs, ["tau=0.1", "tau=0.2"], groups)) == 3
    groups = [group({}, [0, 1], [10.0], {"finished": 1, "missing": 1})]  # of which one has another, without a score
    assert of_jobs(jobs, ["seed=0", "seed=1"], groups)[-1].split() == [
        "all",
        "runs",
        "1",
        "10.00",
        "-",
        "10.00",
        "1",
        "missing",
    ]


def test_scores_that_are_no_numbers_are_shown_as_they_are():
    lines = of_jobs([job(0, math.inf), job(1, math.nan), job(2, 0.0)], ["a", "b", "c"], [])
    assert [line.split()[2] for line in lines[1:]] == ["inf", "nan", "0.0"]


def test_where_all_differ_in_their_seed_alone_the_line_over_seeds_is_of_all_runs():
    jobs = [job(seed, float(seed)) for seed in range(6)]
    groups = [group({}, list(range(6)), [float(seed) for seed in range(6)], {"finished": 6})]
    lines = of_jobs(jobs, [f"train.seed={seed}" for seed in range(6)], groups)
    assert lines[-1].split()[:6] == ["all", "runs", "6", "2.500", "1.871", "2.500"] and "interval over" not in lines[-1]
