"""Cases of a soak: a fault is drawn, the command is struck, continued, and its outcome judged."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from soak_child import Orders
from soak_processes import Ended, Launcher, Timer, end_all
from soak_scenarios import SCENARIOS, Result, read_result

FAULTS = ("kill-time", "kill-call", "ENOSPC", "EROFS", "size", "flip")
AS_UNDISTURBED = "ended as undisturbed"
REFUSED = "refused in one line"
OTHER = "other weights"
TRACEBACK = "traceback"
FOR_EVER = "refused for ever"
OTHERWISE = "ended otherwise"
NOT_STRUCK = "not struck"
OUTCOMES = (AS_UNDISTURBED, REFUSED, NOT_STRUCK, OTHER, TRACEBACK, FOR_EVER, OTHERWISE)


@dataclass(frozen=True)
class Case:
    """One disturbance, drawn from its three words alone."""

    scenario: str
    fault: str
    seed: int

    def __str__(self) -> str:
        return f"{self.scenario}:{self.fault}:{self.seed}"

    @property
    def random(self) -> random.Random:
        """What it is drawn with."""
        return random.Random(str(self))


@dataclass(frozen=True)
class Outcome:
    """How a case ended, and what tells more of it."""

    case: Case
    kind: str
    detail: str = ""

    @property
    def is_right(self) -> bool:
        """A changed byte may be refused; after a kill or a full disk a run must go on."""
        allowed = (AS_UNDISTURBED, NOT_STRUCK, *([REFUSED] if self.case.fault == "flip" else []))
        return self.kind in allowed


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of a scenario."""

    recipe: Path
    result: Result
    changes: dict[str, int]
    """Changes of the disk that each process made."""
    seconds: float


def make_reference(name: str, folder: Path, launcher: Launcher) -> Reference:
    """Write a scenario's files and run it once."""
    folder.mkdir()
    recipe, work = SCENARIOS[name].make(folder), folder / "work"
    orders = Orders(folder=str(work), notes=str(folder / "notes"))
    arguments = SCENARIOS[name].arguments(recipe, work)
    ended = launcher.run(arguments, orders, SCENARIOS[name].ranks)
    assert ended.code == 0, ended.said[-3000:]
    counts = sorted((folder / "notes").glob("*.count"))
    changes = {path.stem: int(path.read_text()) for path in counts}
    return Reference(recipe, _read(name, work, ended), changes, ended.seconds)


def _read(name: str, work: Path, ended: Ended) -> Result:
    return read_result(work, ended.printed if name == "cache" else "")


def try_case(case: Case, reference: Reference, folder: Path, launcher: Launcher) -> Outcome:
    """Disturb a command in a folder of its own, continue it, and judge."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    scenario, work = SCENARIOS[case.scenario], folder / "work"
    arguments = scenario.arguments(reference.recipe, work)
    notes = folder / "struck"
    orders, timer, what = _draw(case, reference, work, notes)
    first = launcher.run(arguments, orders, scenario.ranks, timer)
    struck = (notes / "struck").exists()
    if timer:
        struck = first.code == -signal.SIGKILL or (scenario.ranks > 1 and first.code != 0)
    if case.fault == "flip":
        struck = _struck_byte(case, work)
        what += f", {struck}"
    count = 0

    def again() -> Ended:
        nonlocal count
        count += 1
        plain = Orders(folder=str(work), notes=str(folder / f"again-{count}"))
        more = [scenario.again] if scenario.again else []
        return launcher.run([*arguments, *more], plain, scenario.then or scenario.ranks)

    def difference(ended: Ended) -> str:
        found = _read(case.scenario, work, ended)
        return found.difference(reference.result, scenario.rounding)

    kind, detail = judge(case.fault, bool(struck), first, again, difference, _logs(work))
    for left in folder.iterdir():
        if left.is_dir():
            end_all(left)
    return Outcome(case, kind, f"{what}: {detail}" if detail else what)


def judge(
    fault: str,
    struck: bool,
    first: Ended,
    again: Callable[[], Ended],
    difference: Callable[[Ended], str],
    logs: str = "",
) -> tuple[str, str]:
    """What a case came to, and the words that tell of it.

    Args:
        fault: its kind.
        struck: whether it did anything.
        first: the disturbed command.
        again: continues the command without a fault.
        difference: from the undisturbed one, of a command that ended well; empty for none.
        logs: of the disturbed command's children.
    """
    if _TRACE in first.said + logs:
        return TRACEBACK, f"as it was struck: {_last(first.said + logs)}"
    if first.hung:
        return OTHERWISE, "hung as it was struck"
    if not struck and first.code != 0:
        return OTHERWISE, f"undisturbed, it ended with {first.code}: {_last(first.said)}"
    if fault in ("ENOSPC", "EROFS", "size") and struck and first.code not in (0, 2):
        return OTHERWISE, f"ended with {first.code} on a disk that failed: {_last(first.said)}"
    later = again()
    kind, detail = _judge_later(later, difference)
    if kind == REFUSED and fault != "flip" and _judge_later(again(), difference)[0] == REFUSED:
        return FOR_EVER, detail
    return (NOT_STRUCK, detail) if kind == AS_UNDISTURBED and not struck else (kind, detail)


_TRACE = "Traceback (most recent call last)"


def _judge_later(later: Ended, difference: Callable[[Ended], str]) -> tuple[str, str]:
    if _TRACE in later.said:
        return TRACEBACK, _last(later.said)
    if later.hung:
        return OTHERWISE, "hung"
    if later.code == 2 and len(later.lines) == 1:
        return REFUSED, later.lines[0]
    if later.code != 0:
        return OTHERWISE, f"ended with {later.code}: {_last(later.said)}"
    found = difference(later)
    return (OTHER, found) if found else (AS_UNDISTURBED, "")


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def _logs(work: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(work.rglob("*.log")))


def _draw(
    case: Case, reference: Reference, work: Path, notes: Path
) -> tuple[Orders, Timer | None, str]:
    """The fault of a case: in a process, or after some time, and how it is called."""
    draw = case.random
    names = sorted(reference.changes)
    if case.fault == "kill-time":
        seconds = draw.uniform(0, 1.05 * reference.seconds)
        name = draw.choice([*names, "all"]) if SCENARIOS[case.scenario].ranks > 1 else "all"
        # of a study, its own process alone: its runs must be found and waited for
        timer = Timer(seconds, notes, name, group=name == "all" and case.scenario != "study")
        plain = Orders(folder=str(work), notes=str(notes))
        return plain, timer, f"killed {name} after {seconds:.2f} s"
    name = draw.choice(names)
    changes = reference.changes[name]
    number = draw.randint(1, changes)
    if case.fault == "flip":
        number = draw.randint(max(1, changes // 3), changes)
        # a cache that was never finished is thrown away
        number += changes if case.scenario == "cache" and draw.random() < 0.7 else 0
    kind = "kill" if case.fault in ("kill-call", "flip") else case.fault
    # ranks say what they say into files
    limit = draw.choice((0, 100, 4000, 20_000)[2 * (SCENARIOS[case.scenario].ranks > 1) :])
    orders = Orders(str(work), str(notes), kind, name, number, limit)
    return orders, None, f"{kind} at change {number} of {changes} of {name}"


def _struck_byte(case: Case, work: Path) -> str:
    """Flip a bit of a file below a folder; which one, or nothing where there is no byte."""
    draw = random.Random(f"{case} byte")
    found = [path for path in work.rglob("*") if path.is_file() and not path.is_symlink()]
    files = sorted(path for path in found if path.stat().st_size)
    if not files:
        return ""
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.relative_to(work)}"
