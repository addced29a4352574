"""A study from its file to its report."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fastkd.errors import Interrupted, UserError
from fastkd.files.disk import write_whole
from fastkd.launcher import require_one_process
from fastkd.reporting.console import Reporter
from fastkd.reporting.encoding import all_names_said
from fastkd.study.chosen import read_chosen
from fastkd.study.opening import StorageErrors
from fastkd.study.plan import Plan
from fastkd.study.plots import make_plots
from fastkd.study.progress import Watcher
from fastkd.study.report import write_page
from fastkd.study.results import Results
from fastkd.study.runner import Runner, environments
from fastkd.study.search import importances
from fastkd.study.spec import load_study
from fastkd.study.storage import Record, Store
from fastkd.study.tables import make_tables
from fastkd.study.worker import Children


@all_names_said()
def run_study(
    path: str | Path,
    *,
    workers: int = 1,
    report_only: bool = False,
    retry_failed: bool = False,
    program: Sequence[str] | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Run or continue a study and write its report.

    Several processes may run the same study at once, and each continues what another one left.

    Args:
        path: study file.
        workers: runs at a time in this process; the GPUs are shared out among them.
        report_only: run nothing, write the report of what is there.
        retry_failed: also try again what failed before.
        program: a command that makes a run in place of ours, by `*program distill RECIPE --resume`.
        reporter: what the user sees.

    Returns:
        The report, an HTML file.

    Raises:
        UserError: this process is one of several ranks, or a mistake in the study file, found
            before anything is run; another study's storage, or one that can't be written; runs or
            shared steps that were made with another recipe; a shared step that failed; or runs that
            failed, after the report is written.
        Interrupted: after SIGINT or SIGTERM; the next call continues.
    """
    require_one_process("fastkd study", "; --workers N makes N runs at a time")
    if workers < 1:
        raise UserError(f"--workers is {workers}, expected at least 1")
    reporter = reporter or Reporter()
    spec = load_study(path)
    plan = Plan(spec, Path(path), read_chosen(spec, Path(path)))
    if report_only and not (plan.output / "study.db").is_file():
        raise UserError(f"{plan.output} holds no study yet; run it without --report-only")
    plan.check_shared()
    with StorageErrors(plan.output / "study.db"):
        store = _open(plan)
        if report_only:
            store.check_recipes()
        else:
            _work(plan, store, workers, retry_failed, program, reporter)
        records = store.records()
    page = _report(plan, store, records, reporter)
    _complain_of_failures(records)
    return page


def _open(plan: Plan) -> Store:
    try:
        return Store(plan)
    except OSError as error:
        raise UserError(
            f"output {plan.output} can't be used ({error.strerror}); give a folder that you may "
            "write to"
        ) from error


def _work(
    plan: Plan,
    store: Store,
    workers: int,
    retry_failed: bool,
    program: Sequence[str] | None,
    reporter: Reporter,
) -> None:
    children = Children(program, environments(workers))
    runner = Runner(plan, store, children, workers)
    write_whole(plan.output / "study.yaml", plan.path.read_text(encoding="utf-8"))
    store.add_work(retry_failed=retry_failed)
    done, total = store.counts()
    what = "runs" if plan.spec.search is None else "runs and candidates"
    reporter.say(f"{plan.spec.name}: {total} {what}, {done} of them done; in {plan.output}")
    watcher = Watcher(store, runner, reporter)
    try:
        with watcher.watching():
            runner.run(watcher.look)
    except Interrupted as error:
        done, total = store.counts()
        raise Interrupted(f"{error} ({done} of {total} {what} are done)") from error


def _report(plan: Plan, store: Store, records: Sequence[Record], reporter: Reporter) -> Path:
    results = Results(plan, records)
    shares = {} if store.search is None else importances(store.search)
    tables = make_tables(results, shares)
    page = write_page(plan, tables, make_plots(results, shares))
    for table in tables:
        of_runs = table.name == "runs"
        # all conditions of a grid are for the report
        if table.rows and table.brief and not (table.name == "conditions" and store.search is None):
            columns = [table.columns[index] for index in table.brief]
            # intervals and tests are for the report; what a run failed of is said whole
            short = str if of_runs else _without_brackets
            reporter.table(
                table.title,
                columns,
                [[row[0], *(short(row[index]) for index in table.brief[1:])] for row in table.rows],
            )
        # other notes explain what is in the report alone
        for note in table.notes if of_runs else ():
            reporter.say(note)
    reporter.say(f"report: {os.path.relpath(page)}")
    return page


def _without_brackets(cell: str) -> str:
    return re.split(r" [\[(]", cell)[0]


def _complain_of_failures(records: Sequence[Record]) -> None:
    failed = [record for record in records if record.state == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(records)} runs failed, the first is {failed[0].run.key}: "
            f"{failed[0].message}; mend it and run again with --retry-failed"
        )
