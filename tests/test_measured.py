"""What README.md and docs/measured.md say of the CPU, held against the committed results."""

from __future__ import annotations

import json
import re
from statistics import fmean
from typing import Any

import pytest
from page_tables import agrees, section_rows, table_rows

from benchmarks.rerun import QUOTED, QUOTED_LONG, RESULTS, ROOT

STEPS = {(8, 128): "8 x 128", (2, 512): "2 x 512"}
COLUMNS = ("fastkd distill", "fastkd distill, ZeRO-1", "fastkd", "output_attentions")
PAIRED = "median of pairs"
OPS = [
    "test_attention_score_mse",
    "test_attention_divergence",
    "test_hidden_mse",
    "test_hidden_cosine",
    "test_logits_divergence",
]
KINDS = ("attention", "hidden")
QUOTED_BY_README = "test_attention_score_mse[bert-base-to-tinybert-4-2048]"


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("name", "heading"), [("README.md", "## Why"), ("docs/measured.md", "## A training step")]
)
def test_training_steps(name: str, heading: str) -> None:
    rows = {row[0]: row[1:] for row in section_rows(page(name), heading)}
    for (batch, tokens), shape in STEPS.items():
        found = result(f"training-step-cpu-{batch}x{tokens}")
        ratios = found["times the trivial step, median of paired rounds"]
        quartiles = found["quartiles of the rounds"]
        assert found["rounds"] == 21 and "quartiles of 21 rounds" in page(name)
        for column, cell in zip(COLUMNS, rows[shape], strict=True):
            said = re.findall(r"[\d.]+", cell)
            assert all(map(agrees, said, (ratios[column], *quartiles[column]))), (shape, column)
            assert len(said) == 3


def test_ops() -> None:
    every = [name for of in (QUOTED, QUOTED_LONG) for names in of.values() for name in names]
    # the page has an op's rows together
    order = sorted(every, key=lambda name: OPS.index(name.partition("[")[0]))
    benchmarks = result("kernels-cpu")["benchmarks"]
    rows = section_rows(page("docs/measured.md"), "## One op")
    for (_, ratio, *sizes), name in zip(rows, order, strict=True):
        check_op(name, benchmarks[name], [ratio, *sizes])
    (said,) = re.findall(
        r"`attention_score_mse` takes (\d+) times \((\d+) to (\d+)\) as long as the op and "
        r"(\d+) MB where the op takes (\d+) MB",
        page("README.md").replace("\n", " "),
    )
    ratio, low, high, plain, held = said
    check_op(QUOTED_BY_README, benchmarks[QUOTED_BY_README], [ratio, held, plain])
    rounds = benchmarks[QUOTED_BY_README]["range_of_times_the_op"]["definition"]
    assert all(agrees(one, end) for one, end in zip((low, high), rounds, strict=True))


def check_op(name: str, found: dict[str, Any], cells: list[str]) -> None:
    """The definition's time over the op's, and what both hold."""
    op = found["shape"].get("chosen", "op")
    held = found["peak_megabytes"]
    values = [found["times_the_op"]["definition"], held[op], held["definition"]]
    for cell, value in zip(cells, values, strict=True):
        said = cell.split()[0]
        assert agrees(said, value), (name, cell, value)
    assert ("slower" in cells[0]) == (values[0] < 1), name


def test_compiled_steps() -> None:
    text = page("docs/measured.md").replace("\n", " ")
    pattern = r"takes ([\d.]+) times as long as a \[compiled\].*? and ([\d.]+) times at"
    (said,) = re.findall(pattern, text)
    found = result("compiled-cpu")["rows x tokens"]
    for number, entry in zip(said, found.values(), strict=True):
        assert agrees(number, entry[f"eager step / compiled step, {PAIRED}"])


def test_a_teacher_in_eight_bits() -> None:
    found = result("teacher-dtypes")["rows x tokens"]
    for name, *cells in section_rows(page("docs/measured.md"), "## A teacher in eight bits"):
        key = f"fp32 / {name.replace('`', '')}, {PAIRED}"
        for cell, entry in zip(cells, found.values(), strict=True):
            assert agrees(cell.removesuffix(" x"), entry[key]), name


def test_the_readme_has_its_peers_from_the_whole_tables() -> None:
    tables = page("benchmarks/README.md").partition("| BERT-base to 4 x 312 |")[2]
    rows = {tuple(row[:2]): row[2:] for row in table_rows(tables.partition("\n\n")[0])}
    said = [row for row in section_rows(page("README.md"), "## Why") if "MB" in row[1]]
    assert len(said) == 5
    for name, *cells in said:
        row = rows[tuple(name.split(", "))]
        for cell, ratio, size in zip(cells, row[::2], row[1::2], strict=True):
            times = "1" if name.startswith("fastkd") else ratio.split()[0]
            assert cell == f"{times}, {size} MB", name


def test_an_embedding_model_at_equal_time() -> None:
    found = result("embeddings-cpu")
    heading = "## An embedding model at equal time"
    short, long = (
        page("docs/measured.md").partition(heading)[2].split("\nAt four times the time")[:2]
    )
    rows = table_rows(short)[1:]
    assert len(rows) == 4
    for name, seconds, steps, score in rows:
        name = name.rpartition(", ")[2]
        assert agrees(seconds, found["seconds of a step"][name])
        of_name = runs_of(found, name)
        assert {steps.replace(",", "")} == {str(run["steps"]) for run in of_name}
        says_range(score, of_name)
    found = result("embeddings-cpu-4x")
    names = ("loop", "stored", "stored, frozen vocabulary", "outside")
    for (_, score), name in zip(table_rows(long)[1:], names, strict=True):
        says_range(score, runs_of(found, name))


def runs_of(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Of every seed."""
    return [run for key, run in found["runs"].items() if key.startswith(f"{name}, seed ")]


def says_range(said: str, runs: list[dict[str, Any]]) -> None:
    """`mean (least to most)`, or one number."""
    scores = [run["spearman"] for run in runs]
    numbers = re.findall(r"\d\.\d+", said)
    assert len(numbers) in (1, 3)
    for number, value in zip(numbers, [fmean(scores), min(scores), max(scores)], strict=False):
        # means were taken of more digits than the result has
        assert abs(float(number) - value) < 1e-4, (said, scores)


def test_real_text_and_a_decoder() -> None:
    wiki, decoder = result("wiki-minilm"), result("decoder")
    rows = section_rows(page("docs/measured.md"), "## Real text")
    assert len(rows) == len(wiki["layer_map"])
    for pair, *cells in rows:
        values = [wiki[w]["losses"][f"{of}/{pair}"] for of in KINDS for w in ("before", "after")]
        assert all(agrees(cell, value) for cell, value in zip(cells, values, strict=True)), pair
    text = page("docs/measured.md").replace("\n", " ")
    (said,) = re.findall(r"sentence embeddings rose from ([\d.]+) to ([\d.]+)\.", text)
    for number, when in zip(said, ("before", "after"), strict=True):
        assert agrees(number, wiki[when]["sentence_cosine"])
    pattern = (
        r"makes (\d+) million parameters of (\d+) million\. Perplexity was (\d+) after 200 steps"
    )
    (said,) = re.findall(
        pattern + r", ([\d.]+) million before them, and the teacher's is (\d+)", text
    )
    parameters = decoder["parameters"]
    values = (parameters["student"] / 1e6, parameters["teacher"] / 1e6)
    values += (decoder["after"]["perplexity"], decoder["before"]["perplexity"] / 1e6)
    values += (decoder["teacher"]["perplexity"],)
    assert all(map(agrees, said, values)), said


def test_padding() -> None:
    text = page("docs/measured.md").replace("\n", " ")
    cases = result("padding")["cases"]
    layers, words = (cases[f"SST-2, {of}, micro-batches of 32"] for of in ("layers", "predictions"))
    others = (cases[f"{of}, layers, micro-batches of 32"] for of in ("MRPC", "RTE"))
    tokens, median = "tokens, padded / none", "quartiles of pairs"
    (said,) = re.findall(
        r"SST-2 compute ([\d.]+) times .*? take ([\d.]+) times .*? and ([\d.]+) times .*? "
        r"RTE have ([\d.]+) and ([\d.]+) times",
        text,
    )
    values = [layers[tokens], layers[median][1], words[median][1], *(one[tokens] for one in others)]
    assert all(map(agrees, said, values)), said


def test_a_stored_teacher() -> None:
    epochs = result("teacher-cache-cpu")["epochs"]
    rows = section_rows(page("docs/measured.md"), "## A stored teacher")[:4]
    layers, words = "layers, student", "predictions, student"
    exact, rounded = "exact", "bfloat16, attention recomputed"
    names = [
        [f"{layers} 3 x 384, {exact}", f"{words} 3 x 384, {exact}"],
        [f"{layers} 3 x 384, {rounded}"],
        [f"{layers} 2 x 192, {exact}"],
        [f"{layers} 2 x 192, {rounded}"],
    ]
    assert {name for of in names for name in of} == set(epochs)
    for (*_, size, ratio), of in zip(rows, names, strict=True):
        assert int(size.replace(",", "")) == epochs[of[0]]["bytes a token"]
        quartiles = [
            quartile
            for name in of
            for epoch in ("first epoch, from the disk", "second epoch, from memory")
            for quartile in epochs[name][epoch]["teacher / cache"]["quartiles of pairs"]
        ]
        said = re.findall(r"[\d.]+", ratio)
        assert all(map(agrees, said, (min(quartiles), max(quartiles)))), (of, quartiles)


def test_the_readmes_demo_and_embeddings() -> None:
    text = page("README.md").replace("\n", " ")
    demo = result("demo")
    (said,) = re.findall(
        r"student has ([\d.]+) of its teacher's ([\d.]+) million parameters and reads ([\d.]+) "
        r"times .*? rises from ([\d.]+) to ([\d.]+) ",
        text,
    )
    speed = demo["speed"]["batches"]["32"]
    rates = [speed[of]["tokens_per_second"] for of in ("student", "teacher")]
    values = [demo["parameters"][of] / 1e6 for of in ("student", "teacher")]
    values += [rates[0] / rates[1], *(demo[w]["sentence_cosine"] for w in ("before", "after"))]
    assert all(map(agrees, said, values)), said
    for file, pattern, names in (
        (
            "embeddings-cpu",
            r"correlation of ([\d.]+) on STS-B.*? and ([\d.]+) with a plain loop",
            ("outside", "loop"),
        ),
        (
            "embeddings-cpu-4x",
            r"has ([\d.]+), in each of its two seeds below the loop's, which has ([\d.]+)\..*? "
            r"comes to ([\d.]+) there",
            ("outside", "loop", "stored"),
        ),
    ):
        (said,) = re.findall(pattern, text)
        of_name = {name: runs_of(result(file), name) for name in names}
        for number, runs in zip(said, of_name.values(), strict=True):
            says_range(number, runs)
    below = zip(of_name["outside"], of_name["loop"], strict=False)
    assert [run["spearman"] < loop["spearman"] for run, loop in below] == [True, True]


def test_attention_in_bf16() -> None:
    cases = {
        (dtype, int(shape.split(" x ")[1]), int(heads.rpartition(" ")[2])): entry["fused / plain"][
            1
        ]
        for name, entry in result("cpu-attention")["cases"].items()
        for dtype, shape, heads in [name.split(", ")]
    }
    rows = section_rows(page("docs/measured.md"), "## Attention in bf16 on a CPU")
    assert len(rows) == 5
    for tokens, *cells in rows:
        columns = [(dtype, int(tokens), heads) for dtype in ("bf16", "fp32") for heads in (32, 64)]
        for cell, column in zip(cells, columns, strict=True):
            assert agrees(cell, cases[column]), column
