"""What two runs have in common, bit for bit."""

import csv

import numpy as np
import torch

# What may differ between two runs of the same seed.
_TIMES = {"updates_per_second", "seconds", "environment_seconds", "inference_seconds"}


def rows_without_times(path):
    """The rows of ``metrics.csv`` or ``eval.csv`` apart from times."""
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if key not in _TIMES} for row in csv.DictReader(file)]


def same(one, other):
    """Whether two nested states are equal in type, structure and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
