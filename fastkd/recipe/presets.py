"""Published methods in one word: `preset: tinybert` fills in what the recipe does not give.

A preset is a function that returns sections of a recipe as its file would have them. What the
user's file says wins, key by key; a term that is `null` there stays off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from fastkd.errors import UserError
from fastkd.head_spec import TASK_HEAD, head_of_task
from fastkd.recipe.merge import Tree, laid_over
from fastkd.section import short

Preset = Literal[
    "tinybert",
    "distilbert",
    "pkd-skip",
    "pkd-last",
    "minilm",
    "minilmv2",
    "mobilebert",
    "bert-emd",
    "alp-kd",
    "rail-kd",
]


# replaced whole: their keys depend on their kind
_WHOLE = ("layer_map", "balance", "schedule")


def tinybert() -> Tree:
    """TinyBERT, general distillation (arXiv 1909.10351, eq. 7, 8, 9 and 11 without the prediction
    layer): the sum over mapped layers of the mean squared errors of attention scores, projected
    hidden states and projected embeddings, averaged over all tokens as the official code does."""
    return {
        "layer_map": "uniform",
        "losses": {
            "attention": {"kind": "score_mse", "weight": 1.0},
            "hidden": {"kind": "mse", "weight": 1.0},
            "embedding": {"kind": "mse", "weight": 1.0},
            "reduction": "tinybert",
            "projection": "shared",
        },
    }


def distilbert() -> Tree:
    """DistilBERT (arXiv 1910.01108, section 2): L_ce of the soft targets at temperature 2, L_mlm
    of the masked tokens and L_cos of the last hidden states, added up with the weights 5, 2 and 1
    of the official training; L_ce is their KL divergence times the temperature squared."""
    return {
        "student": {"head": "masked_lm"},
        "layer_map": "final",
        "losses": {
            "logits": {
                "kind": "kl",
                "temperature": 2.0,
                "scale_by_temperature": True,
                "weight": 5.0,
            },
            "mlm": {"weight": 2.0},
            "hidden": {"kind": "cosine", "weight": 1.0},
        },
    }


def pkd_skip() -> Tree:
    """Patient knowledge distillation, every k-th layer (arXiv 1908.09355, section 3.2):
    (1 - a) L_CE + a L_DS + b L_PT with a = 0.5, b = 100 and temperature 10, of the values searched
    there; L_PT compares first tokens, each scaled to length one, of all but the last layer. Sizes
    are those of the official code: L_DS is a KL divergence times the temperature squared and L_PT a
    mean over layers and dimensions. L_DS is one over classes too, which is here that of two."""
    return {
        "student": {"head": "sequence_classification"},
        "layer_map": "skip",
        "losses": {
            "labels": {"weight": 0.5},
            "logits": {
                "kind": "kl",
                "temperature": 10.0,
                "scale_by_temperature": True,
                "weight": 0.25,
            },
            "hidden": {
                "kind": "normalized_mse",
                "average": True,
                "tokens": "cls",
                "weight": 100.0,
            },
        },
    }


def pkd_last() -> Tree:
    """Patient knowledge distillation, last layers (arXiv 1908.09355, section 3.2): as
    `pkd-skip`, from the teacher's layers right below its last one."""
    return {**pkd_skip(), "layer_map": "below_last"}


def minilm() -> Tree:
    """MiniLM (arXiv 2002.10957, section 3): L_AT + L_VR, the KL divergences of the last layer's
    attention probabilities and value relations, means over heads and positions."""
    return {
        "layer_map": "final",
        "losses": {
            "attention": {"kind": "kl", "weight": 1.0},
            "relations": {"relations": ["vv"], "kind": "kl", "weight": 1.0},
        },
    }


def minilmv2() -> Tree:
    """MiniLMv2 (arXiv 2012.15828, section 3): KL divergences of the last layer's query, key and
    value relations with 48 relation heads and weights of one. For a large teacher the paper takes
    a layer further down: `layer_map: [0, 0, 0, 0, 0, 21]`."""
    return {
        "layer_map": "final",
        "losses": {
            "relations": {
                "relations": ["qq", "kk", "vv"],
                "relation_heads": 48,
                "kind": "kl",
                "weight": 1.0,
            },
        },
    }


def mobilebert() -> Tree:
    """MobileBERT, auxiliary knowledge transfer (arXiv 2004.02984, eq. 1 to 3): feature maps (mean
    squared error) and attention (KL divergence) of all layers together with the pre-training
    distillation a L_MLM + (1 - a) L_KD, a = 0.5; without L_NSP, for text without sentence pairs.
    The official code learns layer after layer instead: feature maps after a normalisation, with a
    weight of 100, beside their means and variances, then the predictions alone."""
    return {
        "student": {"head": "masked_lm"},
        "layer_map": "uniform",
        "losses": {
            "hidden": {"kind": "mse", "weight": 1.0},
            "attention": {"kind": "kl", "weight": 1.0},
            "logits": {"kind": "kl", "weight": 0.5},
            "mlm": {"weight": 0.5},
        },
    }


def bert_emd() -> Tree:
    """BERT-EMD (arXiv 2010.06133, section 3): earth mover's distances between all layers of
    attention scores and of hidden states, weights of layers moved by cost attention, embeddings,
    and the soft cross-entropy of the predictions. The official code weights what is inside by 0.01
    on most tasks of GLUE, and averages the cross-entropy over classes: of two that is 0.02 here."""
    return {
        "student": {"head": "sequence_classification"},
        "layer_map": {"kind": "emd", "layer_weights": "cost"},
        "losses": {
            "attention": {"kind": "score_mse", "weight": 0.02},
            "hidden": {"kind": "mse", "weight": 0.02},
            "embedding": {"kind": "mse", "weight": 0.02},
            "logits": {"kind": "cross_entropy", "weight": 1.0},
            "reduction": "tinybert",
            "projection": "shared",
        },
    }


def alp_kd() -> Tree:
    """ALP-KD (arXiv 2012.14022): first tokens learn from a softmax mixture of all
    teacher layers, beside soft targets and labels. The mixture is detached here: it does not
    follow the student within a step."""
    return {
        "student": {"head": "sequence_classification"},
        "layer_map": {"kind": "attention", "temperature": 1.0},
        "losses": {
            "hidden": {"kind": "mse", "tokens": "cls", "weight": 1.0},
            "logits": {"kind": "cross_entropy", "weight": 1.0},
            "labels": {"weight": 1.0},
        },
    }


def rail_kd() -> Tree:
    """RAIL-KD, layer by layer (arXiv 2109.10164): means over tokens of randomly drawn
    layers, scaled to length one, beside soft targets and labels, a third each. Only the student is
    projected here; the paper projects both into a common space."""
    return {
        "student": {"head": "sequence_classification"},
        "layer_map": {"kind": "random", "redraw": "epoch"},
        "losses": {
            "hidden": {"kind": "normalized_mse", "tokens": "mean", "weight": 1 / 3},
            "logits": {"kind": "kl", "weight": 1 / 3},
            "labels": {"weight": 1 / 3},
        },
    }


PRESETS: dict[str, Callable[[], Tree]] = {
    "tinybert": tinybert,
    "distilbert": distilbert,
    "pkd-skip": pkd_skip,
    "pkd-last": pkd_last,
    "minilm": minilm,
    "minilmv2": minilmv2,
    "mobilebert": mobilebert,
    "bert-emd": bert_emd,
    "alp-kd": alp_kd,
    "rail-kd": rail_kd,
}


def expand(tree: Mapping[str, Any]) -> Tree:
    """A recipe's tree with its preset written out; expanding twice changes nothing.

    Raises:
        UserError: no preset has that name.
    """
    name = tree.get("preset")
    if name is None:
        return dict(tree)
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(
            f"preset: expected one of {', '.join(get_args(Preset))} (given {short(name)})"
        )
    # a section without a word leaves the preset's as it is
    given = {k: v for k, v in tree.items() if v is not None or k not in ("losses", "student")}
    preset, task = PRESETS[name](), tree.get("task")
    if preset.get("student", {}).get("head") == TASK_HEAD:
        preset["student"] = {**preset["student"], "head": head_of_task(task)}
    return laid_over(preset, given, _WHOLE)
