"""The tables of options in ``configs/README.md``, written from the declarations: ``make docs``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from iql_torchrl.atomic import write_atomically
from iql_torchrl.configuration.composing import CONFIGS, compose_values, group_options, initialised
from iql_torchrl.configuration.declaring import Options, declared_defaults, group_name, groups_of
from iql_torchrl.configuration.help import NEEDED, Described, described
from iql_torchrl.running.options import (
    BenchmarkOptions,
    CollectOptions,
    EvaluateOptions,
    ExportOptions,
    FinetuneOptions,
    InspectOptions,
    JudgeOptions,
    OfflineOptions,
    ReportOptions,
    StorageBenchmarkOptions,
)

README = CONFIGS / "README.md"
BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"
RECIPES: dict[str, type[Options]] = {
    "iql_offline": OfflineOptions,
    "iql_finetune": FinetuneOptions,
    "evaluate": EvaluateOptions,
    "export": ExportOptions,
    "inspect_dataset": InspectOptions,
    "collect_dataset": CollectOptions,
    "judge": JudgeOptions,
    "report": ReportOptions,
    "benchmark": BenchmarkOptions,
    "benchmark_storage": StorageBenchmarkOptions,
}
# Has options that some value must be given for, but none that changes another's default.
_ANY_DATASET = "dataset=hdf5"
_RUN_DIR = "runs/DATE_TIME"
_SECTIONS = ("", "algorithm", "env", "train", "eval", "checkpoint", "logger")


def main() -> None:
    """Rewrite the tables in ``configs/README.md``."""
    text = with_tables(README.read_text()).encode()
    write_atomically(README, lambda file: file.write(text))
    print(f"wrote {README}")


def with_tables(text: str) -> str:
    """A text with the tables as they are now between its two markers.

    Raises:
        ValueError: it does not have each marker once, one before the other.
    """
    before, begin, rest = text.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not begin or not end or BEGIN in between + after or END in before + after:
        raise ValueError(f"{README.name} must have {BEGIN} and, after it, {END}, each once.")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def tables() -> str:
    """Every option of every recipe: a table for each section, each source of data and each further recipe."""
    with initialised():
        training, set_elsewhere = _of_training(), _set_elsewhere()
        parts = []
        for section in _SECTIONS:
            rows = [row for row in training if (row.name.partition(".")[0] if "." in row.name else "") == section]
            parts.append(_part(f"`{section}`" if section else "The run", rows, set_elsewhere=set_elsewhere))
        parts += [_part(heading, rows) for heading, rows in _of_sources().items()]
        parts.append(_part("Keys of RLinf's documentation, of its three configs alone", _of_rlinf(training)))
        parts += [_of_recipe(name, training) for name in RECIPES if name != "iql_offline"]
    return "\n".join(parts)


def _of_training() -> list[Described]:
    """The options of the recipe that trains, before preset and variant, but for the datasets' own."""
    values, _ = compose_values("iql_offline", [_ANY_DATASET, f"run_dir={_RUN_DIR}"], OfflineOptions, needed=False)
    values["algorithm"] = _raw("algorithm/_base")
    (logger,) = groups_of(OfflineOptions.model_fields["logger"])
    values["logger"] |= declared_defaults(logger)  # of all loggers, where csv has none
    return _without_dataset(described(OfflineOptions, values))


def _set_elsewhere() -> dict[str, list[str]]:
    """What else than the recipe's own file sets an option, by its name."""
    found = {f"algorithm.{name}": ["variant"] for name in _raw("variant/paper")}
    for group, what in (("algorithm", "preset"), ("dataset", "dataset")):
        for choice in group_options(group):
            content = _raw(f"{group}/{choice}")
            # Either the group's own options, or sections where there are more.
            for section, options in (content if group in content else {group: content}).items():
                for name in options if isinstance(options, Mapping) else ():
                    said = found.setdefault(f"{section}.{name}", [])
                    said += [what] if what not in said else []
    return found


def _of_sources() -> dict[str, list[Described]]:
    """By heading: the options that all sources of the command line share, and each one's own.

    Sources that have the same options come under one heading.
    """
    named = group_options("dataset")
    of_each: dict[str, list[Described]] = {}
    for source in groups_of(OfflineOptions.model_fields["dataset"]):
        if group_name(source) in named:  # the others are for programs
            of_each[group_name(source)] = list(described(source, declared_defaults(source), "dataset."))
    shared = [row for row in next(iter(of_each.values())) if all(row in rows for rows in of_each.values())]
    alike: dict[tuple[Described, ...], list[str]] = {}
    for name, rows in of_each.items():
        own = sorted((row for row in rows if row not in shared), key=lambda row: row.default != NEEDED)
        alike.setdefault(tuple(own), []).append(f"`dataset={name}`")
    return {"`dataset`, of every source": shared} | {
        ", ".join(names): list(rows) for rows, names in alike.items() if rows
    }


def _of_rlinf(training: Sequence[Described]) -> list[Described]:
    found: dict[str, Described] = {}
    known = {row.name for row in training}
    for path in sorted(CONFIGS.glob("d4rl_iql_*.yaml")):
        values, _ = compose_values(path.stem, [], OfflineOptions)
        for row in _without_dataset(described(OfflineOptions, values)):
            before = found.get(row.name, row)
            differs = row.default not in before.default.split(", ")
            found[row.name] = replace(row, default=f"{before.default}, {row.default}") if differs else before
    return [row for row in found.values() if row.name not in known]


def _of_recipe(name: str, training: Sequence[Described]) -> str:
    options = RECIPES[name]
    whole = [section for section in ("algorithm", "dataset") if section in options.model_fields]
    values, _ = compose_values(name, [_ANY_DATASET] if "dataset" in whole else [], options, needed=False)
    if "run_dir" in values:
        values["run_dir"] = _RUN_DIR
    rows = [row for row in described(options, values) if row.name.partition(".")[0] not in whole]
    shared = [f"`{row.name}`" for row in rows if row in training] + [f"`{section}.*`" for section in whole]
    own = [row for row in rows if row not in training]
    return _part(f"`recipes/{name}.py`", own, f"Also {', '.join(shared)}, as above." if shared else "")


def _raw(name: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    return {key: value for key, value in found.items() if key != "defaults"}


def _without_dataset(rows: Iterable[Described]) -> list[Described]:
    return [row for row in rows if not row.name.startswith("dataset.")]


def _part(
    heading: str, rows: Sequence[Described], note: str = "", set_elsewhere: Mapping[str, Sequence[str]] | None = None
) -> str:
    lines = [f"### {heading}", "", *([note, ""] if note else [])]
    lines += ["| option | default | values | | source |", "|---|---|---|---|---|"]
    for row in rows:
        default = "needed" if row.default == NEEDED else f"`{row.default}`"
        default = ", ".join([default, *(set_elsewhere or {}).get(row.name, ())])
        cells = (f"`{row.name}`", default, row.expected, row.about, row.source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
