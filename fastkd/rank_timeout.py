"""How long a rank waits for the others, which the environment may say."""

from __future__ import annotations

import datetime
import math
import os

from fastkd.errors import UserError

TIMEOUT = "FASTKD_RANK_TIMEOUT"
"""Environment variable: seconds that a rank waits for the others."""

_DEFAULT_SECONDS = 7200.0


def rank_timeout() -> datetime.timedelta | None:
    """How long a rank waits for the others, where the environment says so.

    Raises:
        UserError: it says something else than a number of seconds.
    """
    given = os.environ.get(TIMEOUT)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    # a year, which every clock here can count to
    if not 0 < seconds <= 3.2e7:
        raise UserError(
            f"{TIMEOUT} is {given!r}, expected a number of seconds, as in {TIMEOUT}=600"
        )
    return datetime.timedelta(seconds=seconds)


def default_timeout() -> datetime.timedelta:
    """How long the others wait while rank 0 tokenises a corpus."""
    return rank_timeout() or datetime.timedelta(seconds=_DEFAULT_SECONDS)
