"""Models that are no single stack of text are named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, WIDTH, save_teacher, tiny_tokenizer, write_text
from tiny_training import fastkd
from transformers import (
    AutoModel,
    CLIPConfig,
    LlavaConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)

SMALL = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SMALL, "image_size": 8, "patch_size": 4}
TEXT = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
CONFIGS = {
    "clip": lambda: CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8),
    "llava": lambda: LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
    ),
    "vit": lambda: ViTConfig(**VISION),
    "t5": lambda: T5Config(vocab_size=VOCABULARY, d_model=WIDTH, num_layers=2, num_heads=4),
}


def save(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("as_teacher", [True, False], ids=["teacher", "student"])
@pytest.mark.parametrize("name", CONFIGS)
def test_inspect_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    as_teacher: bool,
) -> None:
    whole = save_teacher(tmp_path / "bert")
    other = save(tmp_path / name, CONFIGS[name]())
    text = write_text(tmp_path / "text.txt")
    models = map(str, (other, whole) if as_teacher else (whole, other))
    options = ["--data", str(text), "--block-size", "16", "--blocks", "2"]
    assert fastkd("inspect", *models, *options, monkeypatch=monkeypatch) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastkd: ")]
    assert len(said) == 1
    if name != "t5":
        assert "its layers can't be compared; give a text model with a single stack" in said[0]
