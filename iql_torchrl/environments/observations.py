"""Observations as one vector: spaces with parts laid out in a fixed order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple

# Of a vector: a discrete space takes as many as it has elements.
MOST_NUMBERS = 1_000_000


class UnsupportedSpace(ValueError):
    """A space that cannot be laid out as one vector; the message names the part and what it is."""


def flat_size(space: Space, name: str = "observation") -> int:
    """Numbers in :func:`flatten` of an element of ``space``.

    Raises:
        UnsupportedSpace: images, text, sequences, graphs, and more than ``MOST_NUMBERS``.
    """
    size = _size(space, name)
    if size > MOST_NUMBERS:
        raise UnsupportedSpace(f"{name} has {size:,} numbers as a vector, more than {MOST_NUMBERS:,}")
    return size


def _size(space: Space, name: str) -> int:
    if isinstance(space, Dict | Tuple) and not len(space.spaces):
        raise UnsupportedSpace(f"{name} has no parts")
    if isinstance(space, Dict):
        return sum(_size(space[key], f"{name}/{key}") for key in sorted(space.spaces))
    if isinstance(space, Tuple):
        return sum(_size(part, f"{name}/{index}") for index, part in enumerate(space.spaces))
    if isinstance(space, Discrete):
        return int(space.n)
    if isinstance(space, MultiDiscrete):
        return sum(space.nvec.reshape(-1).tolist())  # which int64 may not hold
    if isinstance(space, Box) and (len(space.shape) > 2 or (len(space.shape) == 2 and space.dtype == np.uint8)):
        raise UnsupportedSpace(f"{name} is an image, {space}")
    if isinstance(space, Box | MultiBinary):
        return math.prod(space.shape)
    raise UnsupportedSpace(f"{name} is {space}")


def flatten(space: Space, elements: Any, count: int) -> np.ndarray:
    """Elements of a space as rows, ``[count, flat_size(space)]``.

    The parts of a ``Dict`` come in the alphabetical order of their names, whatever the order in which the space or the
    data list them; those of a ``Tuple`` in theirs. Arrays are laid out row by row; a discrete number is a one-hot
    vector.

    Args:
        space: one that :func:`flat_size` accepts.
        elements: with a leading dimension of ``count`` in every part.

    Raises:
        ValueError: elements of other sizes, or discrete numbers outside the space.
    """
    if isinstance(space, Dict):
        return np.concatenate([flatten(space[key], elements[key], count) for key in sorted(space.spaces)], axis=1)
    if isinstance(space, Tuple):
        parts = zip(space.spaces, elements, strict=True)
        return np.concatenate([flatten(part, values, count) for part, values in parts], axis=1)
    if isinstance(space, Discrete):
        one_hot = np.zeros((count, int(space.n)), np.float32)
        one_hot[np.arange(count), digits(space, elements, count)] = 1
        return one_hot
    if isinstance(space, MultiDiscrete):
        columns = np.asarray(elements).reshape(count, -1).T
        sizes = zip(space.nvec.reshape(-1), np.reshape(space.start, -1), columns, strict=True)
        parts = [flatten(Discrete(int(size), start=int(start)), column, count) for size, start, column in sizes]
        return np.concatenate(parts, axis=1)
    found = np.asarray(elements).reshape(count, -1)
    if found.shape[1] != flat_size(space):
        raise ValueError(f"{found.shape[1]} numbers where {space} has {flat_size(space)}")
    return found


def digits(space: Discrete, elements: Any, count: int) -> np.ndarray:
    """Elements of a discrete space as integers from 0, ``[count]``.

    Raises:
        ValueError: another number of them, or numbers that are not the space's.
    """
    found = np.asarray(elements).reshape(-1)
    if len(found) != count:
        raise ValueError(f"{len(found)} elements of {space} where {count} are needed")
    shifted = found - int(space.start)
    odd = np.flatnonzero((shifted != np.floor(shifted)) | (shifted < 0) | (shifted >= int(space.n)))
    if len(odd):
        raise ValueError(f"element {found[odd[0]]} is none of {space}")
    return shifted.astype(np.int64)
