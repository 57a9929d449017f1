"""The one exception that means "the user's configuration or input is wrong"."""

__all__ = ["UserError"]


class UserError(ValueError):
    """An error that the user can fix; the command prints the message alone and exits with code 2.

    The message names the offending key, file, tensor or column, and the fix. Anything that is not a
    ``UserError`` is a failure of the program or the machine: traceback and exit code 1.
    """
