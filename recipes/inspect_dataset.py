"""Report on a dataset before training on it: `python recipes/inspect_dataset.py dataset=hdf5 dataset.path=FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from iql_torchrl.configuration import check_command_line, report_errors
from iql_torchrl.errors import ConfigurationError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAME = "inspect_dataset"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=NAME)
@report_errors
def main(config: DictConfig) -> None:
    """Measure the dataset, print, write and draw the report."""
    from iql_torchrl import experiment
    from iql_torchrl.atomic import write_atomically
    from iql_torchrl.reporting.dataset_report import as_text, draw_report

    report = experiment.inspect_dataset(config)
    folder = Path(config.output)
    content = (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", lambda file: file.write(content))
        draw_report(report, folder / "report.png")
    except OSError as error:
        raise ConfigurationError(f"output={folder} cannot be written: {error}.") from error
    print(f"{as_text(report)}\nwrote {folder / 'report.json'} and {folder / 'report.png'}")


if __name__ == "__main__":
    report_errors(check_command_line)(sys.argv[1:], CONFIGS, NAME)
    main()
