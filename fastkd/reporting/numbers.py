"""Numbers as text: rounded for a reader, but what is there never reads as nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

# with so many a float is told from every other
_DIGITS = 17


def number(value: float, digits: int = 4) -> str:
    """A number of an axis, a tooltip or a time: so many digits, thousands apart, `1e-5`."""
    if math.isfinite(value) and 1000 <= abs(value) < 1e9:
        places = max(0, digits - len(str(int(abs(value)))))
        return _without_zeros(f"{value:,.{places}f}")
    mantissa, mark, power = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(power)}" if mark else mantissa


def tick_numbers(ticks: Sequence[float]) -> list[str]:
    """Ticks in ascending order as text, with the digits that the distances between them need."""
    nearest = min((high - low for low, high in pairwise(ticks)), default=math.inf)
    shown: list[str] = []
    for digits in range(4, _DIGITS + 1):
        shown = [number(tick, digits) for tick in ticks]
        told = [float(text.replace(",", "")) for text in shown]
        if all(abs(one - tick) <= nearest / 100 for one, tick in zip(told, ticks, strict=True)):
            break
    return shown


def fixed(value: float, places: int = 0) -> str:
    """A number with so many decimals, thousands apart; one that these would make 0 with as many as
    show two digits of it: `0.0024`."""
    if value and not round(value, places):
        places = 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{places}f}"


def gib(size: int, places: int = 1) -> str:
    """Bytes of memory or of a disk, in GiB."""
    return f"{fixed(size / 2**30, places)} GiB"


def size_of(size: int) -> str:
    """Bytes in GiB, or in MiB where it is less than one."""
    return f"{size / 2**30:,.3g} GiB" if size >= 2**30 else f"{size / 2**20:,.3g} MiB"


def percent(share: float, places: int = 0) -> str:
    """A share in percent; what is not none and not all does not read so: `<0.1%`, `>99.9%`."""
    text, least = f"{share:.{places}%}", 10.0**-places
    if 0 < share < 1 and text in (f"{0:.{places}%}", f"{1:.{places}%}"):
        return f"<{least:g}%" if share < 0.5 else f">{100 - least:g}%"
    return text


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
