"""Errors that a user can cause: each message names the thing, what was found and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Base of them all; the recipes print its message alone and exit with ``status``."""

    status = 2


class _FileError(UserError):
    """About a file of others: names out of it neither break the line nor steer a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message))


class DatasetError(_FileError):
    """A dataset that cannot be read, or whose content cannot be trained on."""


class CheckpointError(_FileError):
    """A checkpoint that is truncated, foreign, or of another architecture."""


class ExportError(UserError):
    """A policy that cannot be written in another format, or would act otherwise in it."""


class ConfigurationError(UserError):
    """Options that do not exist, or whose values make no sense: one mistake, or several in one error.

    Args:
        mistakes: a message each.
    """

    def __init__(self, *mistakes: str) -> None:
        several = f"{len(mistakes)} mistakes:" + "".join(f"\n  - {mistake}" for mistake in mistakes)
        super().__init__(mistakes[0] if len(mistakes) == 1 else several)
        self.mistakes = mistakes


class SimulatorError(UserError):
    """An environment that is unknown, does not start, or does not fit the data."""


class DivergenceError(UserError):
    """Losses or parameters that are no numbers any more."""

    status = 3


class RunError(UserError):
    """What stops a run in the middle, and lies outside it: rows and checkpoints before it stay, and it can go on."""

    status = 4


@contextmanager
def writing_to(what: str, then: str) -> Iterator[None]:
    """Around whatever writes into the folder of something that has begun.

    Args:
        what: the option and the folder.
        then: what is whole, and how to go on.

    Raises:
        RunError: it cannot be written any more.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save's own stands before it
        if not isinstance(cause, OSError):
            raise
        raise RunError(f"{what} cannot be written any more: {cause.strerror or cause}. {then}") from error


class RankError(UserError):
    """Processes of one run that do not fit together, or of which one has ended."""


# Of the reason why a file is damaged: what NumPy, tensordict and Minari say may repeat the whole of it.
LONGEST_REASON = 300


def first_line(error: BaseException, longest: int | None = None) -> str:
    """The first line of an error's message, or its kind where it has none.

    Args:
        error: of any kind.
        longest: letters that are kept; some errors list the whole of what is damaged.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:longest]
