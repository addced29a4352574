"""Several weighted teacher layers of one student layer, against the definition."""

from typing import Any

import pytest
import torch
from conditioning import Change, Define, check_rounding
from fastkd_kernels import AttentionState, attention_score_mse, reference
from fastkd_kernels.attention_score_mse.weighted_teacher import weighted_teachers
from kernel_cases import (
    attention_states,
    cast,
    errors,
    leaves_of,
    loss_and_gradients,
    masks,
    peak_bytes,
    trained,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY_ALGORITHM = pytest.mark.parametrize(
    ("algorithm", "causal"), [("tiles", False), ("tiles", True), ("gram", False), ("gram", True)]
)
# of three pairs: one layer by itself, two, three
WEIGHTS: list[Any] = [
    None,
    [None, None, None],
    [[0.5], [2.0, -0.25], [0.2, 0.0, 0.8]],
    [None, [0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]],
]


def cases(
    tokens: int, dims: tuple[int, ...] = (6, 6, 4, 9), **options: Any
) -> tuple[list[AttentionState], list[Any]]:
    """Three students with one teacher layer, a list of two and a tuple of three."""
    student = attention_states(3, 2, 4, tokens, (dims[0],) * 2, kv_heads=(2, 4), **options)[0]
    layers = [
        attention_states(1, 2, 4, tokens, (1, dim), seed=seed, **options)[1][0]
        for seed, dim in enumerate((dims[1], dims[1], dims[2], dims[1], dims[2], dims[3]), start=5)
    ]
    return student, [layers[0], layers[1:3], tuple(layers[3:])]


def defined(student: Any, teacher: list[Any], **options: Any) -> Define:
    """The definition on what all tensors of both sides become by a change."""

    def moved(state: AttentionState, change: Change) -> AttentionState:
        return state._replace(query=change(state.query), key=change(state.key))

    def define(change: Change) -> list[torch.Tensor]:
        own = trained([moved(state, change) for state in student])
        target = [
            moved(entry, change)
            if isinstance(entry, AttentionState)
            else [moved(state, change) for state in entry]
            for entry in teacher
        ]
        arguments = (leaves_of(own), own, target)
        return loss_and_gradients(reference.attention_score_mse, *arguments, **options)

    return define


@EVERY_ALGORITHM
@pytest.mark.parametrize("weights", WEIGHTS)
def test_equals_its_definition_in_fp64(weights: Any, algorithm: str, causal: bool) -> None:
    student, teacher = cases(70 if causal else 20)
    valid = masks(2, 70 if causal else 20)
    options: dict[str, Any] = {"causal": causal, "key_mask": valid, "query_mask": valid}
    options["teacher_weights"] = weights
    arguments = (leaves_of(student), student, teacher)
    given = loss_and_gradients(attention_score_mse, *arguments, algorithm=algorithm, **options)
    expected = loss_and_gradients(reference.attention_score_mse, *arguments, **options)
    assert max(errors(given, expected)) < 1e-12


@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
def test_triton_equals_its_definition(algorithm: str) -> None:
    """Wider side by side than any head that the tiles hold whole."""
    student, teacher = cases(18, (6, 6, 4, 280), dtype=torch.float32, device=DEVICE)
    options: dict[str, Any] = {"teacher_weights": WEIGHTS[2]}
    given = loss_and_gradients(
        attention_score_mse,
        leaves_of(student),
        student,
        teacher,
        algorithm=algorithm,
        backend="triton",
        **options,
    )
    check_rounding(defined(student, teacher, **options), given)


def test_one_weighted_layer_is_a_layer_with_another_scale() -> None:
    student, teacher = attention_states(1, 2, 4, 20, (6, 6))
    given = attention_score_mse(student, [teacher], teacher_weights=[[0.3]])
    scaled = [teacher[0]._replace(scale=0.3 * teacher[0].scale)]
    assert torch.equal(given, attention_score_mse(student, scaled))


@pytest.mark.parametrize("algorithm", ["tiles", "gram"])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 0.2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_plain_pytorch(
    dtype: torch.dtype, weights: list[float], distance: float, algorithm: str
) -> None:
    """A student near the weighted sum, as wide: at most twice the error of plain PyTorch, or what
    rounding does to the definition."""
    teacher = cast(attention_states(2, 2, 2, 96, (8, 8))[1], dtype)
    joined = weighted_teachers(teacher[:1], [teacher], [weights])[0]
    noise = torch.Generator().manual_seed(4)
    student = [
        AttentionState(
            *(
                (value + distance * torch.randn(value.shape, generator=noise)).to(dtype)
                for value in (joined.query.float(), joined.key.float())
            ),
            None,
            joined.scale,
        )
    ]
    student = trained(student)
    options: dict[str, Any] = {"teacher_weights": [weights]}
    arguments = (leaves_of(student), student, [teacher])
    plain = loss_and_gradients(reference.attention_score_mse, *arguments, gain=2**10, **options)
    given = loss_and_gradients(
        attention_score_mse, *arguments, algorithm=algorithm, gain=2**10, **options
    )
    check_rounding(defined(student, [teacher], gain=2**10, **options), given, plain=plain)


def test_no_weight_is_rounded_into_a_half() -> None:
    teacher = cast(attention_states(3, 1, 2, 8, (4, 4))[1], torch.bfloat16)
    even = weighted_teachers(teacher[:1], [teacher], None)[0]
    assert even.query.dtype == torch.bfloat16
    assert torch.equal(even.query, torch.cat([state.query for state in teacher], -1))
    signs = weighted_teachers(teacher[:1], [teacher], [[1, -1, 0]])[0]
    assert signs.query.dtype == torch.bfloat16
    assert torch.equal(signs.query, torch.cat([teacher[0].query, -teacher[1].query], -1))
    uneven = weighted_teachers(teacher[:1], [teacher], [[0.3, 0.5, 0.2]])[0]
    assert uneven.query.dtype == uneven.key.dtype == torch.float32


def test_memory_is_linear_in_the_tokens() -> None:
    def peak(tokens: int) -> int:
        student, teacher = attention_states(4, 1, 2, tokens, (16, 16), dtype=torch.float32)
        own = student[:1]
        return peak_bytes(lambda: attention_score_mse(own, [teacher]).sum().backward())

    assert peak(2048) < 2.3 * peak(1024)


@pytest.mark.parametrize("weights", WEIGHTS[1:3])
def test_compiles_as_one_graph(weights: Any) -> None:
    student, teacher = cases(10, dtype=torch.float32)

    def step(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = [state._replace(query=query, key=key) for state in student]
        return attention_score_mse(own, teacher, teacher_weights=weights).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        loss = function(*student[0][:2])
        results.append([loss.detach(), *torch.autograd.grad(loss, student[0][:2])])
    # the same ops on the same values
    assert all(map(torch.equal, *results))
