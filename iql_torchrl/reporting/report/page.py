"""The page: one file of HTML with everything in it, which needs neither a network nor a server."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from html import escape
from typing import Any

import numpy as np

from iql_torchrl.reporting.report.comparison import Comparison, published
from iql_torchrl.reporting.report.figures import MOST_NAMES, MOST_TASKS
from iql_torchrl.reporting.report.gathering import VERSION, Listed, ReportedRun
from iql_torchrl.reporting.statistics import (
    interquartile_mean,
    on_few_seeds,
    standard_deviation,
    stratified_interval,
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1e23; --paper: #fff; --faint: #667; --line: #d5d8de; --shade: #f3f4f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #191919; --faint: #9aa0ab; --line: #3a3d44; --shade: #24262b; }
  img { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p, li, summary { max-width: 48rem; }
.faint { color: var(--faint); font-size: 0.9rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; }
td.best { font-weight: 700; }
td.long { min-width: 12rem; }
td .faint { font-weight: 400; }
thead th { background: var(--shade); vertical-align: bottom; min-width: 5rem; max-width: 14rem; }
tbody th { font-weight: 600; min-width: 8rem; position: sticky; left: 0; background: var(--paper); }
tbody th .faint { font-weight: 400; }
@media (min-width: 40rem) { tbody th { min-width: 13rem; } }
th button { all: unset; cursor: pointer; font-weight: 600; display: block; width: 100%; }
th button:focus-visible { outline: 2px solid currentColor; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
figure { margin: 1rem 0; }
figcaption { color: var(--faint); font-size: 0.9rem; }
img { max-width: 100%; height: auto; display: block; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }
"""
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table"), column = head.cellIndex;
  const descending = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)], numbers = [Number(a), Number(b)];
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = numbers.some(Number.isNaN) ? a.localeCompare(b, undefined, {numeric: true}) : numbers[0] - numbers[1];
    return descending ? -order : order;
  });
  table.tBodies[0].append(...rows);
});
"""


def page(
    runs: Sequence[ReportedRun],
    listed: Sequence[Listed],
    comparison: Comparison,
    pictures: Mapping[str, tuple[str, bytes]],
) -> str:
    """The whole page.

    Args:
        runs: that were read, with a score or without.
        listed: what is not in the tables, and what is to be known of runs that are.
        comparison: of the runs with a score.
        pictures: of :func:`iql_torchrl.reporting.report.figures.draw`.
    """
    curves = {name: one for name, one in pictures.items() if name.startswith("curves-")}
    others = {name: one for name, one in pictures.items() if name not in curves}
    scored = sum(bool(run.scores) for run in runs)
    names = f"{len(comparison.names)} set{'s' * (len(comparison.names) != 1)} of options"
    tasks = f"{len(comparison.tasks)} task{'s' * (len(comparison.tasks) != 1)}"
    parts = [
        "<h1>IQL runs</h1>",
        f"<p class=faint>{scored} runs, {tasks}, {names}; {len(listed)} remarks on what is not in the tables or not "
        f"whole. iql_torchrl {escape(VERSION)}, {date.today().isoformat()}.</p>",
        *_scores(comparison),
        *_aggregate(comparison, others),
        "<h2>Curves</h2>",
        "<p>Mean over the seeds, in a band from the lowest to the highest; updates, with those online.</p>",
        *_limits(comparison),
        f"<div class=pictures>{''.join(_figure(*one, caption=False) for one in curves.values())}</div>",
        *_speed(comparison),
        *_options(comparison),
        *_findings(runs),
        *_listed(listed),
        *_runs(runs, comparison),
    ]
    return (
        "<!DOCTYPE html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>IQL runs</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


# ---------------------------------------------------------------------- parts of HTML


def _table(name: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that is sorted by a click on a head; rows are of cells, the first of which names it."""
    top = "".join(f"<th scope=col><button type=button>{escape(head)}</button></th>" for head in heads)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<div class=scroll><table id={name}><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def _row_head(text: str, more: str = "") -> str:
    small = f"<br><span class=faint>{escape(more)}</span>" if more else ""
    return f'<th scope=row data-sort="{escape(text)}">{escape(text)}{small}</th>'


def _text(text: str) -> str:
    return f"<td{' class=long' if len(text) > 40 else ''}>{escape(text)}</td>"


def _number(
    value: float | None, text: str | None = None, more: str = "", *, best: bool = False, title: str = ""
) -> str:
    if value is None or not np.isfinite(value):
        return '<td class=number data-sort="">-</td>'
    shown = escape(f"{value:,.1f}" if text is None else text)
    small = f" <span class=faint>{escape(more)}</span>" if more else ""
    tip = f' title="{escape(title)}"' if title else ""
    return f'<td class="number{" best" if best else ""}" data-sort="{value!r}"{tip}>{shown}{small}</td>'


def _figure(title: str, picture: bytes, *, caption: bool = True) -> str:
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    below = f"<figcaption>{escape(title)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(title)}" src="{source}">{below}</figure>'


def _list(lines: Iterable[str]) -> list[str]:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return [f"<ul class=faint>{items}</ul>"] if items else []


# ---------------------------------------------------------------------- sections


def _scores(comparison: Comparison) -> list[str]:
    found = published()
    known = {
        task: {one["code"]: one for one in found["scores"] if one["name"] == comparison.tasks[task].published}
        for task in comparison.tasks
        if comparison.tasks[task].normalised
    }
    codes = [code for code in found["sources"] if any(code in one for one in known.values())]
    rows = []
    for label, task in comparison.tasks.items():
        scores = [comparison.scores(label, name) for name in comparison.names]
        highest = max((one.mean() for one in scores if len(one)), default=None)
        where = [task.environment or "no environment", *([] if task.normalised else [task.unit])]
        cells = [_row_head(label, ", ".join(where) + (f"; {task.marks}" if task.marks else ""))]
        for one in scores:
            deviation = standard_deviation(one)
            several = "" if deviation is None else f"±{deviation:.1f} "
            cells.append(
                _number(
                    float(one.mean()), None, f"{several}({len(one)})", best=len(scores) > 1 and one.mean() == highest
                )
                if len(one)
                else _number(None)
            )
        for code in codes:
            other = known.get(label, {}).get(code)
            std = "" if other is None or other["std"] is None else f"±{other['std']:.1f}"
            cells.append(_number(other and other["score"], None, std, title=found["sources"][code]["what"]))
        rows.append(cells)
    heads = ["dataset", *comparison.names, *(f"{code} (published)" for code in codes)]
    return [
        "<h2>Scores</h2>",
        "<p>Mean and standard deviation (n - 1) of the final scores over seeds, and their number; in bold the highest "
        "mean of a row. They are normalised scores where nothing else stands; other rows are not averaged.</p>",
        _table("scores", heads, rows),
        *_list(f"{code}: {found['sources'][code]['what']}. {found['sources'][code]['where']}." for code in codes),
        *_list(comparison.notes),
    ]


def _aggregate(comparison: Comparison, pictures: Mapping[str, tuple[str, bytes]]) -> list[str]:
    parts = ["<h2>Over all tasks</h2>"]
    if not pictures:
        return [*parts, "<p>No task has a normalised score: returns of different tasks are not averaged.</p>"]
    left_out = [label for label, task in comparison.tasks.items() if task.normalised and label not in comparison.common]
    rows, fewest = [], 10**9
    for name in comparison.names:
        tasks = comparison.over(name)
        if not tasks:
            continue
        scores = [comparison.scores(label, name) for label in tasks]
        fewest = min(fewest, *map(len, scores))
        middle, low, high = (float(one) for one in stratified_interval(scores, interquartile_mean))
        mean = float(np.mean([one.mean() for one in scores]))
        rows.append(
            [
                _row_head(name),
                _number(middle),
                _number(low, f"{low:,.1f} to {high:,.1f}"),
                _number(mean),
                _number(float(len(tasks)), str(len(tasks))),
                _number(float(sum(map(len, scores))), str(sum(map(len, scores)))),
            ]
        )
    note = on_few_seeds(fewest)
    heads = ["options", "interquartile mean", "95% interval", "mean of the means", "tasks", "runs"]
    parts += [
        "<p>Interquartile mean of the normalised scores, intervals by 2,000 stratified resamples of the seeds within "
        "each task, performance profiles, and how probably a run of one set of options is better than one of another "
        "on the same task (<a href='https://arxiv.org/abs/2108.13264'>Agarwal et al. 2021</a>).</p>",
        *([f"<p><strong>{escape(note)} Some tasks here have no more seeds.</strong></p>"] if note else []),
        _table("aggregate", heads, rows),
    ]
    if not comparison.common:
        parts += _list(
            ["No task has runs of every set of options: each is over its own tasks, and they do not compare."]
        )
    elif left_out:
        parts += _list([f"Over the tasks that every set of options has runs of; not {', '.join(left_out)}."])
    return [*parts, f"<div class=pictures>{''.join(_figure(*one) for one in pictures.values())}</div>"]


def _limits(comparison: Comparison) -> list[str]:
    lines = []
    if len(comparison.tasks) > MOST_TASKS:
        lines.append(f"The first {MOST_TASKS} of {len(comparison.tasks)} tasks are drawn.")
    if len(comparison.names) > MOST_NAMES:
        lines.append(f"Pictures show the best {MOST_NAMES} of {len(comparison.names)} sets of options.")
    return _list(lines)


def _speed(comparison: Comparison) -> list[str]:
    rows = []
    for label in comparison.tasks:
        speeds = [comparison.speed(label, name) for name in comparison.names]
        rows.append([_row_head(label), *(_number(one, None if one is None else f"{one:,.0f}") for one in speeds)])
    devices = sorted(
        {
            f"{run.summary.get('device', 'unknown')}, {'compiled' if run.summary.get('compiled') else 'eager'}"
            for runs in comparison.cells.values()
            for run in runs
        }
    )
    return [
        "<h2>Speed</h2>",
        f"<p>Updates per second of each seed, the median over the runs: {escape('; '.join(devices))}. Runs that shared "
        "a machine, or ran on others, do not compare.</p>",
        _table("speed", ["dataset", *comparison.names], rows),
    ]


def _options(comparison: Comparison) -> list[str]:
    keys = list(next(iter(comparison.differing.values()), {}))
    if not keys:
        return []
    rows = []
    for name in comparison.names:
        values = comparison.differing[name]
        rows.append([_row_head(name), *(_text(values[key]) for key in keys)])
    return [
        "<h2>Options</h2>",
        "<p>Those in which runs on the same data differ, as few as tell them apart; what follows from them, as from a "
        "variant, is left out.</p>",
        _table("options", ["options", *keys], rows),
    ]


def _findings(runs: Sequence[ReportedRun]) -> list[str]:
    grouped: dict[str, list[tuple[ReportedRun, Mapping[str, Any]]]] = {}
    for run in runs:
        for finding in run.findings:
            grouped.setdefault(str(finding.get("name")), []).append((run, finding))
    rows = []
    for name, found in sorted(grouped.items(), key=lambda one: -len(one[1])):
        run, first = found[0]
        where = ", ".join(str(run.path) for run, _ in found[:3]) + (", ..." if len(found) > 3 else "")
        cells = (str(first.get("evidence")), str(first.get("advice")), where)
        rows.append([_row_head(name.replace("_", " ")), _number(len(found), str(len(found))), *map(_text, cells)])
    if not rows:
        return ["<h2>Findings</h2>", "<p>The doctor finds nothing in these runs.</p>"]
    return [
        "<h2>Findings</h2>",
        "<p>What the doctor sees in the runs; the evidence is that of the first.</p>",
        _table("findings", ["finding", "runs", "evidence", "what to change", "where"], rows),
    ]


def _listed(listed: Sequence[Listed]) -> list[str]:
    if not listed:
        return []
    rows = [[_row_head(one.path), _text(one.status), _text(one.reason)] for one in listed]
    return [
        "<h2>Not whole, or not in the tables</h2>",
        "<p>Seeds that diverged are left out of their run's scores; runs of another version are in the tables; the "
        "others are not.</p>",
        _table("listed", ["what", "status", "reason"], rows),
    ]


def _runs(runs: Sequence[ReportedRun], comparison: Comparison) -> list[str]:
    place = {run.path: cell for cell, several in comparison.cells.items() for run in several}
    rows = []
    for run in runs:
        task, name = place.get(run.path, (run.dataset, ""))
        seeds = ", ".join(map(str, run.scores)) or str(run.summary["seed"])
        final = float(np.mean(list(run.scores.values()))) if run.scores else None
        best, step = run.summary.get("best_score"), run.summary.get("best_step")
        rows.append(
            [
                _row_head(str(run.path)),
                _text(task),
                _text(name),
                f"<td>{escape(seeds)}</td>",
                _number(final),
                _number(best, None, f"at {step:,}" if step is not None else ""),
                _number(float(run.summary["steps"]), f"{run.summary['steps']:,}"),
            ]
        )
    heads = ["run", "dataset", "options", "seeds", "final score", "best score", "updates"]
    return [f"<h2>All runs</h2><details><summary>{len(runs)} runs</summary>", _table("runs", heads, rows), "</details>"]
