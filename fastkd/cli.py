"""The command line: `fastkd init`, `distill`, `finetune`, `evaluate`, `report`, `push`, `export`,
`study`, `inspect`, `doctor` and `fields`.

A mistake that the user can mend is one line on stderr and exit code 2; a run that was interrupted,
by whatever signal, is 130, and one that lost another rank is 1.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import fastkd
from fastkd.errors import Interrupted, LostRank, RankError, SharedError, UserError
from fastkd.extras import need
from fastkd.files.disk import check_place, disk_errors, write_whole
from fastkd.launcher import as_said_here, is_first, is_first_here, require_one_process
from fastkd.recipe import (
    FinetuneRecipe,
    Recipe,
    load_any_recipe,
    load_finetune_recipe,
    load_recipe,
)
from fastkd.reporting.encoding import all_names_said
from fastkd.reporting.streams import silence
from fastkd.section import Section
from fastkd.signals import Signalled, signals_raised
from fastkd.training.chips import CHIPS, ChipName

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a large transformer into a small one by matching what happens inside.",
)

RecipePath = Annotated[Path, typer.Argument(help="Recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values to replace: dotted.key=value, as in train.steps=100."),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"fastkd {fastkd.__version__}")
        raise typer.Exit


@app.callback()
def _launched(
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version.")
    ] = False,
) -> None:
    # the deepspeed launcher passes its rank as an option as well as in the environment
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    _check_surroundings()


def _check_surroundings() -> None:
    """See that there is what importing torch takes for granted."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the working folder is not to be found ({error.strerror}), removed perhaps and made "
            "again; change to one that is there (cd), and run the command again"
        ) from error
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"{error.strerror}; free some space in one of them, or set TMPDIR to a folder that you "
            "may write to"
        ) from error


@app.command()
def init(
    teacher: Annotated[str, typer.Argument(help="Folder, hub name or package:NAME/FOLDER.")],
    data: Annotated[str, typer.Argument(help="Text, as data.train takes it, or a task's folder.")],
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Of the student; half if not given.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Task of GLUE that the teacher was tuned on.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", help="File to write, which must not be there.")
    ] = Path("recipe.yaml"),
) -> None:
    """Write a first recipe, with comments, for a teacher and some data."""
    require_one_process("fastkd init")
    _check_new(output)
    from fastkd.starter import first_recipe

    text = first_recipe(teacher, data, layers=layers, task=task)
    with disk_errors(output.parent, "give another --output"):
        write_whole(output, text)
    print(f"written to {output}; next: fastkd distill {output}")


@app.command()
def distill(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in run.output, if there is one.")
    ] = False,
) -> None:
    """Distil a student as a recipe says."""
    chosen = load_recipe(recipe, overrides or [])
    from fastkd.reporting.report import print_summary, write_report
    from fastkd.training.loop import run_recipe
    from fastkd.training.session import session

    with session(chosen) as (ranks, reporter):
        summary = run_recipe(chosen, ranks, resume=resume, reporter=reporter, report=write_report)
        ranks.from_main(lambda: print_summary(summary, reporter))


@app.command()
def finetune(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in run.output, if there is one.")
    ] = False,
) -> None:
    """Train a model on the labels of a task: a teacher for distill."""
    chosen = load_finetune_recipe(recipe, overrides or [])
    from fastkd.reporting.report import print_summary, write_report
    from fastkd.training.loop import run_recipe
    from fastkd.training.session import session

    with session(chosen) as (ranks, reporter):
        summary = run_recipe(chosen, ranks, resume=resume, reporter=reporter, report=write_report)
        ranks.from_main(lambda: print_summary(summary, reporter))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the numbers to this JSON file.")
    ] = None,
) -> None:
    """Evaluate what a finished run made, and its teacher, on its held-out text or task, or on
    another."""
    if output is not None:
        _check_new(output)
    from fastkd.reporting.report import print_evaluation
    from fastkd.training.evaluate_run import evaluate_run
    from fastkd.training.run_folder import RunFolder
    from fastkd.training.session import session

    with session() as (ranks, reporter):
        found = evaluate_run(RunFolder(run), overrides or [], ranks).as_dict()
        print_evaluation(found, reporter)
        if output is not None:
            ranks.from_main(partial(_write_evaluation, output, found))


def _write_evaluation(output: Path, found: dict[str, Any]) -> None:
    with disk_errors(output.parent, "give another --output"):
        write_whole(output, json.dumps(found, indent=2) + "\n")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
) -> None:
    """Show what a finished run came to, or what several did, beside each other."""
    require_one_process("fastkd report")
    from fastkd.reporting.console import Reporter
    from fastkd.reporting.side_by_side import report_runs

    report_runs(runs, Reporter())


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="For nobody else to see.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, made if it is not there.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that fastkd did not push, too.")
    ] = False,
) -> None:
    """Put the student of a finished run on the Hugging Face hub, with its model card."""
    require_one_process("fastkd push")
    from fastkd.publishing.push import push_run
    from fastkd.reporting.console import Reporter
    from fastkd.training.run_folder import RunFolder

    pushed = push_run(RunFolder(run), repo, private=private, revision=revision, overwrite=overwrite)
    for line in pushed.lines():
        Reporter().say(line)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="As a graph for ONNX Runtime.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to make; RUN/student/onnx otherwise.")
    ] = None,
) -> None:
    """Write the student of a finished run in another format, checked against what it computes."""
    require_one_process("fastkd export")
    if not onnx:
        raise UserError("no format is given; give --onnx, which is the one there is")
    from fastkd.publishing.onnx_graph import export_onnx
    from fastkd.reporting.console import Reporter
    from fastkd.training.run_folder import RunFolder
    from fastkd.training.session import quietened

    with quietened():
        made = export_onnx(RunFolder(run), output)
    Reporter().say(str(made))


@app.command()
def study(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="Study, a YAML file.")],
    workers: Annotated[int, typer.Option("--workers", help="Runs at a time.")] = 1,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing, write the report of what is there.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also try again what failed before.")
    ] = False,
) -> None:
    """Run or continue a grid or a search over the fields of a recipe, and compare the results."""
    need("fastkd study", "study")
    from fastkd.study import run_study

    run_study(path, workers=workers, report_only=report_only, retry_failed=retry_failed)


@app.command()
def inspect(
    teacher: Annotated[str, typer.Argument(help="Hub name, folder, or package:NAME/FOLDER.")],
    student: Annotated[str, typer.Argument(help="Likewise; a run's student folder is one.")],
    data: Annotated[list[str], typer.Option("--data", help="Text, as in data.train of a recipe.")],
    kind: Annotated[
        Literal["kl", "reverse_kl", "js", "mse", "cross_entropy", "cosine"],
        typer.Option("--kind", help="Divergence of attention probabilities."),
    ] = "js",
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Blocks of text to read.")] = 64,
    block_size: Annotated[int, typer.Option("--block-size", min=8, help="Tokens of one.")] = 128,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write a CSV file and heat maps here.")
    ] = None,
) -> None:
    """Show how alike the layers of two models are: CKA and attention divergence of all pairs."""
    require_one_process("fastkd inspect")
    if output is not None:
        need("fastkd inspect --output", "study", "matplotlib")
        check_place(output / "similarity.csv", "--output", above=True)
    from fastkd.layer_similarity import inspect_layers, print_similarity, write_similarity
    from fastkd.reporting.console import Reporter

    found = inspect_layers(teacher, student, data, kind=kind, blocks=blocks, block_size=block_size)
    print_similarity(found, Reporter())
    if output is not None:
        write_similarity(found, output)
        print(f"written to {output}")


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe to try, a YAML file.")] = None,
    overrides: Overrides = None,
    gpu: Annotated[
        ChipName | None,
        typer.Option("--gpu", help="Forecast the recipe for GPUs that are not here."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="How many of them, 1 if not given.")
    ] = None,
) -> None:
    """Say what this machine has and, given a recipe, what its run will need, here or elsewhere."""
    if gpu is None and ranks is not None:
        raise UserError(f"--ranks {ranks} is given without --gpu; give the GPU of these ranks, too")
    if gpu is not None and recipe is None:
        raise UserError(f"--gpu {gpu} is given without a recipe; give the one to forecast")
    if gpu is not None:
        require_one_process("fastkd doctor --gpu", "; --ranks N says how many to forecast")
    chosen = None if recipe is None else load_any_recipe(recipe, overrides or [])
    from fastkd.reporting.console import Reporter

    if gpu is not None and chosen is not None:
        from fastkd.training.doctor import forecast_run
        from fastkd.training.session import quietened

        with quietened():
            forecast_run(chosen, CHIPS[gpu], ranks or 1, Reporter())
        return
    from fastkd.training.doctor import describe_machine, estimate_run
    from fastkd.training.session import session

    # the others would take memory of every GPU to ask for what they don't say
    if is_first():
        describe_machine(Reporter())
    if chosen is not None:
        with session() as (joined, reporter):
            estimate_run(chosen, joined, reporter)


@app.command()
def fields(
    key: Annotated[
        str | None, typer.Argument(help="A field or section alone, as train or losses.hidden.")
    ] = None,
    of: Annotated[
        Literal["distill", "finetune", "study"], typer.Option("--of", help="Whose file it is.")
    ] = "distill",
) -> None:
    """List the fields of a recipe or a study: what they take, their defaults, and what they do."""
    require_one_process("fastkd fields")
    from fastkd.plugins import load_plugins
    from fastkd.recipe.fields import fields_of
    from fastkd.reporting.fields import chosen_fields, listed

    load_plugins()
    root: type[Section] = FinetuneRecipe if of == "finetune" else Recipe
    if of == "study":
        need("fastkd fields --of study", "study")
        from fastkd.study.spec import StudySpec as root
    print(listed(chosen_fields(fields_of(root), key), shutil.get_terminal_size().columns))


def _check_new(output: Path) -> None:
    """Refuse a file that is there or can't be made, before what takes long."""
    # of several ranks the first one writes
    if is_first():
        check_place(output, "--output")
    if output.exists():
        raise UserError(f"--output {output} exists already; give another file")


def main() -> None:
    """Entry point of the `fastkd` command."""
    _open_closed_streams()
    try:
        with signals_raised(), disk_errors(None, "run the command again"), all_names_said():
            app(prog_name="fastkd")
    except SharedError as error:
        _fail(str(error), 2, says=is_first())
    except RankError as error:
        _fail(str(error), 2)
    except UserError as error:
        # before ranks have met, those of one machine meet the same
        _fail(as_said_here(error), 2, says=is_first_here())
    except Interrupted as error:
        _fail(str(error), 130, says=is_first())
    except Signalled as error:
        _fail(f"stopped by {error}", 130, says=is_first())
    except LostRank as error:
        _fail(str(error), 1)


def _open_closed_streams() -> None:
    """Let what is said go nowhere where a stream was closed (`>&-`), whose descriptor the next file
    of a run would get."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _fail(message: str, code: int, *, says: bool = True) -> None:
    if says:
        try:
            print(f"fastkd: {message}", file=sys.stderr, flush=True)
        except OSError:
            # nobody is there to read it: the exit code says what it can
            silence(sys.stderr)
    raise SystemExit(code)
