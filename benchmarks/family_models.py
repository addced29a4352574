"""A tiny random model of every family of transformers that has a stack of attention blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from fastkd.head_spec import HEADS as HEAD_SPECS
from fastkd.models.load import auto_model
from fastkd.types import Head

LAYERS, WIDTH, HEADS, VOCABULARY = 4, 32, 4, 96

# by the names that most configurations use, or map to their own
_NUMBERS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "sliding_window": 6,
    "local_attention": 4,
    "attention_window": 6,
    "attention_chunk_size": 8,
    "query_pre_attn_scalar": 8,
    "global_head_dim": 8,
    "rotary_dim": 4,
    "embedding_size": WIDTH,
    "true_hidden_size": WIDTH,
    "intra_bottleneck_size": WIDTH,
    "projection_dim": WIDTH,
    "out_hidden_size": WIDTH,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    # experts
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent and sparse attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "index_kpool": 2,
    # layers without attention
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "ssm_state_size": 8,
    "n_groups": 1,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "num_mem_blocks": 1,
    # images
    "image_size": 32,
    "patch_size": 8,
}
# what a default leaves open is left open, but for these
_GIVEN = frozenset(
    {
        "vocab_size",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "sliding_window",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)
_SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
}
# what some families need besides
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "esmc": {"num_key_value_heads": HEADS},
    "glm4v_text": _SECTIONS,
    "glm4v_moe_text": _SECTIONS,
    "glm_image_text": _SECTIONS,
    "glm_ocr_text": _SECTIONS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "layoutlmv3": {"input_size": 32, "visual_embed": False, "coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": WIDTH},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen2_vl_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "swin2sr": {"embed_dim": 24},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
_CLASSES: dict[Head, Any] = {
    head: getattr(modeling_auto, spec.classes) for head, spec in HEAD_SPECS.items() if spec.classes
}


def all_families() -> list[str]:
    """Every `model_type` whose base model is a stack of blocks by itself, as far as its default
    configuration says."""
    return [name for name in sorted(modeling_auto.MODEL_MAPPING_NAMES) if _is_stack(name)]


def heads_of(family: str) -> list[Head]:
    """Heads that transformers has for a family."""
    return [head for head, known in _CLASSES.items() if family in known]


def family_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration of a family, its own names for the usual numbers.

    Raises:
        Exception: whatever transformers says of numbers that don't go together.
    """
    kind = CONFIG_MAPPING[family]
    fields = {field.name for field in dataclasses.fields(kind)}
    default, own = kind(), _OWN.get(family, {})
    names = getattr(kind, "attribute_map", None) or {}
    numbers: dict[str, Any] = {}
    for name, value in _NUMBERS.items():
        real = names.get(name, name)
        held = _held(default, real)
        open_ = held is None and name not in _GIVEN
        if real in fields and not open_ and not isinstance(held, list | tuple):
            numbers[real] = value
    if "kv_lora_rank" in fields or _all_heads(default):
        numbers[names.get("num_key_value_heads", "num_key_value_heads")] = HEADS
    given = {**numbers, **own, **changes}
    return kind(**{n: v for n, v in given.items() if n in fields or n in own or n in changes})


def family_model(
    family: str, head: Head = "none", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model of a family, in eval mode."""
    torch.manual_seed(seed)
    config = family_config(family, **changes)
    model: PreTrainedModel = auto_model(head).from_config(config, dtype=torch.float32)
    return model.eval()


def _is_stack(family: str) -> bool:
    kind = CONFIG_MAPPING[family]
    try:
        default = kind()
    # a default that does not hold together, or wants a package
    except (AttributeError, ImportError, TypeError, ValueError):
        return False
    depth = getattr(default, "num_hidden_layers", None)
    parts = getattr(default, "sub_configs", None)
    return isinstance(depth, int) and not default.is_encoder_decoder and not parts


def _held(default: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(default, name, None)
    # of layers of several shapes transformers has no single answer
    except RuntimeError:
        return None


def _all_heads(default: PreTrainedConfig) -> bool:
    """Whether a family has as many key heads as heads unless told otherwise."""
    heads = _held(default, "num_attention_heads")
    return heads is not None and heads == _held(default, "num_key_value_heads")
