"""The one exception that means "the user's configuration or input is wrong"."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Something the user can mend; the command prints the message alone and exits with code 2.

    The message names the culprit (key, file, tensor, column) and the mend. Anything that is not a
    ``UserError`` is a failure of the program or the machine: traceback and exit code 1.
    """
