"""The run folder: metrics, curves and the closing summary."""

from iql_torchrl.reporting.curves import draw_curves
from iql_torchrl.reporting.loggers import make_logger
from iql_torchrl.reporting.run_folder import RunFolder
from iql_torchrl.reporting.summary import Stopwatch, closing_table, summarise, versions

__all__ = ["RunFolder", "Stopwatch", "closing_table", "draw_curves", "make_logger", "summarise", "versions"]
