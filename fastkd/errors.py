"""What the command line turns into one line and an exit code."""

import os
from collections.abc import Sequence

# characters of a message
_LONGEST = 2000


class UserError(ValueError):
    """Bad input, exit code 2. The message says what was given, what was expected, what to do.

    It is one line whatever it quotes: line ends and control characters are written out, and the
    middle of what no one would read is left out.
    """

    def __init__(self, message: str) -> None:
        line = printable(message)
        cut = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        super().__init__(line if len(line) <= _LONGEST else cut)


class RankError(UserError):
    """A mistake that of several ranks perhaps one alone finds, which must say so."""


class SharedError(UserError):
    """A mistake that all ranks know of, which the first one says."""


class DiskError(RankError):
    """A disk that failed this process."""


class Interrupted(Exception):
    """A run was asked to stop, exit code 130; while it trains it writes a checkpoint first."""


class LostRank(Exception):
    """Another rank is gone or hangs, exit code 1."""


def printable(text: str) -> str:
    """Text from elsewhere as one line that moves no cursor: what is no character is written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def some_of(names: Sequence[str], most: int = 20) -> str:
    """Names for a line of people, which does not end if there are very many."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def path_name(given: object, what: str, expected: str) -> str:
    """A path that a caller gives, as text; `what` it is of, and what was `expected` beside it.

    Raises:
        UserError: it is none.
    """
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    raise UserError(f"{what} is a {type(given).__name__}, expected {expected}")


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON and YAML can spell half of a surrogate pair, no file system
    and no tokenizer takes one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(error: BaseException, length: int | None = 200) -> str:
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
