"""`fastkd push` against a hub on this machine: what is sent, and what is refused in a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import FakeHub, serving
from tiny_training import fastkd

from fastkd.errors import UserError
from fastkd.publishing.push import Pushed, push_run
from fastkd.training.run_folder import RunFolder

CARD = "---\ntags:\n- fastkd\n---\n# small\n"
FILES = {
    "README.md": CARD,
    "config.json": "{}",
    "model.safetensors": "weights",
    "1_Pooling/config.json": "{}",
}
PUSHED = {name: text.encode() for name, text in FILES.items()}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A folder that looks like a finished run's."""
    folder = RunFolder(tmp_path / "small")
    for name, text in FILES.items():
        path = folder.student / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folder.summary.write_text(json.dumps({"steps": 1}))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(FakeHub()) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


def test_a_new_repository_holds_the_students_folder(run: RunFolder, hub: FakeHub) -> None:
    (run.student / ".onnx.123").mkdir()
    (run.student / ".onnx.123" / "model.onnx").write_text("half")
    pushed = push_run(run, "owner/name", private=True)
    assert hub.files == {"main": PUSHED} and hub.private
    # what checks the card's metadata needs none
    assert hub.tokens - {""} == {"Bearer hf_secret"} and hub.parent is None
    assert pushed.lines() == [f"4 files pushed: {hub.url}/owner/name/commit/{'c' * 40}"]


@pytest.mark.parametrize("name", ["notes.json", "1_Pooling/more", "folder"])
def test_a_link_is_not_followed_to_what_it_names(
    run: RunFolder, hub: FakeHub, tmp_path: Path, name: str
) -> None:
    """The folder may be a stranger's."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("SECRET")
    (run.student / name).symlink_to(secret if name == "folder" else secret / "key")
    with pytest.raises(UserError, match=rf"student/{name}: a link to .*secret.*, which a push"):
        push_run(run, "owner/name")
    assert not hub.files


def test_the_command_says_what_it_did(
    run: RunFolder,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.files = {"main": {**PUSHED, "notes.txt": b"kept", ".gitattributes": b""}}
    assert fastkd("push", str(run.path), "owner/name", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        "replaced: 1_Pooling/config.json, README.md, config.json, model.safetensors",
        "left as they were: notes.txt",
    ]
    # a push that another one came before is refused by the hub
    assert hub.parent == "c" * 40
    assert not any("/repos/create" in asked for asked in hub.asked)


def test_a_revision_is_a_branch(run: RunFolder, hub: FakeHub) -> None:
    push_run(run, "owner/name", revision="v2")
    assert not hub.private
    assert hub.files == {"main": {}, "v2": PUSHED}
    hub.files["main"] = {"README.md": b"# theirs"}
    # one that is to start from files of others replaces them
    with pytest.raises(UserError, match="would be replaced: README"):
        push_run(run, "owner/name", revision="v3")
    assert set(hub.files) == {"main", "v2"}
    hub.files["main"] = {"README.md": CARD.encode(), "old.txt": b""}
    assert push_run(run, "owner/name", revision="v3").left == ("old.txt",)
    assert hub.files["v3"] == {**PUSHED, "old.txt": b""}


def test_files_of_others_are_replaced_only_where_that_is_asked(
    run: RunFolder, hub: FakeHub
) -> None:
    theirs = {"README.md": b"---\ntags:\n- bert\n---\n", "model.safetensors": b"theirs"}
    hub.files = {"main": dict(theirs)}
    with pytest.raises(UserError) as refused:
        push_run(run, "owner/name")
    assert str(refused.value) == (
        "owner/name: holds files that fastkd did not push and that would be replaced: README.md, "
        "model.safetensors; give another repository, or --overwrite"
    )
    assert hub.files == {"main": theirs}
    assert push_run(run, "owner/name", overwrite=True).replaced == tuple(theirs)
    assert hub.files == {"main": PUSHED}
    # files that the student has none of are nobody's loss
    hub.files = {"main": {"data.csv": b"theirs"}}
    assert push_run(run, "owner/name").left == ("data.csv",)


def test_what_was_to_be_private_is_not_made_public(run: RunFolder, hub: FakeHub) -> None:
    hub.files = {"main": {}}
    with pytest.raises(UserError, match=r"^owner/name: exists and is public, but --private"):
        push_run(run, "owner/name", private=True)
    assert hub.files == {"main": {}}


@pytest.mark.parametrize("status", [401, 403, 412])
def test_what_the_hub_refuses_is_one_line(run: RunFolder, hub: FakeHub, status: int) -> None:
    hub.refuse = status
    with pytest.raises(UserError, match=r"^owner/name: the hub refused or was lost: "):
        push_run(run, "owner/name")


def test_a_hub_that_is_not_there_is_one_line(
    run: RunFolder, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^owner/name: the hub refused or was lost: "):
        push_run(run, "owner/name")


@pytest.mark.parametrize(
    ("repo", "expected"),
    [
        ("name", "name: expected OWNER/NAME, with a user or an organisation before the /"),
        ("a/b/c", "a/b/c: no name of a repository ("),
        ("owner/na me", "owner/na me: no name of a repository ("),
    ],
)
def test_a_wrong_name_asks_nothing_of_the_hub(
    run: RunFolder, hub: FakeHub, repo: str, expected: str
) -> None:
    with pytest.raises(UserError) as refused:
        push_run(run, repo)
    assert str(refused.value).startswith(expected) and not hub.asked


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("offline", "fastkd: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"),
        ("token", "fastkd: no token of the hub was found; log in with `hf auth login`, or set "),
        ("summary", "fastkd: {run} holds no finished run; give the folder of one, or finish it"),
    ],
)
def test_what_is_missing_is_one_line_before_anything(
    run: RunFolder,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    expected: str,
) -> None:
    if change == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif change == "token":
        monkeypatch.setattr("fastkd.publishing.push.get_token", lambda: None)
    else:
        run.summary.unlink()
    assert fastkd("push", str(run.path), "owner/name", monkeypatch=monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(expected.format(run=run.path)) and not hub.asked


def test_many_names_are_counted() -> None:
    names = tuple(f"f{n}" for n in range(10))
    said = Pushed("u", 1, names, ()).lines()
    assert said == ["1 files pushed: u", f"replaced: {', '.join(names[:8])} and 2 more"]


def test_a_student_without_a_card_stays_here(run: RunFolder, hub: FakeHub) -> None:
    card = run.student / "README.md"
    text = card.read_text()
    card.unlink()
    with pytest.raises(UserError, match=r"has no model card \(README.md\); a run with run.lean"):
        push_run(run, "owner/name")
    card.write_text(text)
    assert not hub.files
