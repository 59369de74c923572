"""One page over any number of runs: `python recipes/report.py 'runs=[runs/hopper-*, runs/sweep]' output=report`."""

from __future__ import annotations

from pathlib import Path

from iql_torchrl.configuration.command_line import recipe
from iql_torchrl.running.options import ReportOptions


@recipe("report", ReportOptions)
def main(options: ReportOptions) -> None:
    """Gather the runs, write the page, its pictures and the table, print the table."""
    from iql_torchrl.reporting.report.writing import summary_lines, write_report

    folder = Path(options.output)
    comparison, listed = write_report(options.runs, folder)
    print(
        f"{summary_lines(comparison, listed)}\nwrote {folder / 'report.html'}, its pictures and {folder / 'table.csv'}"
    )


if __name__ == "__main__":
    main()
