"""The one exception for mistakes that a user can fix: the command line prints it, exit code 2."""


class UserError(ValueError):
    """Bad input. The message says what was given, what was expected and what to do, in one line."""
