"""A narrower student from the teacher's own channels: those that are most active on some text.

Minitron (Muralidharan et al., arXiv 2407.14679, section 2.2) estimates what a channel is worth from
activations alone: of hidden channels the mean absolute output of the norms, of neurons the mean
absolute input of the layer that reads them, of heads the mean length of their outputs. Hidden
channels are the same everywhere, neurons and heads each block's own. A norm divides by the mean
square of its input; where channels are left out, its weight is multiplied by what that mean square
changes by on the text, so that activations keep their size. Minitron leaves that to the training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture import reading
from fastkd.capture.blocks import blocks_path, first_tensor
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.layer_map import LayerMap
from fastkd.models.feed_forward import feed_forward_name
from fastkd.models.pruning import (
    HIDDEN,
    Role,
    Roles,
    Widths,
    channels,
    check_roles,
    cut,
    named_roles,
    read_roles,
)
from fastkd.packed_row import PackedRow
from fastkd.types import LENGTHS, Inputs, teacher_inputs


@dataclass
class Activity:
    """Sums over the tokens that were read, fp64."""

    channels: dict[Role, Tensor] = field(default_factory=dict)
    """What channels are worth; of heads one number each."""
    energy: dict[str, Tensor] = field(default_factory=dict)
    """By norm, each channel's share of the squares of its input, which adds up to the tokens."""
    bases: dict[str, int] = field(default_factory=dict)
    """By norm, what is added to its weight where it multiplies: 0, or 1 in families of Gemma's."""

    def add(self, role: Role, values: Tensor) -> None:
        """Sums of more tokens."""
        self.channels[role] = self.channels[role] + values if role in self.channels else values

    def summed(self, ranks: Ranks) -> Activity:
        """Over all ranks, which have read the same kinds of tokens; on the CPU."""
        return Activity(
            {role: ranks.sum(values).cpu() for role, values in self.channels.items()},
            {name: ranks.sum(values).cpu() for name, values in self.energy.items()},
            self.bases,
        )


def start_by_importance(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: LayerMap,
    batches: Iterable[Inputs],
    ranks: Ranks,
    origin: PreTrainedModel | None = None,
) -> int:
    """Give a student the most active channels of the teacher's mapped layers; collective.

    Args:
        student: of the teacher's architecture, no wider, on the CPU; its weights are replaced.
        teacher: in eval mode, on the device where it reads.
        layers: which teacher layer each student layer starts from.
        batches: this rank's; read where the student is narrower.
        ranks: this process among all.
        origin: the teacher before it was rounded, whose numbers are taken; the teacher itself where
            not given.

    Returns:
        How many numbers were taken.

    Raises:
        UserError: a student that is wider somewhere, or a family whose channels can't be told
            apart.
    """
    sources, name = layers.sources(), feed_forward_name(teacher.config)
    widths = Widths.of(student.config, name), Widths.of(teacher.config, name)
    _check_narrower(*widths)
    _check_scales(student, teacher)
    roles = read_roles(teacher, student, sources, widths)
    check_roles(teacher, roles, widths[1])
    named = named_roles(roles)
    kept: dict[Role, Tensor] = {}
    factors: dict[str, Tensor] = {}
    if named:
        activity = measure(teacher, roles, widths[1], batches).summed(ranks)
        # sums are the same on all ranks, and so is what follows once one of them has chosen
        kept = ranks.from_main(lambda: choose(activity, named, sources, *widths))
        factors = ranks.from_main(lambda: norm_factors(activity, kept, *widths))
    bases = activity.bases if named else {}
    return _copy(student, origin or teacher, sources, roles, kept, factors, bases)


def measure(
    teacher: PreTrainedModel, roles: Roles, widths: Widths, batches: Iterable[Inputs]
) -> Activity:
    """What the channels that have a role do on some inputs.

    Args:
        teacher: reads them.
        roles: of its parameters.
        widths: its own.
        batches: what it reads.

    Raises:
        UserError: channels that are to be chosen are read by nothing that is listened to.
    """
    activity = Activity()
    counted: list[Tensor | None] = [None]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for path, module in teacher.named_modules():
            for hook in _hooks(path, module, roles, widths, activity, counted):
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        for batch in batches:
            inputs = {
                name: tensor if name == LENGTHS else tensor.to(teacher.device)
                for name, tensor in teacher_inputs(batch).items()
            }
            with reading(teacher, inputs) as read:
                row = PackedRow.of(inputs)
                counted[0] = inputs.get("attention_mask") if row is None else row.mask
                teacher(**read)
    named = named_roles(roles)
    silent = sorted(role for role in named - activity.channels.keys() if role[0] != "keys")
    if silent:
        reader = "norm weighs" if silent[0][0] == "hidden" else "linear layer reads"
        raise UserError(
            f"student.init importance: no {reader} the {silent[0][0]} of {type(teacher).__name__}, "
            "so they can't be chosen by what goes through it; give student.init=teacher or random"
        )
    return activity


def _hooks(
    path: str,
    module: nn.Module,
    roles: Roles,
    widths: Widths,
    activity: Activity,
    counted: Sequence[Tensor | None],
) -> Iterator[Any]:
    """What is to be noted of a module's passes."""
    dims = roles.get(f"{path}.weight", ())
    if len(dims) == 1 and dims[0] == ("hidden", HIDDEN):
        form = norm_form(module, widths.hidden)
        if form is not None:
            activity.bases[path] = form.base

        def of_norm(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            states, given = (_tokens(t, counted[0]) for t in (first_tensor(args, kwargs), output))
            activity.add(("hidden", HIDDEN), given.abs().sum(dim=0))
            if form is None:
                return
            states = states - states.mean(dim=1, keepdim=True) if form.centres else states
            squares = states.square()
            shares = (squares / squares.sum(dim=1, keepdim=True).clamp(min=1e-30)).sum(dim=0)
            before = activity.energy.get(path)
            activity.energy[path] = shares if before is None else before + shares

        yield of_norm
    # what a linear layer reads
    role = dims[1] if len(dims) == 2 and isinstance(module, nn.Linear) else None
    if role is not None and role[0] in ("neurons", "heads"):

        def of_input(_module: nn.Module, args: Any, kwargs: Any, _output: Tensor) -> None:
            states = _tokens(first_tensor(args, kwargs), counted[0])
            if role[0] == "heads":
                states = states.view(len(states), widths.heads, -1).norm(dim=2)
            activity.add(role, states.abs().sum(dim=0))

        yield of_input


def _tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """The states of tokens that are no padding, fp64 [tokens, channels]."""
    padded = mask is not None and states.shape[:2] == mask.shape
    found = states[mask.bool()] if padded and mask is not None else states.flatten(0, -2)
    return found.double()


class NormForm(NamedTuple):
    """What a norm makes of its input."""

    centres: bool
    """Whether it takes the mean off first."""
    base: int
    """What it adds to its weight."""


def norm_form(module: nn.Module, width: int) -> NormForm | None:
    """The form of a norm whose output is its weight, or one and its weight, times the input of
    length one; `None` of another module."""
    weight = next(module.parameters(recurse=False))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 4, width, generator=generator).to(weight.device, weight.dtype)
    bias = getattr(module, "bias", None)
    with torch.no_grad():
        plain, longer, moved = (module(given) for given in (states, 3 * states, states + 2))
        kept = weight.clone()
        doubled = []
        for base in (0, 1):
            weight.copy_(2 * kept + base)
            doubled.append(module(states))
        weight.copy_(kept)
    shift = torch.zeros_like(plain) if bias is None else bias.expand_as(plain)

    def near(found: Tensor, expected: Tensor) -> bool:
        return torch.allclose(found.float(), expected.float(), rtol=3e-2, atol=1e-2)

    bases = [base for base in (0, 1) if near(doubled[base] - shift, 2 * (plain - shift))]
    if not near(longer, plain) or not bases:
        return None
    return NormForm(near(moved, plain), bases[0])


def choose(
    activity: Activity, named: set[Role], sources: Sequence[int], small: Widths, large: Widths
) -> dict[Role, Tensor]:
    """Numbers of the channels that a student keeps, in order; the first of equal ones.

    Args:
        activity: of the teacher's channels, over all ranks.
        named: roles of its parameters.
        sources: layers that the student starts from.
        small: the student's numbers.
        large: the teacher's.
    """
    kept: dict[Role, Tensor] = {}
    used = {HIDDEN, *(source - 1 for source in sources)}
    for kind, block in sorted(role for role in named if role[1] in used):
        if kind == "hidden":
            kept[kind, block] = _largest(activity.channels[kind, block], small.hidden)
        elif kind == "neurons":
            kept[kind, block] = _largest(activity.channels[kind, block], small.neurons)
        elif ("heads", block) not in kept:
            heads, keys = _largest_heads(activity.channels.get(("heads", block)), small, large)
            kept["heads", block] = channels(heads, large.head_size)
            kept["keys", block] = channels(keys, large.head_size)
    return kept


def _largest(values: Tensor, count: int) -> Tensor:
    return values.argsort(descending=True, stable=True)[:count].sort().values


def _largest_heads(values: Tensor | None, small: Widths, large: Widths) -> tuple[Tensor, Tensor]:
    """Heads and key heads: the groups whose best heads are the most active, and these heads."""
    assert values is not None, "where heads are cut, what reads them was listened to"
    shared, wanted = large.heads // large.keys, small.heads // small.keys
    groups = values.view(large.keys, shared)
    best = groups.sort(dim=1, descending=True).values[:, :wanted].sum(dim=1)
    keys = _largest(best, small.keys)
    heads = [key * shared + _largest(groups[key], wanted) for key in keys.tolist()]
    return torch.cat(heads), keys


def norm_factors(
    activity: Activity, kept: Mapping[Role, Tensor], small: Widths, large: Widths
) -> dict[str, Tensor]:
    """By norm, what its weight is multiplied by: the root of what the mean square of its input
    changes by when channels are left out."""
    if ("hidden", HIDDEN) not in kept:
        return {}
    chosen = kept["hidden", HIDDEN]
    return {
        name: (shares[chosen].sum() / shares.sum() * large.hidden / small.hidden).sqrt()
        for name, shares in activity.energy.items()
    }


def _copy(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sources: Sequence[int],
    roles: Roles,
    kept: Mapping[Role, Tensor],
    factors: Mapping[str, Tensor],
    bases: Mapping[str, int],
) -> int:
    parameters = dict(teacher.named_parameters())
    first = {id(parameter): name for name, parameter in parameters.items()}
    # what is tied has several names, one of which stands for it
    known = {n: first[id(p)] for n, p in teacher.named_parameters(remove_duplicate=False)}
    prefix = blocks_path(teacher) + "."
    copied = 0
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            of = known.get(_source_of(name, sources, prefix))
            if of is None:
                continue
            given = cut(parameters[of], roles[of], kept)
            path = of.removesuffix(".weight")
            if path != of and path in factors:
                given = (given.float() + bases[path]) * float(factors[path]) - bases[path]
            parameter.copy_(given)
            copied += parameter.numel()
        _copy_buffers(student, teacher, sources, prefix)
    return copied


def _copy_buffers(
    student: PreTrainedModel, teacher: PreTrainedModel, sources: Sequence[int], prefix: str
) -> None:
    """Take over buffers that are saved: some models keep trained numbers in them.

    Raises:
        UserError: one has another shape.
    """
    saved, theirs = student.state_dict().keys(), dict(teacher.named_buffers())
    for name, buffer in student.named_buffers():
        given = theirs.get(_source_of(name, sources, prefix))
        if name not in saved or given is None:
            continue
        if given.shape != buffer.shape:
            raise UserError(
                f"student.init importance: {name} has the shape {list(buffer.shape)}, the "
                f"teacher's {list(given.shape)}, of which no channels can be chosen; set "
                "student.init to teacher"
            )
        buffer.copy_(given)


def _source_of(name: str, sources: Sequence[int], prefix: str) -> str:
    """What a number of the student is called in the teacher."""
    if not name.startswith(prefix):
        return name
    number, _, path = name.removeprefix(prefix).partition(".")
    return f"{prefix}{sources[int(number)] - 1}.{path}"


def _check_scales(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """See that both scale what they read from their tables alike.

    Raises:
        UserError: a family whose scale follows its width, as Gemma's does.
    """
    scales = []
    for model in (student, teacher):
        table = model.get_input_embeddings()
        ids = torch.arange(min(8, table.weight.shape[0]), device=table.weight.device)
        with torch.no_grad():
            given, rows = table(ids[None])[0].double(), table.weight[ids].double()
        scales.append(float(given.norm() / rows.norm()))
    if not math.isclose(*scales, rel_tol=0.02):
        raise UserError(
            f"student.init importance: {type(teacher).__name__} multiplies embeddings by "
            f"{scales[1]:.3g}, a student of this width by {scales[0]:.3g}, which its blocks were "
            "not trained with; set student.init to teacher"
        )


def _check_narrower(small: Widths, large: Widths) -> None:
    for field_name, name in (
        ("hidden_size", "hidden"),
        ("intermediate_size", "neurons"),
        ("heads", "heads"),
        ("kv_heads", "keys"),
    ):
        wanted, there = getattr(small, name), getattr(large, name)
        if wanted > there:
            raise UserError(
                f"student.init importance: student.{field_name} is {wanted}, but the teacher has "
                f"{there} to choose from; give no more"
            )
