"""Report on a dataset before training on it: `python recipes/inspect_dataset.py dataset=hdf5 dataset.path=FILE`."""

from __future__ import annotations

import json
from pathlib import Path

from iql_torchrl.configuration.command_line import recipe
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.running.options import InspectOptions


@recipe("inspect_dataset", InspectOptions)
def main(options: InspectOptions) -> None:
    """Measure the dataset, print, write and draw the report."""
    from iql_torchrl.atomic import write_atomically
    from iql_torchrl.reporting.dataset_report import as_text, draw_report, inspect_dataset

    report = inspect_dataset(options.dataset, options.env)
    folder = Path(options.output)
    content = (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", lambda file: file.write(content))
        draw_report(report, folder / "report.png")
    except OSError as error:
        raise ConfigurationError(f"output={folder} cannot be written: {error}.") from error
    print(f"{as_text(report)}\nwrote {folder / 'report.json'} and {folder / 'report.png'}")


if __name__ == "__main__":
    main()
