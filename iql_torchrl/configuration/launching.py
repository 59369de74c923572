"""Which of the processes that ``torchrun`` has started this one is."""

from __future__ import annotations

import os


def launched_rank() -> int:
    """Its place among them, from 0; 0 where ``torchrun`` has started none."""
    return int(os.environ["RANK"]) if _launched() else 0


def launched_count() -> int:
    """How many there are; 1 where ``torchrun`` has started none."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def _launched() -> bool:
    # Other launchers set RANK too, for programs that they know nothing of.
    return "TORCHELASTIC_RUN_ID" in os.environ
