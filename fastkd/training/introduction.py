"""What a run is going to do, said before its first step."""

from __future__ import annotations

from fastkd.layer_map import CONVENTION, LayerMap
from fastkd.models import UnknownModule, read_embedding
from fastkd.recipe import Recipe, Student, write_yaml
from fastkd.reporting.console import Reporter
from fastkd.reporting.numbers import fixed
from fastkd.training.engine import whole_weights
from fastkd.training.export import export_notes, exported_modules
from fastkd.training.precision import describe_precision
from fastkd.training.setup import Run
from fastkd.training.teacher import NoTeacher, TeacherRunner


def introduce(run: Run, reporter: Reporter) -> None:
    """Print the student, the text, the batch, the terms, and every mapping in force."""
    recipe, plan, initialisation = run.recipe, run.plan, run.initialisation
    size = f"{fixed(initialisation.total / 1e6, 1)} M parameters"
    if isinstance(recipe, Recipe):
        share = initialisation.copied / initialisation.total
        origin = _origin(recipe.student, run.layers)
        frozen = ", word embeddings frozen" if recipe.student.freeze_word_embeddings else ""
        reporter.say(
            f"student: {run.layers.student_layers} layers, {size}, {share:.0%} of them copied from "
            f"{origin}{frozen}"
        )
        for missing in initialisation.missing:
            reporter.say(f"student: {missing}: the architecture has none in its place")
        for drawn in initialisation.drawn:
            reporter.say(f"student: {drawn}; student.init importance keeps heads whole")
    else:
        head = "drawn by train.seed" if initialisation.new_head else "its own"
        reporter.say(f"model: {recipe.model.name}, {size}, head {head}")
    reporter.say(describe_precision(recipe, run.module.student, run.ranks.device))
    if isinstance(run.teacher, TeacherRunner) and run.teacher.quantised is not None:
        reporter.say(f"teacher: {run.teacher.quantised}")
    several = run.objective.pair.ensemble
    if several is not None:
        reporter.say(f"teachers: {1 + len(run.others)}, {several}")
    for note in (*handed_on_notes(run), *_not_compared(run)):
        reporter.say(note)
    there, step = run.datamodule.introduction(recipe.train.batch_size)
    reporter.say(there)
    cut = f"{plan.accumulation} micro-batches x {plan.micro_batch_size}"
    if plan.tokens is not None:
        cut = f"micro-batches of up to {plan.tokens:,} tokens"
    reporter.say(f"batch: {step} = {plan.world_size} ranks x {cut}; {recipe.train.steps} steps")
    if recipe.train.compile:
        reporter.say("compile: the first steps compile the models, which takes a while")
    if not isinstance(recipe, Recipe):
        return
    if recipe.preset is not None:
        reporter.say(f"preset {recipe.preset}, written out:\n{expanded(recipe)}")
    _print_map(run.layers, "layer map", reporter)
    for name, layers in run.objective.maps.items():
        if layers != run.layers:
            _print_map(layers, f"layer map of losses.{name}", reporter)
    reporter.say(CONVENTION)


def handed_on_notes(run: Run) -> list[str]:
    """What the student will be exported without."""
    student = run.module.student
    teacher_config = student.config
    if not isinstance(run.teacher, NoTeacher):
        teacher_config = run.teacher.model.config
    with whole_weights(run.engine, run.objective.parameters()):
        modules = exported_modules(
            run.objective, run.source, teacher_config, student.config, run.prompts
        )
    return [*run.notes, *export_notes(student, modules, run.source)]


def _not_compared(run: Run) -> list[str]:
    """Why an evaluation says nothing of embeddings, where it would."""
    if run.objective.pair.embeddings is not None or run.datamodule.reads != "embeddings":
        return []
    assert isinstance(run.teacher, TeacherRunner), "embeddings are compared with a teacher's"
    try:
        read_embedding(run.source, run.teacher.model.config, run.objective.pair.head)
    except UnknownModule as error:
        return [f"embeddings are not compared: {error}"]
    return []


def expanded(recipe: Recipe) -> str:
    """What a preset and the user's own keys came to, as YAML, without what is off."""
    tree = recipe.model_dump(mode="json", include={"layer_map", "losses"}, exclude_none=True)
    tree = {"student": {"head": recipe.student.head}, **tree}
    return write_yaml(tree).rstrip()


def _origin(student: Student, layers: LayerMap) -> str:
    """What a student's weights are copied from."""
    if student.starts_from is not None:
        return student.init
    if student.init == "random":
        return "the teacher"
    # a map that names none or several for a layer says nothing of where it starts
    return f"the teacher's layers {', '.join(map(str, layers.sources()))}"


def _print_map(layers: LayerMap, title: str, reporter: Reporter) -> None:
    rows = [(str(s), "-" if t is None else str(t)) for s, t in layers.rows()]
    reporter.table(title, ("student layer", "teacher layer"), [("0", "0"), *rows])
