"""Errors that a user can cause: each message names the thing, what was found and what to do."""


class UserError(ValueError):
    """Base of them all; the recipes print its message alone and exit with status 2."""


class DatasetError(UserError):
    """A dataset that cannot be read, or whose content cannot be trained on."""


class CheckpointError(UserError):
    """A checkpoint that is truncated, foreign, or of another architecture."""


class ConfigurationError(UserError):
    """An option that does not exist, or whose value makes no sense."""


class SimulatorError(UserError):
    """An environment that is unknown, does not start, or does not fit the data."""


class DivergenceError(UserError):
    """Losses or parameters that are no numbers any more."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
