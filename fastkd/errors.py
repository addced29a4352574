"""What the command line turns into one line and an exit code."""


class UserError(ValueError):
    """Bad input, exit code 2. The message says what was given, what was expected, what to do."""


class DiskError(UserError):
    """A disk that failed this process: of several ranks perhaps one alone, which must say so."""


class Interrupted(Exception):
    """A run was asked to stop, exit code 130; while it trains it writes a checkpoint first."""


class LostRank(Exception):
    """Another rank is gone or hangs, exit code 1."""


def one_line(error: Exception, length: int | None = 200) -> str:
    """What an error says, without line breaks, cut to so many characters; `None` is all of it."""
    return " ".join(str(error).split())[:length]


FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model of transformers raises where it is run or built in a way that it is not made for;
for its own calls only."""
