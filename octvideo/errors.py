"""The errors that end a command with one line; any other exception keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can put right; the message says what was got, what is allowed, and where."""


class ListError(UserError):
    """A list file that cannot be read; the message names the file, and the line if there is one."""


class DecodeError(UserError):
    """A video that cannot be decoded: its path, and the reason in one line."""

    def __init__(self, path: str, reason: str = "") -> None:
        # A loader's worker process rebuilds an error from its message alone.
        super().__init__(f"{path}: {reason}" if reason else path)
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class UnreadableError(DecodeError):
    """A video that one backend cannot read at all; another one may."""


class IndexFileError(UserError):
    """An index that is missing, truncated, or of another version; the message names the file."""


class PreparationError(UserError):
    """A data set that cannot be prepared with these options; the message names the folder."""


class DamagedCheckpointError(UserError):
    """A checkpoint that is truncated, or whose bytes have changed since it was written."""


class NotFiniteError(UserError):
    """A loss or gradient that is infinite or not a number; the weights have not been updated with it."""


class LoaderKilledError(UserError):
    """A data-loading process that was killed by the system, or crashed."""


class StoreError(UserError):
    """A store of files that cannot be used: it does not answer, does not exist, or refuses these credentials."""


class DoesNotPayError(UserError):
    """A network that octaves cannot make cheaper as was asked; the message has the numbers."""
