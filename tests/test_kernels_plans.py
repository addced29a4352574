"""Plans: found for other tensors that look the same, for no others, and keeping no tensor."""

import gc
import itertools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fastkd_kernels import AttentionState, attention_divergence, attention_score_mse
from fastkd_kernels.common import plan, remembered
from kernel_cases import attention_states, leaves_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ["triton"] if CUDA else ["torch", "triton"]
OPS = [attention_score_mse, attention_divergence]
TOKENS = 7

States = tuple[list[AttentionState], list[AttentionState]]


def states(dims: tuple[int, int] = (4, 4), tokens: int = TOKENS, **more: Any) -> States:
    more = {"dtype": torch.float32, "device": DEVICE, **more}
    return attention_states(2, 2, 2, tokens, dims, **more)


def run(op: Callable[..., Tensor], given: States, **options: Any) -> list[Tensor]:
    loss = op(*given, **options)
    leaves = [tensor for tensor in leaves_of(given[0]) if tensor.requires_grad]
    return [loss.detach(), *(torch.autograd.grad(loss.sum(), leaves) if leaves else ())]


def plans_made(call: Callable[[], object]) -> int:
    before = len(plan._plans)
    call()
    return len(plan._plans) - before


def moved(given: States, change: Callable[[Tensor], Tensor]) -> States:
    """Other tensors with the same values, by `change`."""
    student, teacher = (
        [
            state._replace(
                query=change(state.query.detach()).requires_grad_(state.query.requires_grad),
                key=change(state.key.detach()).requires_grad_(state.key.requires_grad),
            )
            for state in side
        ]
        for side in given
    )
    return student, teacher


def shifted(tensor: Tensor) -> Tensor:
    """Rows that start 4 bytes behind an address that 16 divides."""
    made = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return made.copy_(tensor)


def by_token(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def apart(tensor: Tensor) -> Tensor:
    """Neighbours of a row do not lie next to each other, so that kernels read a copy."""
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_new_tensors_that_look_the_same_take_the_plan(op: Any, backend: str) -> None:
    given = states()
    masks = [torch.ones(2, TOKENS, dtype=torch.bool, device=DEVICE) for _ in range(2)]
    masks[1][1, 4:] = False

    def step(given: States, mask: Tensor) -> list[Tensor]:
        return run(op, given, key_mask=mask, query_mask=mask, backend=backend)

    first = step(given, masks[0])
    others, made = moved(given, torch.clone), []
    assert plans_made(lambda: made.append(step(others, masks[0]))) == 0
    assert all(map(torch.equal, made[0], first))
    assert plans_made(lambda: made.append(step(others, masks[1]))) == 0
    plan._plans.clear()
    assert all(map(torch.equal, made[1], step(given, masks[1])))
    assert not torch.equal(made[1][0], first[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("change", [shifted, by_token, apart, torch.clone, "frozen", "float64"])
def test_tensors_that_look_otherwise_take_another_plan(op: Any, backend: str, change: Any) -> None:
    """Alignment, strides, what is trained, dtype: the same values as without any plan."""
    given = states()
    if change == "float64":
        if CUDA:
            pytest.skip("Triton takes no fp64 on a GPU")
        others = moved(given, Tensor.double)
    elif change == "frozen":
        others = moved(given, torch.clone)
        for state in others[0]:
            state.key.requires_grad_(False)
    else:
        others = moved(given, change)
    expected = run(op, others, backend=backend)
    plan._plans.clear()
    run(op, given, backend=backend)
    made: list[list[Tensor]] = []
    new = plans_made(lambda: made.append(run(op, others, backend=backend)))
    # gradients that a forward made look alike, wherever their inputs lie
    assert new == (0 if change is torch.clone else 1) or (new == 2 and backend == "triton")
    assert len(made[0]) == len(expected) and all(map(torch.equal, made[0], expected))


@pytest.mark.parametrize("op", OPS)
def test_other_options_take_other_plans(op: Any) -> None:
    given = states()
    backend = BACKENDS[-1]
    mask = torch.ones(2, TOKENS, dtype=torch.bool, device=DEVICE)
    reduction = {attention_score_mse: "tinybert", attention_divergence: "sequences"}[op]
    options: list[dict[str, Any]] = [
        {},
        {"key_mask": mask},
        {"query_mask": mask},
        {"causal": True},
        {"reduction": reduction},
    ]
    with torch.no_grad():
        found = [op(*given, backend=backend, **one) for one in options]
        assert len(plan._plans) == len(options)
        again = [partial(op, *given, backend=backend, **one) for one in options]
        assert [*map(plans_made, again)] == [0] * len(options)
        for one, value in zip(options, found, strict=True):
            plan._plans.clear()
            assert torch.equal(op(*given, backend=backend, **one), value)
        op(*given, backend=backend)
        changes: list[dict[str, Any]] = [{"scale": 2.0}]
        if op is attention_divergence:
            changes.append({"softcap": 2.0})
        for change, side in itertools.product(changes, (0, 1)):
            other = [*given]
            other[side] = [state._replace(**change) for state in given[side]]
            value = op(*other, backend=backend)
            plan._plans.clear()
            assert torch.equal(op(*other, backend=backend), value)
            assert not torch.equal(op(*given, backend=backend), value)
    # shapes, with and without gradients
    assert plans_made(lambda: op(*given, backend=backend)) == 1
    assert plans_made(lambda: op(*states(tokens=TOKENS + 1), backend=backend)) == 1
    assert plans_made(lambda: op(*(side[:1] for side in given), backend=backend)) == 1


def test_what_a_check_would_refuse_takes_no_plan() -> None:
    given, backend = states(), BACKENDS[-1]
    frozen = moved(given, torch.clone)[0]
    for state in frozen:
        state.query.requires_grad_(False)
        state.key.requires_grad_(False)
    attention_divergence(frozen, given[1], backend=backend)
    attention_divergence(*given, window=1, backend=backend)
    with pytest.raises(TypeError, match="window"):
        attention_divergence(*given, window=True, backend=backend)
    # as many tensors of the same looks, shared out otherwise
    with pytest.raises(ValueError, match="student has 3 layers and teacher has 1"):
        attention_divergence([*frozen, *frozen][:3], given[1][:1], backend=backend)
    given[1][1].key.requires_grad_()
    with pytest.raises(ValueError, match=r"teacher\[1\].key requires grad"):
        attention_divergence(*given, window=1, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
def test_plans_keep_no_tensor_of_a_call(backend: str, algorithm: str) -> None:
    given = states()
    mask = torch.ones(2, TOKENS, dtype=torch.bool, device=DEVICE)
    options: dict[str, Any] = {"key_mask": mask, "backend": backend, "algorithm": algorithm}
    run(attention_score_mse, given, **options)
    refs = [weakref.ref(t) for side in given for state in side for t in (state.query, state.key)]
    refs.append(weakref.ref(mask))
    assert len(plan._plans) > 0
    del given, mask, options
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_calls_that_see_for_themselves_leave_no_plan() -> None:
    given = states()
    # a GPU's backward has a thread of its own, which forgets nothing
    with remembered.forgetting(), torch.autograd.set_multithreading_enabled(False):
        assert plans_made(lambda: run(attention_score_mse, given)) == 0
    with FlopCounterMode(display=False):
        assert plans_made(lambda: run(attention_score_mse, given)) == 0
    # what a plan keeps of inference mode is for inference mode alone
    with torch.inference_mode():
        inferred = attention_score_mse(*given)
    with torch.no_grad():
        assert plans_made(lambda: attention_score_mse(*given)) == 1
    first, *gradients = run(attention_score_mse, given)
    assert torch.equal(first, inferred) and len(gradients) == 4


@pytest.mark.skipif(CUDA, reason="fp64 is PyTorch's there")
@pytest.mark.parametrize("op", OPS)
def test_pairs_of_several_dtypes_give_losses_in_the_first_ones(op: Any) -> None:
    narrow = states()
    wide = moved(narrow, Tensor.double)
    for first, second in ((narrow, wide), (wide, narrow)):
        given = tuple([one[0], other[1]] for one, other in zip(first, second, strict=True))
        # the second call has the plan
        losses = [op(*given) for _ in range(2)]
        assert [loss.dtype for loss in losses] == [first[0][0].query.dtype] * 2
        assert torch.equal(*losses)
        torch.testing.assert_close(losses[0].double(), op(*wide), rtol=1e-5, atol=0)
