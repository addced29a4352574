"""What of a teacher's weights a narrower student takes: which dimension counts what, and the cut.

A student of the same architecture has parameters of the same names. Where a dimension of one is
shorter than the teacher's, its length says what it counts: the hidden width, the neurons of a
feed-forward layer, or the channels of attention heads; in the projections of attention, whose width
of heads is often the hidden width too, what is projected from what is seen in a pass. Nothing is
known by name. Whether it was read rightly is tried: with the channels of the teacher in another
order it must give what it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastkd.capture import capture_keywords, find_blocks, route_attention
from fastkd.capture.blocks import blocks_path
from fastkd.capture.lm_head import overheard
from fastkd.capture.routing import listening, runnable
from fastkd.capture.trial_inputs import trial_inputs
from fastkd.errors import UserError

HIDDEN = -1
"""Stand-in for a block's number, of what all blocks share."""
Role = tuple[str, int]
"""What a dimension counts (`hidden`, `neurons`, `heads`, `keys`), and in which block, from 0."""
Roles = dict[str, tuple[Role | None, ...]]
"""By parameter of the teacher, of each dimension; `None` where it stays as it is."""
# of the mean size of what a pass gives
_SAME = {torch.float32: 1e-3, torch.float64: 1e-9}
_REMEDY = "give student.init=teacher or random, or the teacher's own widths"


@dataclass(frozen=True)
class Widths:
    """Numbers that students change, of one model."""

    hidden: int
    neurons: int
    heads: int
    keys: int
    """Key and value heads."""
    head_size: int

    @classmethod
    def of(cls, config: PreTrainedConfig, feed_forward: str | None) -> Widths:
        """Those of a configuration, whose feed-forward width has a name or none."""
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        neurons = getattr(config, feed_forward, None) if feed_forward else None
        return cls(config.hidden_size, neurons or 0, heads, keys, size)


@dataclass(frozen=True)
class Projections:
    """Linear layers of a block's attention, by their paths in the block."""

    inner: frozenset[str]
    """What makes queries, keys and values."""
    output: str
    """What reads the heads' outputs."""


def find_projections(model: PreTrainedModel) -> list[Projections]:
    """Layers of every block that run before its attention, and the first that runs behind it.

    Raises:
        UserError: a block without.
    """
    events: list[list[str]] = [[] for _ in find_blocks(model)]
    running = model.config._attn_implementation
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(runnable(model))
        route_attention(model)
        stack.callback(setattr, model.config, "_attn_implementation", running)
        for block, seen in zip(find_blocks(model), events, strict=True):
            stack.enter_context(listening(block, _noting(seen, "")))
            for path, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_hook(_noting(seen, path)).remove)
        model(**trial_inputs(model, 4), **capture_keywords(model))
    found = []
    for number, seen in enumerate(events, start=1):
        place = seen.index("") if "" in seen else len(seen)
        behind = seen[place + 1 :]
        if not behind:
            raise UserError(
                f"student.init importance: block {number} of {type(model).__name__} has no linear "
                f"layer behind its attention, so its heads can't be cut; {_REMEDY}"
            )
        found.append(Projections(frozenset(seen[:place]), behind[0]))
    return found


def _noting(seen: list[str], what: str) -> Callable[..., None]:
    def note(*_: Any) -> None:
        seen.append(what)

    return note


def read_roles(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sources: Sequence[int],
    widths: tuple[Widths, Widths],
) -> Roles:
    """What each dimension of the teacher's parameters counts that the student has less of.

    Args:
        teacher: the model.
        student: of the same architecture.
        sources: teacher layers, from 1, of the student's blocks.
        widths: of the student and of the teacher.

    Raises:
        UserError: a dimension that counts none of what students change, or heads of another size.
    """
    small, large = widths
    if small.head_size != large.head_size:
        fits, rest = divmod(small.hidden, large.head_size)
        advice = f"give student.heads={fits}" if not rest else "give another student.hidden_size"
        raise UserError(
            f"student.init importance: heads of the student would be {small.head_size} wide, those "
            f"of the teacher are {large.head_size}, and heads are kept whole; {advice}"
        )
    if small.heads * large.keys > large.heads * small.keys:
        raise UserError(
            f"student.init importance: {small.heads} heads on {small.keys} key heads are more on "
            f"each than the teacher's {large.heads} on {large.keys}; give more student.kv_heads"
        )
    reader = _Reader(teacher, small, large)
    shapes = _shapes_in_blocks(student, sources)
    prefix = blocks_path(teacher) + "."
    outside = {name: tuple(p.shape) for name, p in student.named_parameters()}
    roles: Roles = {}
    for name, parameter in teacher.named_parameters():
        if name.startswith(prefix):
            number, _, path = name.removeprefix(prefix).partition(".")
            shape = shapes.get((int(number), path)) or shapes.get((HIDDEN, path))
            place = int(number), path
        else:
            shape, place = outside.get(name), (HIDDEN, name)
        if shape is not None:
            roles[name] = reader.roles(name, parameter, shape, *place)
    return roles


def _shapes_in_blocks(
    student: PreTrainedModel, sources: Sequence[int]
) -> dict[tuple[int, str], tuple[int, ...]]:
    """By block of the teacher and path; `HIDDEN` stands for a block that no student block is of."""
    found: dict[tuple[int, str], tuple[int, ...]] = {}
    for block, source in zip(find_blocks(student), sources, strict=True):
        for path, parameter in block.named_parameters():
            found[source - 1, path] = tuple(parameter.shape)
            found.setdefault((HIDDEN, path), tuple(parameter.shape))
    return found


class _Reader:
    """Reads what the dimensions of a parameter count."""

    def __init__(self, teacher: PreTrainedModel, small: Widths, large: Widths) -> None:
        self._name = type(teacher).__name__
        cuts_heads = (small.heads, small.keys) != (large.heads, large.keys)
        self._projections = find_projections(teacher) if cuts_heads else None
        size = large.head_size
        self._hidden = large.hidden, small.hidden
        self._neurons = large.neurons, small.neurons
        self._heads = large.heads * size, small.heads * size
        self._keys = large.keys * size, small.keys * size
        if self._hidden == self._neurons and self._hidden[0] != self._hidden[1]:
            raise UserError(
                f"student.init importance: {self._name} and the student have as many neurons as "
                f"hidden channels ({large.hidden} and {small.hidden}), which can't be told apart; "
                "give another student.intermediate_size"
            )

    def roles(
        self, name: str, parameter: Tensor, shape: tuple[int, ...], block: int, path: str
    ) -> tuple[Role | None, ...]:
        """What the dimensions of a parameter of the teacher count, whose shape in the student is
        given."""
        module, inner, output = path.rpartition(".")[0], False, False
        if block != HIDDEN and self._projections is not None:
            projections = self._projections[block]
            inner, output = module in projections.inner, module == projections.output
        found: list[Role | None] = []
        for place, pair in enumerate(zip(parameter.shape, shape, strict=True)):
            kinds = self._kinds(inner and place == 0, output and place == 1)
            role = next((kind for kind, known in kinds.items() if known == pair), None)
            if pair[0] != pair[1] and (role is None or (role != "hidden" and block == HIDDEN)):
                break
            found.append(None if pair[0] == pair[1] else (str(role), self._place(role, block)))
        if len(found) < parameter.ndim:
            raise UserError(
                f"student.init importance: {name} of {self._name} is {list(parameter.shape)}, and "
                f"{list(shape)} in the student, which is no width of channels, neurons or heads "
                f"alone; {_REMEDY}"
            )
        return tuple(found)

    def _kinds(self, inner: bool, output: bool) -> dict[str, tuple[int, int]]:
        """What a dimension may count, and how many the teacher and the student have of it."""
        if inner:
            return {"heads": self._heads, "keys": self._keys}
        if output:
            return {"heads": self._heads}
        return {"hidden": self._hidden, "neurons": self._neurons}

    @staticmethod
    def _place(role: str | None, block: int) -> int:
        return HIDDEN if role == "hidden" else block


def named_roles(roles: Roles) -> set[Role]:
    """All roles that a dimension of any parameter has."""
    return {role for dims in roles.values() for role in dims if role is not None}


def cut(parameter: Tensor, roles: Sequence[Role | None], kept: Mapping[Role, Tensor]) -> Tensor:
    """The channels of a parameter that are kept, in order.

    Args:
        parameter: of the teacher.
        roles: of its dimensions.
        kept: int64 numbers of channels by role.
    """
    for place, role in enumerate(roles):
        if role is not None:
            parameter = parameter.index_select(place, kept[role].to(parameter.device))
    return parameter


def check_roles(teacher: PreTrainedModel, roles: Roles, widths: Widths) -> None:
    """See that the teacher gives the same with all channels that have a role in another order.

    Args:
        teacher: is left as it came.
        roles: from `read_roles`.
        widths: its own.

    Raises:
        UserError: it doesn't: some channels are not what they were taken for.
    """
    named = named_roles(roles)
    if not named:
        return
    order = _shuffled(named, widths)
    back = {role: places.argsort() for role, places in order.items()}
    with torch.no_grad(), runnable(teacher):
        inputs = trial_inputs(teacher, 8)
        state, output = _outputs(teacher, inputs)
        with _reordered(teacher, roles, order, back):
            mixed, again = _outputs(teacher, inputs)
    if ("hidden", HIDDEN) in order:
        state = state.index_select(-1, order["hidden", HIDDEN].to(state.device))
    # without a head they are the states again
    same = teacher.base_model is teacher or _near(again, output)
    if not same or not _near(mixed, state):
        raise UserError(
            f"student.init importance: {type(teacher).__name__} gives something else when its "
            f"channels stand in another order, so a part of them can't be left out; {_REMEDY}"
        )


def _shuffled(named: set[Role], widths: Widths) -> dict[Role, Tensor]:
    """Another order for the channels of every role; heads stay whole and with their key heads."""
    generator = torch.Generator().manual_seed(0)
    size, shared = widths.head_size, widths.heads // widths.keys
    order: dict[Role, Tensor] = {}
    for kind, block in sorted(named):
        if kind in ("hidden", "neurons"):
            count = widths.hidden if kind == "hidden" else widths.neurons
            order[kind, block] = torch.randperm(count, generator=generator)
        elif ("heads", block) not in order:
            keys = torch.arange(widths.keys)
            if shared == 1 or ("keys", block) in named:
                keys = keys[torch.randperm(widths.keys, generator=generator)]
            heads = keys[:, None] * shared + torch.randperm(shared, generator=generator)
            order["heads", block] = channels(heads.flatten(), size)
            order["keys", block] = channels(keys, size)
    return order


def channels(heads: Tensor, size: int) -> Tensor:
    """Numbers of the channels of heads, [heads * size]."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


@contextmanager
def _reordered(
    model: PreTrainedModel,
    roles: Roles,
    order: Mapping[Role, Tensor],
    back: Mapping[Role, Tensor],
) -> Iterator[None]:
    parameters = dict(model.named_parameters())

    def move(places: Mapping[Role, Tensor]) -> None:
        for name, dims in roles.items():
            if any(role is not None for role in dims):
                parameters[name].copy_(cut(parameters[name], dims, places))

    move(order)
    try:
        yield
    finally:
        move(back)


def _outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The last hidden state, and what the model gives first."""
    with overheard(model, "states") as heard:
        output: Tensor = model(**inputs, **capture_keywords(model))[0]
    mask = inputs["attention_mask"].bool()
    # what stands at padding is anything
    given = output[mask] if output.shape[:2] == mask.shape else output
    return heard.output[mask], given


def _near(found: Tensor, expected: Tensor) -> bool:
    # a mean, as a few channels may be far larger than the others
    wrong, size = ((t.double().abs().mean()) for t in (found - expected, expected))
    return bool(wrong <= _SAME.get(expected.dtype, 5e-2) * size)
