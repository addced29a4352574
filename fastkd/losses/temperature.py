"""Temperatures that change over the run, as weights do."""

from __future__ import annotations

from fastkd.layer_map.sections import COLDEST, HOTTEST
from fastkd.losses.weighting import factor
from fastkd.recipe.weights import Schedule


def temperature_at(temperature: float, schedule: Schedule | None, done: float) -> float:
    """The temperature when a share of the run in [0, 1] is done: a schedule's factor on it."""
    return temperature * factor(schedule, done)


def check_temperatures(temperature: float, schedule: Schedule | None, without: str | None) -> None:
    """See that a section's temperatures are some that its kind reads and the kernels take.

    Args:
        temperature: as given.
        schedule: its factor over the run, `None` where it stays.
        without: the kind, where it has no softmax, with what it compares instead.

    Raises:
        ValueError: they aren't.
    """
    if without is not None:
        for field, given in (
            ("temperature", temperature != 1.0),
            ("temperature_schedule", schedule is not None),
        ):
            if given:
                raise ValueError(
                    f"{field} is given, but {without}; leave it out, or give another kind"
                )
    if schedule is None:
        return
    for end in (schedule.first, schedule.last):
        if not COLDEST <= temperature * end <= HOTTEST:
            raise ValueError(
                f"temperature_schedule takes the temperature to {temperature * end:g}, expected "
                f"{COLDEST:g} to {HOTTEST:g}; it is a factor on temperature ({temperature:g})"
            )
