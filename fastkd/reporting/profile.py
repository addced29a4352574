"""What a profile says, in tables: where the time of a step goes, and what memory holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastkd.reporting.numbers import fixed, percent

Rows = list[tuple[str, ...]]
Bars = list[tuple[str, float, str]]
"""Name, size and size as text of each bar."""
_SAID = {"data": "data, waiting for it", "student": "student, forward", "rest": "the rest"}
# further columns that a profile may have, by their names in a summary
_SLOWEST = "slowest_milliseconds"
_MORE = {
    "processor_milliseconds": "processor, ms",
    "host_milliseconds": "host, ms",
    _SLOWEST: "slowest rank, ms",
}


def time_columns(profile: Mapping[str, Any]) -> tuple[str, ...]:
    """The heads of `time_rows`."""
    return (f"mean of {profile['steps']} steps", "ms", "share", *_more(profile).values())


def time_rows(profile: Mapping[str, Any]) -> Rows:
    """One row a phase, then the step.

    Args:
        profile: as `summary.json` has it.
    """
    phases: Mapping[str, Mapping[str, float]] = profile["phases"]
    more = _more(profile)
    rows: Rows = [
        (
            _SAID.get(name, name),
            _milliseconds(phase["milliseconds"]),
            percent(phase["share"], 1),
            *(_milliseconds(phase[key]) for key in more),
        )
        for name, phase in phases.items()
    ]
    # the slowest of each phase are not of one rank, and have no sum
    sums = [
        "" if key == _SLOWEST else _milliseconds(sum(phase[key] for phase in phases.values()))
        for key in more
    ]
    return [*rows, ("a step", _milliseconds(profile["milliseconds"]), "100.0%", *sums)]


def time_bars(profile: Mapping[str, Any]) -> Bars:
    """One bar a phase, as `time_rows` says it."""
    return [
        (
            _SAID.get(name, name),
            phase["milliseconds"],
            f"{_milliseconds(phase['milliseconds'])} ms, {percent(phase['share'])}",
        )
        for name, phase in profile["phases"].items()
    ]


def memory_rows(parts: Mapping[str, int], peak: int, kind: str) -> Rows:
    """One row a part, then what the peak is above them, and the peak.

    Args:
        parts: bytes.
        peak: likewise.
        kind: what they are of, GPU or process.
    """
    sizes = {**_parts(parts, peak, kind), "peak": peak}
    return [(name, _size(size)) for name, size in sizes.items()]


def memory_bars(parts: Mapping[str, int], peak: int, kind: str) -> Bars:
    """One bar a part, as `memory_rows` says it."""
    return [(name, size, _size(size)) for name, size in _parts(parts, peak, kind).items()]


def _parts(parts: Mapping[str, int], peak: int, kind: str) -> dict[str, int]:
    rest = "the rest" if kind == "GPU" else "libraries and the rest"
    return {**parts, rest: max(0, peak - sum(parts.values()))}


def _more(profile: Mapping[str, Any]) -> dict[str, str]:
    phase = next(iter(profile["phases"].values()))
    return {key: said for key, said in _MORE.items() if key in phase}


def _milliseconds(value: float) -> str:
    return fixed(value, 2 if value < 100 else 0)


def _size(size: int) -> str:
    mebibytes = size / 2**20
    return f"{fixed(mebibytes, 0 if mebibytes >= 10 else 2)} MiB"
