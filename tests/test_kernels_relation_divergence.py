"""relation_divergence against its definition and against attention_divergence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastkd_kernels import AttentionState, attention_divergence, reference, relation_divergence
from kernel_cases import errors, loss_and_gradients, masks
from torch import Tensor

RELATIONS = ("qq", "kk", "vv", "qk")
FIELDS = {"q": "query", "k": "key", "v": "value"}


def states(
    heads: int, kv_heads: int, dim: int, *, tokens: int = 30, seed: int = 0, trained: bool = False
) -> list[AttentionState]:
    """Two layers with values, laid out as models hand them over."""
    generator = torch.Generator().manual_seed(seed)

    def made(count: int) -> Tensor:
        value = torch.randn(2, tokens, count, dim, generator=generator, dtype=torch.float64)
        return value.transpose(1, 2).requires_grad_(trained)

    return [
        AttentionState(made(heads), made(kv_heads), made(kv_heads), dim**-0.5) for _ in range(2)
    ]


def leaves(student: list[AttentionState], relation: str) -> list[Tensor]:
    fields = [FIELDS[letter] for letter in dict.fromkeys(relation)]
    return [getattr(state, field) for state in student for field in fields]


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("relation_heads", [1, 3, 12])
def test_equals_its_definition(relation: Any, relation_heads: int) -> None:
    """Other head counts, sizes and key heads on both sides."""
    student, teacher = states(4, 2, 6, trained=True), states(6, 3, 8, seed=1)
    valid = masks(2, 30)
    options: dict[str, Any] = {"relation": relation, "relation_heads": relation_heads}
    options |= {"key_mask": valid, "query_mask": valid, "temperature": 2.0}
    arguments = (leaves(student, relation), student, teacher)
    for kind, causal, window in (("kl", False, None), ("js", True, None), ("mse", False, 4)):
        options |= {"kind": kind, "causal": causal, "window": window}
        given = loss_and_gradients(relation_divergence, *arguments, **options)
        expected = loss_and_gradients(reference.relation_divergence, *arguments, **options)
        assert max(errors(given, expected)) < 1e-12


def test_as_many_heads_as_the_model_has_is_its_attention() -> None:
    student, teacher = states(4, 2, 6, trained=True), states(4, 4, 8, seed=1)
    given = relation_divergence(student, teacher, relation="qk", relation_heads=4)
    torch.testing.assert_close(given, attention_divergence(student, teacher))


def test_value_relation_by_hand() -> None:
    """MiniLM's: softmax of V V^T over the root of the head size, KL, mean over heads and rows."""
    student, teacher = states(2, 2, 6), states(2, 2, 8, seed=1)
    logs = [
        (side[0].value @ side[0].value.mT / side[0].value.shape[-1] ** 0.5).log_softmax(-1)
        for side in (student, teacher)
    ]
    expected = torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True) / (2 * 2 * 30)
    given = relation_divergence(student, teacher, relation_heads=2)
    torch.testing.assert_close(given[0], expected)


@pytest.mark.parametrize("relation", RELATIONS)
def test_gradcheck(relation: Any) -> None:
    """A tensor that stands on both sides of its relation gets both gradients."""
    student, teacher = states(2, 1, 4, tokens=4, trained=True), states(4, 2, 3, tokens=4, seed=1)

    def loss(*tensors: Tensor) -> Tensor:
        fields = [FIELDS[letter] for letter in dict.fromkeys(relation)]
        given = dict(zip(fields, tensors, strict=True))
        own = [student[0]._replace(**given)]
        return relation_divergence(own, teacher[:1], relation=relation, relation_heads=2)

    assert torch.autograd.gradcheck(loss, leaves(student[:1], relation))


def test_layouts_of_models_are_cut_without_a_copy() -> None:
    from fastkd_kernels.attention_divergence.relation import _cut
    from fastkd_kernels.common.attention_columns import columns_of

    given = states(4, 2, 6)
    for relation in ("qq", "vv"):
        made = _cut(columns_of(given, given), relation, 3)
        source = getattr(given[0], FIELDS[relation[0]])
        assert made.query[0].data_ptr() == source.data_ptr()
        assert made.query[0].shape == (2, 3, 30, source.shape[1] * 6 // 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 runs in the interpreter")
def test_triton_gives_the_same() -> None:
    student, teacher = states(2, 1, 4, tokens=5, trained=True), states(4, 2, 3, tokens=5, seed=1)
    results = [
        loss_and_gradients(
            relation_divergence,
            leaves(student, "vv"),
            student,
            teacher,
            relation_heads=2,
            backend=backend,
        )
        for backend in ("torch", "triton")
    ]
    assert max(errors(results[1], results[0])) < 1e-12


def call(side: int, changes: dict[str, Any], **options: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        sides = states(4, 2, 6), states(6, 3, 8, seed=1)
        sides[side][0] = sides[side][0]._replace(**changes)
        return relation_divergence(*sides, **{"relation_heads": 4, **options})

    return run


ERRORS: list[tuple[Callable[[], Any], Any, str]] = [
    (call(0, {}, relation_heads=5), ValueError, r"student\[0\].value is 12 wide \(2 heads of 6\)"),
    (call(0, {}, relation_heads=9, relation="qq"), ValueError, "relation_heads=9 does not divide"),
    (call(0, {}, relation_heads=0), ValueError, "relation_heads is 0; expected 1 or more"),
    (call(0, {}, relation_heads=2.0), TypeError, "relation_heads must be an int, got float"),
    (call(0, {}, relation="vq"), ValueError, "relation='vq' is not known; choose one of qq, kk"),
    (call(1, {"value": None}), ValueError, r"teacher\[0\].value is None and .* capture the values"),
    (call(0, {"key": torch.ones(2, 3, 30, 6)}, relation="qk"), ValueError, "4 query heads and 3"),
    (call(0, {"value": torch.ones(2, 30)}), ValueError, r"student\[0\].value must be \[batch"),
    (
        call(1, {"value": torch.ones(2, 3, 30, 8, requires_grad=True)}),
        ValueError,
        r"teacher\[0\].value requires grad",
    ),
    (call(1, {"value": torch.ones(2, 3, 29, 8)}), ValueError, r"batch and tokens \(2, 29\)"),
    (lambda: relation_divergence([(1,)], [(1,)], relation_heads=1), TypeError, "got tuple"),
    (lambda: relation_divergence([], [], relation_heads=1), ValueError, "at least one layer pair"),
]


@pytest.mark.parametrize(("run", "kind", "message"), ERRORS)
def test_errors(run: Callable[[], Any], kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        run()
