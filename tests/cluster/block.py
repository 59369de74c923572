"""What the clusters are to the one who uses them: there while a block lasts, and gone afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Block(ABC):
    """Started on entering the block, and stopped on leaving it, also where it does not start."""

    @abstractmethod
    def start_all(self) -> None:
        """Start everything, and wait until it can be used."""

    @abstractmethod
    def stop(self) -> None:
        """End everything that has been started, whatever has become of it."""

    def __enter__(self) -> Self:
        try:
            self.start_all()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
