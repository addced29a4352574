"""A teacher that reads the rows by a tokenizer of its own, compared text by text."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_rows import COLUMNS, row_recipe
from tiny_tasks import word_tokenizer
from torch.nn.functional import cosine_similarity

from fastkd.capture import try_model
from fastkd.data.batching import BatchPlan
from fastkd.data.factory import make_datamodule
from fastkd.data.rows.read import read_rows
from fastkd.data.text.files import JsonLines
from fastkd.data.text.split import is_held_out
from fastkd.distributed import Ranks
from fastkd.layer_map import make_layer_map
from fastkd.losses.factory import make_objective
from fastkd.losses.objective import DistilledStudent
from fastkd.recipe import load_recipe
from fastkd.row_form import RowForm
from fastkd.training.teacher import TeacherRunner
from fastkd.types import ROWS


def test_a_teacher_reads_its_own_tokens_of_the_same_texts(tmp_path: Path) -> None:
    recipe = load_recipe(row_recipe(tmp_path, losses={"embedding_output": {}}))
    # a word is a letter and its digits: more tokens, other numbers
    pieces = word_tokenizer(("w", *(f"##{digit}" for digit in range(10))))
    tokenizers = tiny_tokenizer(), pieces
    student, teacher = tiny_model("bert", 1), tiny_model("bert", 2)
    data = make_datamodule(
        recipe,
        tokenizers[0],
        student.config,
        Ranks(0, 1, torch.device("cpu")),
        teacher_tokenizer=pieces,
        teacher_config=teacher.config,
        progress=False,
    )
    (inputs,) = data.micro_batches(8, 0, BatchPlan(8, 1, 1), 0).next_step(0)
    assert inputs["input_ids"].shape[1] <= inputs["teacher.input_ids"].shape[1] == 16

    traits = try_model(student, 16), try_model(teacher, 16)
    layers = make_layer_map("uniform", 4, 4)
    objective = make_objective(recipe.losses, layers, student, teacher, traits, row=COLUMNS)
    states = TeacherRunner(teacher, objective)(inputs)
    shares = torch.ones(len(objective.divisors(inputs)))
    total, _ = DistilledStudent(student, objective).eval()(inputs, states, shares)

    source = JsonLines(tmp_path / "rows.jsonl", "query")
    rows = [row.texts for row in read_rows([source], RowForm(columns=COLUMNS))]
    texts = [text for row in rows if not is_held_out(row[0], 0.3) for text in row]
    losses = []
    with torch.no_grad():
        for number in inputs[ROWS].tolist():
            pooled = []
            for model, tokenizer in zip((student, teacher), tokenizers, strict=True):
                ids = tokenizer(texts[number], truncation=True, max_length=16)["input_ids"]
                pooled.append(model(torch.tensor([ids])).last_hidden_state.mean(dim=1))
            losses.append(1 - cosine_similarity(*pooled).item())
    assert abs(total.item() - sum(losses) / len(losses)) < 1e-5
