"""Work through a study: shared steps first, then every run, on one or several workers."""

from __future__ import annotations

import math
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from fastkd.errors import Interrupted, UserError, some_of
from fastkd.limits import cores
from fastkd.recipe import AnyRecipe
from fastkd.reporting.numbers import fixed
from fastkd.signals import stop_signals
from fastkd.study.contents import read_value
from fastkd.study.locks import Claim
from fastkd.study.metric import follow, is_missing
from fastkd.study.plan import Plan, Run
from fastkd.study.shared import SharedRun
from fastkd.study.storage import Store, Work
from fastkd.study.worker import Children, write_beside
from fastkd.training.metric_lines import evaluation_of
from fastkd.training.metrics_file import MetricsFile
from fastkd.training.run_folder import RunFolder
from fastkd.training.stages import stage_folders

# how often an idle worker looks for work that another process left
_IDLE_SECONDS = 1.0
_KEPT = "what is finished is read again, not trained again"
# how often the user sees where we are
_LOOK_SECONDS = 0.2


class Runner:
    """The workers of this process.

    Args:
        plan: the study.
        store: its storage.
        children: starts the runs.
        workers: runs at a time.
    """

    def __init__(self, plan: Plan, store: Store, children: Children, workers: int) -> None:
        self.plan = plan
        self.store = store
        self.children = children
        self.workers = workers
        self.shared = plan.all_shared()
        self.said: queue.Queue[str] = queue.Queue()
        """Lines for the user."""
        self.began: float | None = None
        """When the first trial was started, by the monotonic clock: shared steps are not trials."""
        self.found = 0
        """Runs that were finished before, and took no time."""
        self._is_waiting = False

    def run(self, look: Callable[[], None]) -> None:
        """Work until nothing is left, here or in other processes.

        Args:
            look: called without arguments a few times a second, to show progress.

        Raises:
            UserError: a shared step that failed, or a folder that can't be written to.
            Interrupted: after SIGINT or SIGTERM.
        """
        stopping = self.children.stopping
        with ThreadPoolExecutor(self.workers) as pool, _signals(self.children) as received:
            futures = [pool.submit(self._try_all, number) for number in range(self.workers)]
            while wait(futures, _LOOK_SECONDS).not_done:
                look()
                if any(future.done() and future.exception() for future in futures):
                    stopping.set()
            look()
        for future in futures:
            # raises what ended a worker
            future.result()
        if received:
            raise Interrupted("stopped; run the same command again to continue")

    def _share(self, number: int, seed: int | None) -> None:
        """Do the shared steps of a seed, or those that all share, each in one process at most, none
        before those it needs: a study that is stopped has whole seeds."""
        stopping = self.children.stopping
        steps = [(owner, step) for owner, step in self.shared if step.seed == seed]
        while not stopping.is_set():
            steps = [(owner, step) for owner, step in steps if not _is_done(step.place.run)]
            if not steps:
                return
            ready = [given for given in steps if all(_is_done(n.run) for n in given[1].needs)]
            if not any(self._share_one(owner, step, number) for owner, step in ready):
                stopping.wait(_IDLE_SECONDS)

    def _share_one(self, owner: Plan, step: SharedRun, number: int) -> bool:
        each = (step.task or "all") + ("" if step.seed is None else f"-seed-{step.seed}")
        path = owner.output / "claims" / "shared" / step.name / each
        claim = Claim.take(path)
        if claim is None:
            process = Claim.taken_elsewhere(path)
            self._say_waiting([f"{step.label} (process {process})"] if process else [])
            return False
        try:
            if _is_done(step.place.run):
                return True
            self.said.put(f"{step.label}: started")
            recipe = owner.shared_recipe(step)
            # first: a child outlives a worker that is killed
            write_beside(step.place, step.place.digest, owner.shared_digest(step))
            ending = self.children.run(step.step.command, recipe, step.place, claim, number)
            if ending.kind == "failed":
                # nothing was made, and another recipe may be right
                step.place.digest.unlink()
        finally:
            claim.release()
        if ending.kind == "failed":
            raise UserError(f"{step.label} failed: {ending.message} (log: {step.place.log})")
        if ending.kind == "finished":
            self.said.put(f"{step.label}: finished in {fixed(ending.seconds)} s")
        return True

    def _try_all(self, number: int) -> None:
        stopping = self.children.stopping
        while not stopping.is_set():
            work = self.store.take()
            if work is not None:
                self._try(work, number)
            elif self.store.is_done():
                return
            else:
                self._say_waiting(self.store.begun_elsewhere())
                stopping.wait(_IDLE_SECONDS)

    def _say_waiting(self, others: Sequence[str]) -> None:
        """Say once what of other processes is waited for: one of them may be stopped for good."""
        if others and not self._is_waiting:
            self._is_waiting = True
            self.said.put(f"waiting for what another process has begun: {some_of(others)}")

    def _try(self, work: Work, number: int) -> None:
        """Run what a trial has left to run; a trial that is stopped is left as it is."""
        self.began = self.began or time.monotonic()
        try:
            for run in work.runs:
                news = self._try_run(work, run, number)
                if news is None:
                    return
                # first, so that what is said is counted
                if run is work.runs[-1]:
                    self.store.finish(work)
                if news:
                    self.said.put(news)
        finally:
            work.claim.release()

    def _try_run(self, work: Work, run: Run, number: int) -> str | None:
        """What there is to say of a run once it has a value; `None` where it came to none."""
        plan, store = self.plan, self.store
        if store.has_score(work, run):
            return ""
        for seed in (None, run.seed):
            self._share(number, seed)
        if self.children.stopping.is_set():
            return None
        place = plan.place(run)
        try:
            recipe = plan.recipe(run)
        except UserError as error:
            # values that are right one by one may not go together
            store.fail(work, str(error))
            self.said.put(f"{run.key}: failed: {error}")
            return None
        # the last stage makes the student that is scored
        watch = _Watch(work, run, store, stage_folders(recipe)[-1])
        ending = self.children.run(plan.spec.command, recipe, place, work.claim, number, watch)
        if ending.kind == "stopped":
            return None
        if ending.kind == "pruned":
            store.prune(work)
            _tidy(recipe, plan.spec.keep)
            self.said.put(f"{run.key}: pruned after {fixed(ending.seconds)} s")
            return None
        message = ending.message
        if ending.kind == "finished":
            value = read_value(plan, run, store.failed())
            if isinstance(value, float):
                store.score(work, run, value, ending.seconds)
                self.found += not ending.seconds
                _tidy(recipe, plan.spec.keep)
                return f"{run.key}: {value:.5g} in {fixed(ending.seconds)} s"
            message = value
            if is_missing(place.run, plan.spec.metric.path) and not store.has_scores():
                # the trial stays as it is, and its run is read again
                raise UserError(f"{plan.path}: {value}; correct the path and run again: {_KEPT}")
        store.fail(work, message)
        self.said.put(f"{run.key}: failed: {message} (log: {place.log})")
        return None


class _Watch:
    """Reads the held-out values of a running child and asks the pruner about them."""

    def __init__(self, work: Work, run: Run, store: Store, folder: RunFolder) -> None:
        self.work, self.run, self.store, self.folder = work, run, store, folder
        self.metrics, self.values = MetricsFile(folder.metrics), dict[int, float]()
        self.path = store.plan.spec.metric.heldout
        search = store.plan.spec.search
        self.active = search is not None and search.pruner != "none" and work.study is store.search
        self.seen: float | None = None

    def __call__(self) -> bool:
        if not self.active or self.path is None or not self.folder.metrics.is_file():
            return False
        changed = self.folder.metrics.stat().st_mtime_ns
        if changed == self.seen:
            return False
        self.seen = changed
        for line in self.metrics.new_lines():
            # before the first step all candidates are the same student
            if line["kind"] == "heldout" and line["step"] > 0:
                value = follow(evaluation_of(line), self.path)
                if isinstance(value, int | float) and math.isfinite(value):
                    self.values[line["step"]] = float(value)
        return bool(self.values) and self.store.report(self.work, self.run, self.values)


def _is_done(run: Path) -> bool:
    return RunFolder(run).summary.is_file()


def _tidy(recipe: AnyRecipe, keep: str) -> None:
    """Remove what a study does not keep of a run, and of the stages that led to it."""
    run = RunFolder(recipe.run.output)
    stages = [folder for folder in stage_folders(recipe) if folder.path != run.path]
    unwanted = [folder.checkpoints for folder in (run, *stages)]
    unwanted += [folder.student for folder in stages]
    if keep == "scores":
        unwanted.append(run.student)
    for folder in unwanted if keep != "all" else ():
        shutil.rmtree(folder, ignore_errors=True)


def environments(workers: int) -> list[dict[str, str]]:
    """Environment variables that share this machine's GPUs and cores out among the workers."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if devices == [""]:
        devices = [str(index) for index in range(torch.cuda.device_count())]
    threads = max(1, cores() // workers)
    common = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    return [
        {**common, **({"CUDA_VISIBLE_DEVICES": devices[n % len(devices)]} if devices else {})}
        for n in range(workers)
    ]


@contextmanager
def _signals(children: Children) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM stops the children, the next one kills them."""
    received: list[int] = []

    def note(number: int) -> None:
        (children.killing if received else children.stopping).set()
        received.append(number)

    with stop_signals(note):
        yield received
