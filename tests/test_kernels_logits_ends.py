"""The ends of the mixtures of logits_divergence: KL and reverse KL, as in GKD and DistiLLM."""

from typing import Any

import pytest
import torch
from fastkd_kernels import logits_divergence, reference
from logits_cases import FORMS, LogitsCase, largest_error, logits_case
from pydantic import ValidationError
from torch import Tensor

from fastkd.losses.logits import LogitsLoss

# options at an end, the kind that they amount to
ENDS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "js", "beta": 0.0}, "kl"),
    ({"kind": "js", "beta": 1.0}, "reverse_kl"),
    ({"kind": "skew_kl", "skew": 0.0}, "kl"),
    ({"kind": "js", "beta": 1}, "reverse_kl"),
]


def run(case: LogitsCase, device: str, **options: Any) -> list[Tensor]:
    return case.on(device).run(logits_divergence, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("forms", [FORMS[0], FORMS[1], FORMS[3]], ids="-".join)
@pytest.mark.parametrize(("options", "kind"), ENDS)
def test_an_end_is_the_divergence_that_it_amounts_to(
    options: dict[str, Any], kind: str, forms: Any, backend: Any
) -> None:
    """To the bit: losses, and gradients of hidden states, weight and bias or of logits."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    for labelled in (False, True):
        shared: dict[str, Any] = {"temperature": 2.0, "scale_by_temperature": True}
        shared |= {"labelled": labelled, "dtype": torch.float32}
        given = run(logits_case((2, 3), forms, **options, **shared), device, backend=backend)
        expected = run(logits_case((2, 3), forms, kind=kind, **shared), device, backend=backend)
        assert all(map(torch.equal, given, expected))


@pytest.mark.parametrize(("options", "kind"), ENDS)
def test_the_definition_has_the_same_ends(options: dict[str, Any], kind: str) -> None:
    given = logits_case((7,), FORMS[0], **options).run(reference.logits_divergence)
    expected = logits_case((7,), FORMS[0], kind=kind).run(reference.logits_divergence)
    assert all(map(torch.equal, given, expected))


@pytest.mark.parametrize("share", [1e-3, 1e-4])
@pytest.mark.parametrize(("options", "kind"), ENDS[:3])
def test_an_end_is_a_limit(options: dict[str, Any], kind: str, share: float) -> None:
    """Of JS over the part that goes to 0, and of skew KL as it is: off by a few times that part."""
    name = "skew" if options["kind"] == "skew_kl" else "beta"
    inside = 1.0 - share if options[name] == 1.0 else share
    part = share if name == "beta" else 1.0
    made: dict[str, Any] = {"kind": options["kind"], name: inside}
    case = logits_case((9,), FORMS[3], vocabularies=(12, 12), **made)
    found = [value / part for value in case.run(reference.logits_divergence)]
    end = logits_case((9,), FORMS[3], vocabularies=(12, 12), kind=kind)
    expected = end.run(logits_divergence)
    assert 0.0 < largest_error(found, expected) < 20 * share
    other = logits_case((9,), FORMS[3], vocabularies=(12, 12), kind="kl")
    if kind == "reverse_kl":
        assert largest_error(found, other.run(logits_divergence)) > 0.1


SHARES = [0.0, 1e-9, 9e-5, 1e-4, 0.5, 0.9999, 1 - 1e-9, 1.0]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("kind", "name"), [("js", "beta"), ("skew_kl", "skew")])
def test_recipe_and_op_take_the_same_parts(kind: Any, name: str, share: float) -> None:
    agreed(kind=kind, **{name: share})


@pytest.mark.parametrize("temperature", [1e-30, 9e-4, 1e-3, 1.0, 1e3, 1001.0, 1e30, float("inf")])
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_recipe_and_op_take_the_same_temperatures(kind: Any, temperature: float) -> None:
    agreed(kind=kind, temperature=temperature)


def agreed(**options: Any) -> None:
    """Both take these options, and give a finite number, or both refuse them."""
    logits = torch.arange(6.0).view(2, 3)
    case = LogitsCase(logits.clone().requires_grad_(), 30 * logits.flip(0), options)
    try:
        LogitsLoss.Config(**options)
    except ValidationError:
        with pytest.raises(ValueError):
            case.run(logits_divergence)
    else:
        assert all(value.isfinite().all() for value in case.run(logits_divergence))
