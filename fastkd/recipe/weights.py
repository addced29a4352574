"""What every loss's section has, and what scales a loss: a schedule, and what balances them all."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fastkd.section import Name, Section

Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(Section):
    """A factor on a term's weight that changes over the run."""

    kind: Literal["linear", "cosine", "step"] = "linear"
    """A straight line, half a cosine wave, or a jump at `begin`."""
    first: float = Field(default=1.0, ge=0)
    """Factor up to `begin`."""
    last: float = Field(default=0.0, ge=0)
    """Factor from `end` on; with `step` from `begin` on."""
    begin: Share = 0.0
    """Share of `train.steps` after which the factor starts to move."""
    end: Share = 1.0
    """Share of `train.steps` after which it stands still; `step` has none."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "step" and "end" in self.model_fields_set and self.end != 1.0:
            raise ValueError("a step has no end; leave it out, begin says when the factor jumps")
        if self.kind != "step" and self.begin >= self.end:
            raise ValueError(f"begin is {self.begin}, expected less than end ({self.end})")
        return self


class LossConfig(Section):
    """What the section of every loss has."""

    weight: float = Field(default=1.0, ge=0)
    """Factor in the total loss."""
    schedule: Schedule | None = None
    """How that factor changes over the run; not at all where not given."""
    loss: str = ""
    """Registered name of the loss; the key that the section stands under where not given."""

    @property
    def is_learned(self) -> bool:
        """Whether its weight is above 0 at any time; else it is but shown."""
        factors = (1.0,) if self.schedule is None else (self.schedule.first, self.schedule.last)
        return self.weight > 0 and max(factors) > 0


class Balance(Section):
    """How the terms are weighed against each other, on top of their own weights."""

    kind: Literal["constant", "ratio", "uncertainty"] = "constant"
    """Not at all; every term scaled to the running size of a reference term; or by learned
    variances (Kendall et al., arXiv 1705.07115, eq. 7), of the terms that are on."""
    reference: Name | None = None
    """Term that `ratio` scales the others to; the first one where not given. It must not be 0 at
    the first step."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the running means of `ratio`, per step."""
    limit: float = Field(default=5.0, gt=0)
    """Log-variances of `uncertainty` stay between minus and plus this."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        readers = {"reference": "ratio", "decay": "ratio", "limit": "uncertainty"}
        for field, kind in readers.items():
            default = type(self).model_fields[field].default
            if kind != self.kind and getattr(self, field) != default:
                raise ValueError(f"{field} is read by {kind} only; kind is {self.kind}")
        return self


def _short_balance(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


ShortBalance = Annotated[Balance, BeforeValidator(_short_balance)]
