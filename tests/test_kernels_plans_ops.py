"""Plans of hidden states, logits, indexers and relations: what tells calls apart, and what not.

Each call is compared with the same call where nothing was planned before.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from fastkd_kernels import (
    AttentionState,
    IndexerState,
    LogitsHead,
    hidden_cosine,
    hidden_mse,
    hidden_normalized_mse,
    indexer_divergence,
    logits_divergence,
    relation_divergence,
)
from fastkd_kernels.common import plan
from indexer_cases import indexer_case
from kernel_cases import attention_states, hidden_case
from logits_cases import logits_case
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ["triton"] if CUDA else ["torch", "triton"]
BATCH, TOKENS = 2, 5
FP32 = torch.float32


class Call(NamedTuple):
    """An op and its arguments; `masks` are the names of its masks."""

    op: Callable[..., Any]
    arguments: dict[str, Any]
    masks: tuple[str, ...] = ("mask",)

    def of(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """Other tensors, which require grad as those did."""

        def changed(tensor: Tensor) -> Tensor:
            made = change(tensor.detach())
            return made.requires_grad_(tensor.requires_grad)

        return self._replace(arguments=mapped(self.arguments, changed))

    def given(self, **more: Any) -> "Call":
        return self._replace(arguments={**self.arguments, **more})

    def run(self, backend: str = BACKENDS[0]) -> list[Tensor]:
        """Losses and the gradients of all that requires one."""
        made = self.op(**self.arguments, backend=backend)
        losses = made if isinstance(made, tuple) else (made,)
        total = sum(loss.sum() for loss in losses)
        leaves = [tensor for tensor in tensors(self.arguments) if tensor.requires_grad]
        found = torch.autograd.grad(total, leaves, allow_unused=True) if leaves else ()
        return [*(loss.detach() for loss in losses), *(one for one in found if one is not None)]

    def unplanned(self, backend: str = BACKENDS[0]) -> list[Tensor]:
        """As `run`, where nothing is planned yet; plans that there are stay."""
        with no_plans():
            return self.run(backend)


@contextmanager
def no_plans() -> Iterator[None]:
    before, plan._plans = plan._plans, type(plan._plans)()
    yield
    plan._plans = before


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: mapped(one, change) for name, one in value.items()}
    if isinstance(value, (AttentionState, IndexerState, LogitsHead)):
        return type(value)(*(mapped(one, change) for one in value))
    return [mapped(one, change) for one in value] if isinstance(value, list) else value


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def hidden(op: Callable[..., Any], weights: str = "shared+bias") -> Call:
    widths = (4, 4) if weights == "none" else (3, 4)
    case = hidden_case(2, BATCH, TOKENS, widths, weights, FP32).on(DEVICE)
    return Call(op, {"student": case.student, "teacher": case.teacher, **case.trained})


def logits(lead: tuple[int, ...] = (BATCH, TOKENS), **more: Any) -> Call:
    case = logits_case(lead, ("head", "head"), masked=False, dtype=FP32, **more).on(DEVICE)
    sides = {"student": case.student, "teacher": case.teacher}
    return Call(logits_divergence, {**sides, **case.options})


def indexers() -> Call:
    case = indexer_case(2, BATCH, TOKENS, (4, 4), sinks=True, dtype=FP32, device=DEVICE)
    sides = {"student": case.student, "teacher": case.teacher}
    return Call(indexer_divergence, sides, ("key_mask", "query_mask"))


def relations() -> Call:
    student, teacher = attention_states(2, BATCH, 2, TOKENS, (4, 4), dtype=FP32, device=DEVICE)
    options = {"relation": "qk", "relation_heads": 4}
    sides = {"student": student, "teacher": teacher}
    return Call(relation_divergence, {**sides, **options}, ("key_mask", "query_mask"))


CALLS: dict[str, Callable[[], Call]] = {
    "hidden_mse": lambda: hidden(hidden_mse),
    "hidden_cosine": lambda: hidden(hidden_cosine, "each+bias"),
    "hidden_normalized_mse": lambda: hidden(hidden_normalized_mse, "none"),
    "logits": logits,
    "labelled": lambda: logits(labelled=True),
    "indexer": indexers,
    "relation": relations,
}


def plans_made(call: Callable[[], object]) -> int:
    before = len(plan._plans)
    call()
    return len(plan._plans) - before


def a_mask(*lengths: int) -> Tensor:
    made = torch.arange(TOKENS)[None] < torch.tensor(lengths)[:, None]
    return made.to(DEVICE)


def same(given: list[Tensor], expected: list[Tensor]) -> bool:
    return len(given) == len(expected) and all(map(torch.equal, given, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_new_tensors_and_masks_that_look_the_same_take_the_plan(name: str, backend: str) -> None:
    if backend == "triton" and not CUDA and name == "relation":
        pytest.skip("slow in the interpreter, and the attention op's there")
    call = CALLS[name]()
    call = call.given(**dict.fromkeys(call.masks, a_mask(5, 5)))
    first = call.run(backend)
    others = call.of(lambda tensor: tensor.abs() + 0.1 * tensor)
    short = others.given(**dict.fromkeys(call.masks, a_mask(5, 3)))
    made: list[list[Tensor]] = []
    assert plans_made(lambda: made.extend([others.run(backend), short.run(backend)])) == 0
    assert same(made[0], others.unplanned(backend)) and same(made[1], short.unplanned(backend))
    assert not torch.equal(made[0][0], first[0]) and not torch.equal(made[1][0], made[0][0])


def shifted(tensor: Tensor) -> Tensor:
    """Rows that start 4 bytes behind an address that 16 divides."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def apart(tensor: Tensor) -> Tensor:
    """Neighbours of a row do not lie next to each other, so that kernels read a copy."""
    return tensor if tensor.ndim < 2 else tensor.mT.contiguous().mT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [shifted, apart, Tensor.half])
@pytest.mark.parametrize("name", CALLS)
def test_other_looks_take_another_plan(name: str, change: Any, backend: str) -> None:
    """Alignment, strides, dtypes: the same values as without any plan before."""
    if backend == "triton" and not CUDA and (name == "relation" or change is Tensor.half):
        pytest.skip("slow in the interpreter, and the attention op's there")
    call = CALLS[name]()
    call.run(backend)
    others, made = call.of(change), []
    assert plans_made(lambda: made.append(others.run(backend))) > 0
    assert same(made[0], others.unplanned(backend))


@pytest.mark.parametrize("backend", BACKENDS[:1])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_trained_tells_plans_apart(name: str, backend: str) -> None:
    call = CALLS[name]()
    everything = call.run(backend)
    leaves = [tensor for tensor in tensors(call.arguments) if tensor.requires_grad]
    for leaf in {id(leaf): leaf for leaf in (leaves[0], leaves[-1])}.values():
        leaf.requires_grad_(False)
        made: list[list[Tensor]] = []
        assert plans_made(lambda made=made: made.append(call.run(backend))) > 0
        assert same(made[0], call.unplanned(backend))
        leaf.requires_grad_(True)
    with torch.no_grad():
        made_without = call.op(**call.arguments, backend=backend)
    assert not (made_without[0] if isinstance(made_without, tuple) else made_without).requires_grad
    assert plans_made(lambda: call.run(backend)) == 0
    assert same(call.run(backend), everything)


def variants() -> dict[str, list[Call]]:
    """Calls whose tensors look alike where both have them, and yet are others."""
    shared, each = hidden(hidden_mse), hidden(hidden_mse, "each+bias")
    mask = a_mask(5, 3)
    weight, plain = each.arguments["weight"], logits()
    heads, relation, indexer = logits(labelled=True), relations(), indexers()
    flat = logits((BATCH * TOKENS,))
    state = relation.arguments["student"][0]
    return {
        "hidden": [
            shared,
            shared.given(bias=None),
            shared.given(mask=mask),
            shared.given(tokens="cls"),
            shared.given(mask=mask, reduction="tinybert"),
            each,
            each.given(weight=weight[0]),
            each.given(bias=None),
            shared._replace(op=hidden_cosine),
            shared._replace(op=hidden_normalized_mse),
            shared.given(
                student=shared.arguments["student"][:1], teacher=shared.arguments["teacher"][:1]
            ),
        ],
        "logits": [
            plain,
            plain.given(mask=mask),
            heads,
            flat,
            plain.given(kind="js", beta=0.5),
            plain.given(kind="js", beta=0.3),
            plain.given(kind="skew_kl", skew=0.3),
            plain.given(temperature=2.0),
            plain.given(temperature=2.0, scale_by_temperature=True),
            plain.given(student=plain.arguments["student"]._replace(bias=None)),
            plain.given(
                student=plain.arguments["student"].hidden,
                teacher=flat.arguments["teacher"].hidden.view(BATCH, TOKENS, -1),
            ),
        ],
        "indexer": [
            indexer,
            indexer.given(key_mask=mask),
            indexer.given(query_mask=mask),
            indexer.given(causal=False),
            indexer.given(
                teacher=[one._replace(scale=2.0) for one in indexer.arguments["teacher"]]
            ),
            indexer.given(
                teacher=[one._replace(softcap=2.0) for one in indexer.arguments["teacher"]]
            ),
            indexer.given(
                teacher=[one._replace(sinks=None) for one in indexer.arguments["teacher"]]
            ),
            indexer.given(
                student=[one._replace(key=one.key[:, None]) for one in indexer.arguments["student"]]
            ),
        ],
        "relation": [
            relation,
            relation.given(relation_heads=2),
            relation.given(relation="qq"),
            relation.given(relation="kk"),
            relation.given(kind="mse"),
            relation.given(temperature=2.0),
            relation.given(causal=True),
            relation.given(window=2),
            relation.given(key_mask=mask),
            relation.given(student=[state], teacher=relation.arguments["teacher"][:1]),
        ],
    }


@pytest.mark.parametrize("name", ["hidden", "logits", "indexer", "relation"])
def test_other_options_take_other_plans(name: str) -> None:
    calls = variants()[name]
    alone = [call.unplanned() for call in calls]
    for call, expected in zip(calls, alone, strict=True):
        made: list[list[Tensor]] = []
        assert plans_made(lambda call=call, made=made: made.append(call.run())) > 0
        assert same(made[0], expected)
    for call, expected in zip(calls, alone, strict=True):
        assert plans_made(lambda call=call: call.run()) == 0
        assert same(call.run(), expected)


def test_what_a_check_would_refuse_takes_no_plan() -> None:
    each = hidden(hidden_mse, "each")
    each.run()
    with pytest.raises(ValueError, match="weight has 1 tensors for 2 pairs"):
        each.given(weight=each.arguments["weight"][:1]).run()
    both = hidden(hidden_mse)
    both.given(bias=None).run()
    # as many tensors of the same looks, shared out otherwise
    one = {"student": both.arguments["student"], "weight": [both.arguments["weight"]]}
    with pytest.raises(ValueError, match="weight has 1 tensors for 2 pairs"):
        both.given(**one, bias=None).run()
    plain = logits()
    plain.run()
    with pytest.raises(ValueError, match="mse"):
        plain.given(kind="mse", temperature=2.0).run()
    relation = relations()
    relation.given(relation_heads=1).run()
    with pytest.raises(TypeError, match="relation_heads must be an int, got bool"):
        relation.given(relation_heads=True).run()
    for call in (each, plain, relation, indexers()):
        call.run()
        tensors(call.arguments["teacher"])[0].requires_grad_()
        with pytest.raises(ValueError, match="requires grad"):
            call.run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_plans_keep_no_tensor_of_a_call(name: str, backend: str) -> None:
    call = CALLS[name]()
    call = call.given(**dict.fromkeys(call.masks, a_mask(5, 3)))
    call.run(backend)
    given = [*tensors(call.arguments), *(call.arguments[mask] for mask in call.masks)]
    refs = [weakref.ref(tensor) for tensor in given]
    assert len(plan._plans) > 0
    del call, given
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
