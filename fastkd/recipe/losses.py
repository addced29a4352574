"""The section of the objective: its losses, and what they share.

`losses: {hidden: {...}}` is read into `terms`, each by the section of its own loss, and written as
it was read. `fastkd.losses.registry` knows the losses; it is imported when a recipe is read, as
loading this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializationInfo,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from fastkd.recipe.weights import Balance, LossConfig, ShortBalance
from fastkd.section import Section, did_you_mean, read_as, short


def _read_term(given: object) -> object:
    """Read (key, section) by the section of the loss that it names."""
    from fastkd.losses.registry import find_loss, is_loss_name, loss_class, loss_names

    assert isinstance(given, tuple), "keys are laid beside their sections"
    key, section = given
    named = section.get("loss") if isinstance(section, Mapping) else None
    if isinstance(section, LossConfig):
        named = section.loss or None
    loss = key if named is None else named
    if not isinstance(loss, str):
        raise ValueError(f"loss is {short(loss)}; expected one of {', '.join(loss_names())}")
    if named is None and find_loss(key) is None:
        raise ValueError(_unknown_key(key))
    if not is_loss_name(key):
        raise ValueError(
            "a loss can't have this name; give one of letters, digits, - and _ that begins with a "
            "letter"
        )
    config = loss_class(loss).Config
    if isinstance(section, LossConfig):
        if not isinstance(section, config):
            raise ValueError(f"expected the section of {loss}, found {type(section).__qualname__}")
        return section.model_copy(update={"loss": loss})
    full = {**section, "loss": loss} if isinstance(section, Mapping) else section
    # under the loss's name, which a complaint then says the section of
    return read_as(config, loss, full)


def _unknown_key(key: str) -> str:
    allowed = Losses.keys_of_a_file()
    return (
        f"unknown key; {did_you_mean(key, allowed)}expected one of {', '.join(allowed)}, or a name "
        "of your own for a section that says which loss it is, as in loss: hidden"
    )


class Losses(Section):
    """The losses of the objective, and what they share; a loss that is absent is off."""

    terms: dict[str, Annotated[SerializeAsAny[LossConfig], BeforeValidator(_read_term)]] = Field(
        default_factory=dict
    )
    """The losses by name, in the order of the registry; a file has them beside the other keys."""
    balance: ShortBalance = Balance()
    """How the terms are weighed against each other; a word, or a section."""
    reduction: Literal["valid", "tinybert"] = "valid"
    """Means over valid tokens and query-key pairs, or over all as the official TinyBERT code."""
    projection: Literal["auto", "none", "shared", "per_pair"] = "auto"
    """From student to teacher width: one for hidden states and embeddings of all pairs (TinyBERT),
    one a pair, or none; auto is none where the widths agree, else shared."""
    projection_bias: bool = True
    """Whether projections have a bias."""
    projection_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of projections; `train.learning_rate` where not given."""

    @classmethod
    def keys_of_a_file(cls) -> list[str]:
        """What a file may say here."""
        from fastkd.losses.registry import loss_names

        return [*loss_names(), *(name for name in cls.model_fields if name != "terms")]

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, given: Any) -> Any:
        """Move the losses, which stand beside the other keys, into `terms`."""
        if not isinstance(given, Mapping):
            return given
        from fastkd.losses.registry import find_loss

        section: dict[Any, Any] = {}
        terms: dict[str, tuple[str, Any]] = {}
        for key, value in given.items():
            if not isinstance(key, str) or (key in cls.model_fields and key != "terms"):
                section[key] = value
            # a recipe that was written out names the losses that are off
            elif value is not None or find_loss(key) is None:
                terms[key] = (key, value)
        return {**section, "terms": terms}

    @field_validator("terms", mode="after")
    @classmethod
    def _in_order(cls, terms: dict[str, LossConfig]) -> dict[str, LossConfig]:
        """Sort by the registry: what a file's order was says nothing about checkpoints."""
        from fastkd.losses.registry import loss_names

        names = loss_names()

        def place(name: str) -> tuple[int, bool, str]:
            loss = terms[name].loss
            return names.index(loss), name != loss, name

        return {name: terms[name] for name in sorted(terms, key=place)}

    @model_serializer(mode="wrap")
    def _beside_the_other_keys(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        from fastkd.losses.registry import BUILT_IN

        tree = handler(self)
        written: dict[str, Any] = {} if info.exclude_none else dict.fromkeys(BUILT_IN)
        for name, term in tree.pop("terms").items():
            loss = term.pop("loss")
            written[name] = term if loss == name else {"loss": loss, **term}
        return {**written, **tree}

    def of(self, loss: str) -> list[LossConfig]:
        """The sections of a loss, under whatever names."""
        return [config for config in self.terms.values() if config.loss == loss]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        from fastkd.losses.registry import loss_class, loss_names

        if not self.terms:
            *names, last = loss_names()
            raise ValueError(f"no term is given; expected {', '.join(names)} or {last}")
        if not any(config.is_learned for config in self.terms.values()):
            raise ValueError(
                f"the weight of {' and '.join(self.terms)} is 0 throughout, so nothing is learned; "
                "give a weight above 0"
            )
        reference = self.balance.reference
        if reference is not None and reference not in self.terms:
            raise ValueError(
                f"balance.reference is {reference}, but that term is off; expected one of "
                f"{', '.join(self.terms)}"
            )
        for name, config in self.terms.items():
            kind = loss_class(config.loss)
            if kind.once and len(self.of(config.loss)) > 1:
                same = [other for other, c in self.terms.items() if c.loss == config.loss]
                raise ValueError(
                    f"{' and '.join(same)} are both {config.loss}, which a recipe can have only "
                    "once; leave one out"
                )
            if self.reduction == "tinybert":
                _check_official(name, config, kind.official_kind)
        return self


def _check_official(name: str, config: LossConfig, official: str | None) -> None:
    given = getattr(config, "kind", None)
    if official is not None and given != official:
        raise ValueError(
            f"reduction is tinybert, but {name}.kind is {given}, which the official code does "
            f"not have; expected {official}, or reduction: valid"
        )
