"""Exceptions whose message says all: no traceback is shown for them."""

__all__ = ["AuditError", "RunFailure", "UserError"]


class UserError(ValueError):
    """An error that the user can fix; the command prints the message alone and exits with code 2.

    The message names the offending key, file, tensor or column, and the fix. Anything that is not a
    ``UserError`` or a ``RunFailure`` is a failure of the program or the machine: traceback and exit
    code 1.
    """


class RunFailure(RuntimeError):
    """A run that began rightly and came to an end that its input does not explain, such as a loss
    that is not finite. Raised on every rank; the command prints the message alone, once, and exits
    with code 1."""


class AuditError(RuntimeError):
    """A run's files are not those that were written, or its steps give other results than recorded.

    Raised on every rank; the command prints the message alone, once, and exits with code 4."""
