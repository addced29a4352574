"""A dozen families and more of those that `python -m benchmarks.families` takes through fastkd."""

from __future__ import annotations

import pytest

from benchmarks import families
from benchmarks.families import Row, sweep, table

STATES = {"hidden", "embedding"}
EVERY = {"attention", "relations", *STATES}
EXACT = {
    "bert": EVERY | {"logits"},
    "modernbert": EVERY | {"logits"},
    "layoutlm": EVERY | {"logits"},
    "gpt2": EVERY | {"logits"},
    "smollm3": EVERY | {"logits"},
    # soft caps, sinks, experts, windows of several kinds
    "gemma2": EVERY | {"logits"},
    "gpt_oss": EVERY | {"logits"},
    "granite_swa": EVERY | {"logits"},
    "ernie4_5_moe": EVERY | {"logits"},
    # causal without a flag
    "clip_text_model": EVERY,
    # images
    "vit": EVERY,
}
PARTLY = {
    # its mask moves with its values, as soon as the weights of that are not 0
    "doge": (EVERY | {"logits"}, "is not the softmax of its queries and keys"),
    "falcon": (STATES | {"logits"}, "does not go through transformers' attention interface"),
    "openai-gpt": (STATES | {"logits"}, "does not go through transformers' attention interface"),
    "deberta-v2": (STATES | {"logits"}, "does not go through transformers' attention interface"),
    "llama4_text": ({"attention", *STATES, "logits"}, "attend in chunks or blocks"),
    "mobilebert": (EVERY | {"logits"}, "does not run its last layer as a layer"),
    "squeezebert": ({"logits"}, "are not called as modules"),
}
REFUSED = {
    "diffllama": "self_attn.lambda_init",
    "gemma4_text": "blocks of several shapes",
    "mamba": "has no num_attention_heads",
    "vit_mae": "draws numbers",
    "albert": "found 0 stacks of 4 blocks",
    "deepseek_v4": "expected [2, 20, 32] (batch, tokens, hidden_size)",
}


def swept(family: str) -> Row:
    with pytest.MonkeyPatch.context() as changed:
        if family != "bert":
            # kinds of losses of states or of logits read the same tensors of any family
            changed.setattr(families, "_HIDDEN", ("mse",))
            changed.setattr(families, "_LOGITS", ("kl",))
        row = sweep(family)
    assert row is not None and row.broken is None, row and row.broken
    return row


def sections(row: Row) -> set[str]:
    return {loss.split()[0] for loss in row.losses}


@pytest.mark.parametrize("family", EXACT)
def test_a_family_works_exactly(family: str) -> None:
    row = swept(family)
    if any("not the softmax of its queries and keys" in said for said in row.refused):
        pytest.skip(f"this transformers lets {family} run an attention without its caps: refused")
    assert sections(row) == EXACT[family]
    # a head with logits that are capped is refused beside everything else
    assert [r for r in row.refused if not r.startswith("causal_lm: ")] == []


@pytest.mark.parametrize("family", PARTLY)
def test_a_family_works_in_part_and_the_rest_is_refused(family: str) -> None:
    row = swept(family)
    losses, reason = PARTLY[family]
    assert sections(row) == losses
    assert any(reason in refused for refused in row.refused), row.refused


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_in_one_line(family: str) -> None:
    row = swept(family)
    assert any(REFUSED[family] in refused for refused in row.refused), row.refused
    assert not any("\n" in refused for refused in row.refused)


def test_the_page_says_what_is_broken_and_what_is_refused() -> None:
    rows = [Row("a", losses=["hidden mse", "hidden cosine"]), Row("b", refused=["no | way"])]
    rows += [Row("c", broken="KL is 2, of the maps 1"), Row("d", unmade="needs a package")]
    page = table(rows, skipped=4)
    assert "Of 1 more no tiny model was made: d (needs a package)." in page
    assert "3 families" in page and "1 pass with every loss" in page and "4 more" in page
    assert "| a |  |  |  | hidden |  |" in page and "no / way" in page
    assert "**broken: KL is 2, of the maps 1**" in page
