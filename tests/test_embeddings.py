"""What a model gives out: as sentence-transformers has it, of teachers and of exported students."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, models
from tiny_exports import save_sentences
from tiny_models import WIDTH, save_teacher, tiny_batch, tiny_model
from tiny_rows import row_recipe
from tiny_runs import assert_same_run, keys, make_recipe, run_variants
from tiny_training import summary_of
from torch import Tensor, nn
from transformers import AutoConfig

import fastkd
from fastkd.capture import capture, capture_keywords, hands_on_last_block
from fastkd.distributed import joined_ranks
from fastkd.errors import UserError
from fastkd.models import UnknownModule, read_embedding
from fastkd.recipe import load_recipe
from fastkd.training.run_folder import RunFolder
from fastkd.training.setup import Run, set_up_evaluation
from fastkd.types import ModelSource

TEXTS = ["w7 w9 w20 w30 w31", "w11", "w12 w13 w40"]
ALONE: dict[str, Any] = {"attention": None, "hidden": None, "embedding": None}


def pooling(*modes: str) -> Any:
    return models.Pooling(WIDTH, pooling_mode=modes if len(modes) > 1 else modes[0])


def dense(size: int, given: int = WIDTH, activation: Any = None) -> Any:
    made = models.Dense(given, size, activation_function=activation or nn.Identity())
    with torch.no_grad():
        made.linear.weight.normal_(std=0.2)
    return made


def norm() -> Any:
    made = models.LayerNorm(WIDTH)
    with torch.no_grad():
        made.norm.weight.normal_()
        made.norm.bias.normal_()
    return made


CHAINS = {
    "mean": lambda: [pooling("mean"), models.Normalize()],
    "cls": lambda: [pooling("cls")],
    "last": lambda: [pooling("lasttoken"), models.Dropout(0.3), models.Normalize()],
    "dense": lambda: [pooling("mean"), norm(), dense(6, activation=nn.Tanh()), models.Normalize()],
    "several": lambda: [pooling("mean", "cls", "max"), dense(8, 3 * WIDTH), dense(5, 8, nn.GELU())],
    "rest": lambda: [pooling("weightedmean", "mean_sqrt_len_tokens", "lasttoken")],
}


def encoded(model: Any, texts: list[str], side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """What a SentenceTransformer reads of texts in one batch, and what it gives."""
    model.tokenizer.padding_side = side
    features = model.tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
    return inputs, model.encode(texts, convert_to_tensor=True)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("chain", CHAINS)
def test_embeddings_are_those_of_sentence_transformers(
    chain: str, side: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    name = "bert" if side == "right" else "qwen3"
    folder = save_sentences(tmp_path, *CHAINS[chain](), architecture=name)
    model = SentenceTransformer(str(folder), device="cpu")
    inputs, expected = encoded(model, TEXTS, side)
    config = AutoConfig.from_pretrained(folder)
    modules = read_embedding(ModelSource(str(folder)), config)
    transformer = model[0].auto_model
    with torch.no_grad(), capture(transformer, outputs=True) as seen:
        transformer(**inputs, **capture_keywords(transformer))
    assert seen.outputs is not None
    found = modules(seen.outputs, inputs["attention_mask"].bool())
    assert found.shape == (3, modules.dim) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert not list(modules.parameters())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen3", "modernbert"])
def test_outputs_are_the_states_that_the_model_hands_on(name: str) -> None:
    model, batch = tiny_model(name), tiny_batch((6, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            # a norm that does nothing would hide that it was left out
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 2)
        with capture(model, outputs=True, hidden={4}) as seen:
            expected = model(**batch, **capture_keywords(model)).last_hidden_state
    assert seen.outputs is not None and torch.equal(seen.outputs, expected)
    assert torch.equal(seen.hidden[4], expected) == (name == "bert") == hands_on_last_block(model)


def edited(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


REFUSED = {
    "an unknown module": (lambda f: f, "fastkd doesn't know its module CNN"),
    "another key": (
        lambda f: edited(f, "2_Dense", module_input_name="token_embeddings"),
        "its Dense has module_input_name 'token_embeddings', expected sentence_embedding",
    ),
    "a residual": (lambda f: edited(f, "2_Dense", use_residual=True), "use_residual"),
    "code": (
        lambda f: edited(f, "2_Dense", activation_function="os.system"),
        "the activation 'os.system' of its Dense is none of torch's",
    ),
    "prompts": (lambda f: edited(f, "1_Pooling", include_prompt=False), "leaves prompts out"),
    "a mode": (lambda f: edited(f, "1_Pooling", pooling_mode="best"), "Pooling is ['best']"),
    "no mode": (lambda f: edited(f, "1_Pooling", pooling_mode=[{}]), "Pooling is [{}], expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_modules_that_are_not_known_are_refused(name: str, tmp_path: Path) -> None:
    change, expected = REFUSED[name]
    unknown = name == "an unknown module"
    chain = [pooling("mean"), models.CNN(WIDTH, out_channels=8) if unknown else dense(WIDTH)]
    folder = change(save_sentences(tmp_path, *chain))
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(UnknownModule, match="model") as error:
        read_embedding(ModelSource(str(folder)), config)
    assert expected in str(error.value)


def test_a_dense_whose_width_fits_nothing_is_refused(tmp_path: Path) -> None:
    folder = save_sentences(tmp_path, pooling("mean"), dense(4, 7))
    with pytest.raises(UnknownModule, match="Dense is for vectors of 7, but is given 32"):
        read_embedding(ModelSource(str(folder)), AutoConfig.from_pretrained(folder))


def test_a_plain_model_is_the_mean_or_what_a_loss_says(tmp_path: Path) -> None:
    source = ModelSource(str(save_teacher(tmp_path / "t")))
    config = AutoConfig.from_pretrained(source.name)
    assert read_embedding(source, config).pooling == ("mean",)
    assert read_embedding(source, config, pooling="cls").pooling == ("cls",)


def distilled(folder: Path, teacher: Path, **sections: Any) -> Any:
    """A run of two steps from a teacher; what it gave back."""
    sections.setdefault("train", {})
    sections["train"] |= {"steps": 2, "warmup_steps": 0, "learning_rate": 0.003}
    recipe = make_recipe(folder, teacher={"model": str(teacher)}, **sections)
    return fastkd.distill(recipe, quiet=True)


@contextmanager
def finished(result: Any) -> Iterator[Run]:
    """A run as `fastkd evaluate` reads it again."""
    folder = RunFolder(result.folder)
    with joined_ranks() as ranks:
        yield set_up_evaluation(load_recipe(folder.recipe), folder, ranks)


def chain_of(model: Any) -> list[str]:
    return [type(module).__name__ for module in model]


def check_round_trip(result: Any, teacher: Path, side: str = "right") -> Any:
    """The student's folder gives what the run's `embed` gives, and so does the teacher's."""
    own = SentenceTransformer(str(result.folder / "student"), device="cpu")
    theirs = SentenceTransformer(str(teacher), device="cpu")
    inputs, expected = encoded(own, TEXTS, side)
    with finished(result) as run:
        found = run.embed("student", inputs)
        of_teacher = run.embed("teacher", inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(of_teacher, encoded(theirs, TEXTS, side)[1], atol=1e-6, rtol=1e-6)
    after = result.summary["after"]
    assert fastkd.evaluate(result, quiet=True).judged["sentence_cosine"] == pytest.approx(
        after["sentence_cosine"], abs=1e-6
    )
    return own


@pytest.mark.parametrize(
    ("chain", "numbers"),
    [("dense", {"hidden_size": WIDTH}), ("dense", {}), ("cls", {}), ("several", {})],
    ids=["wide dense", "dense", "cls", "several"],
)
def test_students_give_out_what_their_run_compared(
    chain: str, numbers: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(2)
    teacher = save_sentences(tmp_path, *CHAINS[chain]())
    losses = {**ALONE, "embedding_output": {}}
    result = distilled(tmp_path, teacher, losses=losses, student=numbers)
    own = check_round_trip(result, teacher)
    expected = chain_of(SentenceTransformer(str(teacher), device="cpu"))
    if not numbers:
        # in front of all that the teacher has behind its pooling
        expected.insert(2, "Dense")
    assert chain_of(own) == expected
    before, after = result.summary["before"], result.summary["after"]
    # a student of the teacher's own layers starts near to it
    assert numbers or after["sentence_cosine"] > before["sentence_cosine"]
    # the loss is one minus the cosine that is reported
    assert after["losses"]["embedding_output"] == pytest.approx(
        1 - after["sentence_cosine"], abs=1e-6
    )


def test_a_decoder_that_pools_the_last_token_is_read_with_padding_on_the_left(
    tmp_path: Path,
) -> None:
    """A teacher's folder without modules gets a student with them: the recipe says how it pools."""
    teacher = save_teacher(tmp_path / "t", "qwen3")
    losses = {**ALONE, "embedding_output": {"pooling": "last", "kind": "mse"}}
    result = distilled(tmp_path, teacher, losses=losses)
    folder = result.folder / "student"
    own = SentenceTransformer(str(folder), device="cpu")
    assert chain_of(own) == ["Transformer", "Pooling", "Dense"]
    assert own[1].pooling_mode == "lasttoken" and own.get_embedding_dimension() == WIDTH
    inputs, expected = encoded(own, TEXTS, "left")
    with finished(result) as run:
        torch.testing.assert_close(run.embed("student", inputs), expected, atol=1e-6, rtol=1e-6)
    assert "last pooling of 24 numbers, Dense 24 to 32" in (folder / "README.md").read_text()


def test_the_projection_of_the_last_hidden_layer_is_handed_on(tmp_path: Path) -> None:
    torch.manual_seed(2)
    teacher = save_sentences(tmp_path, pooling("mean"), dense(6, activation=nn.Tanh()))
    losses = {**ALONE, "hidden": {}}
    result = distilled(tmp_path, teacher, losses=losses)
    own = check_round_trip(result, teacher)
    assert chain_of(own) == ["Transformer", "Pooling", "Dense", "Dense"]
    assert own[2].linear.bias is not None
    readme = (result.folder / "student" / "README.md").read_text()
    assert "Dense 24 to 32 from losses.hidden, Dense 32 to 6" in readme


def test_a_loss_of_embeddings_needs_modules_that_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_sentences(tmp_path, pooling("mean"), models.CNN(WIDTH, out_channels=8))
    given: dict[str, Any] = {"teacher": {"model": str(teacher)}}
    recipe = make_recipe(tmp_path, **given, losses={**ALONE, "embedding_output": {}})
    with pytest.raises(UserError, match=r"losses.embedding_output compares embeddings, but t.*CNN"):
        fastkd.distill(recipe, quiet=True)
    recipe = make_recipe(tmp_path, **given, train={"steps": 1, "warmup_steps": 0})
    assert fastkd.distill(recipe).summary["after"]["sentence_cosine"] is None
    said = " ".join(capsys.readouterr().out.split())
    assert f"embeddings are not compared: model {teacher}: fastkd doesn't know its module" in said


def test_prefixes_of_a_narrow_student_search_an_index_of_the_teacher(tmp_path: Path) -> None:
    torch.manual_seed(2)
    teacher = save_sentences(tmp_path, pooling("mean"), models.Normalize())
    losses = {**ALONE, "embedding_output": {"dimensions": [8, 16]}}
    result = distilled(tmp_path, teacher, losses=losses, train={"steps": 2})
    folder = str(result.folder / "student")
    short = SentenceTransformer(folder, device="cpu", truncate_dim=8)
    theirs = SentenceTransformer(str(teacher), device="cpu", truncate_dim=8)
    own, index = short.encode(TEXTS), theirs.encode(TEXTS)
    assert own.shape == index.shape == (3, 8)
    whole = SentenceTransformer(folder, device="cpu").encode(TEXTS)
    torch.testing.assert_close(torch.tensor(own), torch.tensor(whole)[:, :8])


def test_a_run_is_the_same_however_it_is_cut_and_sharded(tmp_path: Path) -> None:
    """Under ZeRO-3 also what is exported and reported is whole."""
    torch.manual_seed(2)
    teacher = save_sentences(tmp_path, pooling("mean"), dense(6, activation=nn.Tanh()))
    # a softmax does not see key biases, of whose gradient Adam would make noise; scores do
    losses = {"embedding": None, "embedding_output": {"dimensions": [3]}}
    numbers = {"steps": 3, "warmup_steps": 0}
    recipe = make_recipe(tmp_path, teacher={"model": str(teacher)}, losses=losses, train=numbers)
    hidden = {"losses.embedding_output": None}
    sharded = {
        "train.zero_stage": 3,
        "deepspeed.zero_optimization": {"stage3_param_persistence_threshold": 0},
        "teacher.placement": "shard",
    }
    small = {"train.micro_batch_size": 2}

    def variants(**named: dict[str, Any]) -> list[list[str]]:
        return [keys({"run.output": str(tmp_path / name), **v}) for name, v in named.items()]

    run_variants(recipe, variants(whole={}, cut=small, hidden=hidden))
    run_variants(recipe, variants(whole3=sharded, hidden3={**sharded, **hidden}), ranks=2)
    for name, same in (("cut", "whole"), ("whole3", "whole"), ("hidden3", "hidden")):
        assert_same_run(tmp_path / name, tmp_path / same, losses=2e-5, weights=2e-5)
        found, expected = (
            load_file(tmp_path / n / "student" / "2_Dense" / "model.safetensors")
            for n in (name, same)
        )
        assert found.keys() == expected.keys()
        for key in found:
            torch.testing.assert_close(found[key], expected[key], atol=2e-5, rtol=0)
        cosines = [summary_of(tmp_path / n)["after"]["sentence_cosine"] for n in (name, same)]
        assert cosines[0] == pytest.approx(cosines[1], abs=1e-5)


def test_prompts_of_the_data_are_handed_on_beside_the_teachers(tmp_path: Path) -> None:
    teacher = save_sentences(tmp_path, pooling("mean"), models.Normalize())
    prompts = {"query": "w9 w9 ", "positive": "w8 "}
    recipe = row_recipe(
        tmp_path,
        teacher={"model": str(teacher)},
        student={"hidden_size": WIDTH},
        losses={"hidden": {}},
        data={"prompts": prompts},
        train={"steps": 1},
    )
    result = fastkd.distill(recipe, quiet=True)
    own = SentenceTransformer(str(result.folder / "student"), device="cpu")
    assert {name: own.prompts[name] for name in prompts} == prompts
    # by the names that the library asks for, too
    assert (own.encode_document(["w20"]) == own.encode(["w8 w20"])).all()
    assert (own.encode_query(["w20"]) == own.encode(["w9 w9 w20"])).all()
    assert chain_of(own) == ["Transformer", "Pooling", "Normalize"]
    expected = own.encode(["w8 w20"])
    assert (own.encode(["w20"], prompt_name="positive") == expected).all()
    with pytest.raises(UserError, match=r"data.prompts: query is 'w7 ', but teacher.model .*w9 w9"):
        other = {"run.output": str(tmp_path / "other")}
        fastkd.distill(recipe, {**other, "data.prompts": {"query": "w7 "}}, quiet=True)
    # nor is a column's another than the teacher's of the same use
    settings = teacher / "config_sentence_transformers.json"
    known = json.loads(settings.read_text())
    known["prompts"]["document"] = "w6 "
    settings.write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"positive is 'w8 ', but .* 'w6 ' before a document; give"):
        fastkd.distill(recipe, {"run.output": str(tmp_path / "other")}, quiet=True)
    # a plain teacher's student has prompts too
    plain = {**other, "teacher.model": str(tmp_path / "plain")}
    result = fastkd.distill(recipe, plain, quiet=True)
    own = SentenceTransformer(str(result.folder / "student"), device="cpu")
    assert own.prompts["query"] == "w9 w9 " and chain_of(own) == ["Transformer", "Pooling"]


@pytest.mark.parametrize(
    ("losses", "learned_by"),
    [
        ({"embedding_output": {}}, "embedding_output"),
        # one projection for all layers, drawn otherwise than that of the first stage
        ({"hidden": {"layer_map": "last", "projection": "own"}}, "hidden"),
        ({"hidden": {"projection": "per_pair"}, "projection_bias": False}, "hidden"),
    ],
)
def test_a_stage_goes_on_with_the_projection_of_the_one_before(
    tmp_path: Path, losses: dict[str, Any], learned_by: str
) -> None:
    torch.manual_seed(2)
    teacher = save_sentences(tmp_path, pooling("mean"), models.Normalize())
    recipe = make_recipe(
        tmp_path,
        teacher={"model": str(teacher)},
        train={"steps": 2, "warmup_steps": 0},
    )
    # a bias goes on where the later loss has one
    first_bias = losses.get("projection_bias", "embedding_output" not in losses)
    hidden = {"hidden": {}, "projection_bias": first_bias}
    stages = [{"losses": hidden}, {"losses": losses}]
    result = fastkd.distill(recipe, {"stages": stages}, quiet=True)
    first, second = result.summary["stages"]
    assert second["before"]["sentence_cosine"] == pytest.approx(
        first["after"]["sentence_cosine"], abs=1e-6
    )
    # the tokenizer of the stage before names token types, and frames a text as the teacher's
    assert not any("other tokens around a text" in note for note in second["notes"])
    said = (result.folder / "student" / "README.md").read_text()
    assert f"Dense 24 to 32 from losses.{learned_by}, begun as that of student.init" in said


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"hidden": {"kind": "cosine"}}, "its Dense 24 to 32 is left out: no loss here goes on wi"),
        (
            {"embedding_output": {"pooling": "cls"}},
            "its Dense 24 to 32 doesn't fit the projection of losses.embedding_output, which",
        ),
    ],
)
def test_a_stage_that_leaves_a_projection_says_so(
    tmp_path: Path, losses: dict[str, Any], expected: str
) -> None:
    recipe = make_recipe(
        tmp_path,
        teacher={"model": str(save_sentences(tmp_path, pooling("mean"), models.Normalize()))},
        train={"steps": 1, "warmup_steps": 0},
    )
    stages = [{"losses": {"hidden": {}}}, {"losses": losses}]
    summary = fastkd.distill(recipe, {"stages": stages}, quiet=True).summary
    assert any(expected in note for note in summary["stages"][1]["notes"])
    assert not any("its Dense" in note for note in summary["stages"][0]["notes"])
