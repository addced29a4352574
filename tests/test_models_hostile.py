"""Models from strangers: nothing of theirs runs, no path of theirs leaves its folder."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import models
from tiny_exports import exported, made_student, notes_of, save_sentences
from tiny_models import WIDTH, save_teacher
from tiny_runs import run_command

from fastkd.errors import UserError
from fastkd.layer_map import make_layer_map
from fastkd.models import (
    build_student,
    load_student,
    load_teacher,
    locate_model,
    read_config,
    resolve_model,
)
from fastkd.recipe import Student
from fastkd.types import ModelSource

EVIL = "import pathlib\npathlib.Path('ran').touch()\n"


def install(root: Path, package: str, *, name: str | None = None) -> Path:
    """Put a package with a model folder where an installer would, with what it writes beside."""
    folder = root.joinpath(*package.split("."))
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    name = name or package.split(".")[0]
    info = root / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{package.replace('.', '/')}/__init__.py,,\n")
    return folder / "model"


@pytest.mark.parametrize(
    ("package", "name"),
    [("carrier_of_models", None), ("carrier.inner", None), ("other_name", "distribution")],
)
def test_an_installed_package_is_looked_into_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str | None
) -> None:
    expected = install(tmp_path, package, name=name)
    monkeypatch.syspath_prepend(tmp_path)
    assert Path(resolve_model(ModelSource(f"package:{package}/model"))) == expected
    assert package.split(".")[0] not in sys.modules


def test_an_editable_package_is_found_by_what_its_installer_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = install(tmp_path / "project", "edited")
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "project" / "edited-1.0.dist-info").rename(site / "edited-1.0.dist-info")
    (site / "edited-1.0.dist-info" / "RECORD").write_text("__editable__.edited.pth,,\n")
    (site / "__editable__.edited.pth").write_text(f"import evil\n{tmp_path / 'project'}\n")
    monkeypatch.syspath_prepend(site)
    assert Path(resolve_model(ModelSource("package:edited/model"))) == expected


@pytest.mark.parametrize("package", ["not_installed", "no.such", "json.decoder", "json"])
def test_a_package_that_is_not_there_is_named(package: str) -> None:
    expected = f"package:{package}/model: package {package} is not installed; pip"
    with pytest.raises(UserError, match=expected):
        resolve_model(ModelSource(f"package:{package}/model"))


@pytest.mark.parametrize("with_metadata", [False, True])
def test_what_lies_in_the_working_folder_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_metadata: bool
) -> None:
    install(tmp_path, "evilpkg.sub")
    (tmp_path / "evilpkg" / "__init__.py").write_text(EVIL)
    if not with_metadata:
        (tmp_path / "evilpkg-1.0.dist-info").rename(tmp_path / "else")
    monkeypatch.chdir(tmp_path)
    for place in ("", str(tmp_path), "."):
        monkeypatch.syspath_prepend(place)
        with pytest.raises(UserError, match=r"package evilpkg\.sub is not installed"):
            locate_model("package:evilpkg.sub/x")
    assert not (tmp_path / "ran").exists()


def test_a_recipe_runs_no_code_of_the_folder_that_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evilpkg").mkdir()
    (tmp_path / "evilpkg" / "__init__.py").write_text(EVIL)
    recipe = {
        "teacher": {"model": "package:evilpkg.sub/x"},
        "student": {"layers": 2},
        "losses": {"hidden": {}},
        "data": {"train": "python-docs"},
        "run": {"output": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    # the working folder is the first place that Python looks in
    monkeypatch.chdir(tmp_path)
    done = run_command("distill", "recipe.yaml")
    assert done.returncode == 2
    assert "package evilpkg.sub is not installed" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evilpkg", "recipe.yaml"]


@pytest.mark.parametrize("name", ["a/../../x", "a//etc", "../a/x", "a-b/x", "/x", ".a/x"])
def test_a_name_that_leads_out_of_a_package_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="expected package:NAME/FOLDER") as refused:
        locate_model(f"package:{name}")
    assert "\n" not in str(refused.value)


def listing(folder: Path, *entries: Any) -> Path:
    """A sentence-transformers folder with its first entry and others behind it."""
    teacher = save_sentences(folder, models.Pooling(WIDTH))
    path = teacher / "modules.json"
    path.write_text(json.dumps([json.loads(path.read_text())[0], *entries]))
    return teacher


POOLING = "sentence_transformers.models.Pooling"
ESCAPES = ("../../x", "a/../../../x", "/tmp/x", "~/x", "C:/x", "..\\x", "a\0b", "x" * 300, "a\nb")


@pytest.mark.parametrize("path", ESCAPES)
def test_a_module_outside_of_its_folder_is_left_out_and_said(tmp_path: Path, path: str) -> None:
    teacher = listing(tmp_path / "t", {"type": POOLING, "path": path})
    before = sorted((tmp_path / "t").rglob("*"))
    student, large = made_student(teacher)
    note, *_ = notes_of(student, large.config, ModelSource(str(teacher)), "none")
    assert f"goes without Pooling (its path is {path!r})" in note and "\n" not in note
    folder = exported(tmp_path / "run", teacher)
    assert [entry["path"] for entry in json.loads((folder / "modules.json").read_text())] == [""]
    assert sorted((tmp_path / "t").rglob("*")) == before
    assert {path.name for path in tmp_path.iterdir()} == {"t", "run"}


LINKED = (
    *("chat_template.jinja", "additional_chat_templates/tool.jinja", "tokenizer_config.json"),
    *("1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_a_models_folder_is_not_handed_on(tmp_path: Path, name: str) -> None:
    teacher = save_sentences(tmp_path / "t", models.Pooling(WIDTH))
    file = teacher / name
    file.parent.mkdir(exist_ok=True)
    secret = tmp_path / "secret"
    secret.write_text(file.read_text() if file.exists() else "SECRET")
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    with pytest.raises(UserError) as refused:
        exported(tmp_path / "run", teacher)
    assert str(refused.value).startswith(f"{file}: a link to {secret}, outside of its model's fol")
    assert not (tmp_path / "run" / "student").exists()
    # what lies in the folder may be a link, and so may the folder
    file.unlink()
    secret.rename(teacher / "inside")
    file.symlink_to(teacher / "inside")
    (tmp_path / "linked").symlink_to(teacher)
    assert exported(tmp_path / "run", tmp_path / "linked").is_dir()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_may_not_be_read_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "t"
    save_teacher(folder)
    # the administrator may read everything
    closed = str(folder / name)
    monkeypatch.setattr("fastkd.models.links.os.access", lambda path, _how: str(path) != closed)
    with pytest.raises(UserError, match=rf"/{name}: may not be read \(Permission denied\); get"):
        locate_model(str(folder))


@pytest.mark.parametrize("moved", ["1_Pooling", "2_Dense"])
def test_a_folder_of_a_module_is_no_way_out_either(tmp_path: Path, moved: str) -> None:
    teacher = save_sentences(tmp_path / "t", models.Pooling(WIDTH), models.Dense(WIDTH, 8))
    (teacher / moved).rename(tmp_path / "elsewhere")
    (teacher / moved).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=rf"{moved}/.*: a link to .*, outside of its model's folder"
    ):
        exported(tmp_path / "run", teacher)


def test_the_transformer_of_the_old_layout_is_no_way_out(tmp_path: Path) -> None:
    teacher = tmp_path / "t"
    save_teacher(tmp_path / "elsewhere")
    teacher.mkdir()
    entry = {"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"}
    (teacher / "modules.json").write_text(json.dumps([entry]))
    (teacher / "0_Transformer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"0_Transformer/.*: a link to .*/elsewhere/"):
        locate_model(str(teacher))


def test_weights_on_another_disk_and_the_hubs_cache_are_read(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").rename(tmp_path / "big")
    (tmp_path / "t" / "model.safetensors").symlink_to(tmp_path / "big")
    # as huggingface_hub lays a model out
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    (tmp_path / "models--org--name" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "t").iterdir():
        blob = tmp_path / "models--org--name" / "blobs" / f"sha-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    first, second = (load_teacher(ModelSource(str(f))) for f in (tmp_path / "t", snapshot))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    # a blob that is itself a link is none of the cache's
    (tmp_path / "models--org--name" / "blobs" / "sha-config.json").unlink()
    (tmp_path / "models--org--name" / "blobs" / "sha-config.json").symlink_to(tmp_path / "big")
    with pytest.raises(UserError, match=r"abc/config.json: a link to .*/big, outside"):
        load_teacher(ModelSource(str(snapshot)))


@pytest.mark.parametrize("paths", [("1_Pooling", "1_Pooling"), ("1_Pooling", "./1_Pooling/.")])
def test_modules_that_share_a_folder_each_get_their_own(
    tmp_path: Path, paths: tuple[str, str]
) -> None:
    entries = [{"type": POOLING, "path": path, "idx": 1, "name": "1"} for path in paths]
    folder = exported(tmp_path / "run", listing(tmp_path / "t", *entries))
    found = [entry["path"] for entry in json.loads((folder / "modules.json").read_text())]
    assert found == ["", "1_Pooling", "2_Pooling"]
    assert all((folder / path / "config.json").is_file() for path in found)


@pytest.mark.parametrize("path", ["../other", "/", "../../..", "~", "a\0"])
def test_a_first_module_outside_of_its_folder_is_refused(tmp_path: Path, path: str) -> None:
    save_teacher(tmp_path / "other")
    (tmp_path / "m").mkdir()
    entry = {"type": "sentence_transformers.models.Transformer", "path": path}
    (tmp_path / "m" / "modules.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=r"modules\.json leads out of its folder") as refused:
        load_teacher(ModelSource(str(tmp_path / "m")))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[" * 100_000, b"\xff\xfe", b"3", b"null", b'{"a": 1}', b"[[]]", b"[3]"),
        *(b'["ab"]', b'[{"type": 3, "path": ""}]', b'[{"type": "a", "path": [1]}]'),
        *(
            b'[{"path": "\\ud800"}]',
            b'[{"type": "\\ud800", "path": ""}]',
            b"[" + b"1" * 5000 + b"]",
        ),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_broken_listing_is_known_before_training(tmp_path: Path, content: bytes) -> None:
    teacher = save_teacher(tmp_path / "t")
    (teacher / "modules.json").write_bytes(content)
    student, large = made_student(teacher)
    note, *_ = notes_of(student, large.config, ModelSource(str(teacher)), "none")
    assert "goes without all (modules.json can't be read: " in note and "\n" not in note
    (teacher / "config.json").unlink()
    with pytest.raises(UserError, match=r"modules\.json can't be read") as refused:
        locate_model(str(teacher))
    assert "\n" not in str(refused.value)


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.made,)


@pytest.mark.parametrize("form", ["plain", "zip", "legacy"])
@pytest.mark.filterwarnings("error:Detected pickle protocol")
def test_a_hostile_pickle_is_refused_in_one_line(tmp_path: Path, form: str) -> None:
    folder = save_teacher(tmp_path / "m")
    trapped: dict[str, Any] = load_file(folder / "model.safetensors")
    trapped["trap"] = _Trap(tmp_path / "made")
    (folder / "model.safetensors").unlink()
    weights = folder / "pytorch_model.bin"
    if form == "plain":
        weights.write_bytes(pickle.dumps(_Trap(tmp_path / "made")))
    else:
        torch.save(trapped, weights, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match="its weights are a pickle of more than tensors") as refused:
        load_teacher(ModelSource(str(folder)))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("asked", ["evil/kernel", "flash_attention_2", {"": "evil/kernel"}, 7])
def test_a_recipe_says_which_attention_runs_and_no_folder(
    tmp_path: Path, key: str, asked: Any
) -> None:
    """A name such as evil/kernel would be code that transformers fetches from the hub."""
    save_teacher(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: asked}))
    source = ModelSource(str(tmp_path))
    found = load_teacher(source, attention="eager"), load_student(tmp_path, attention="sdpa")
    assert [model.config._attn_implementation for model in found] == ["eager", "sdpa"]
    assert read_config(str(tmp_path), "teacher")._attn_implementation is None
    # a student that starts from it, whole or cut
    for section in ({"init": str(tmp_path)}, {"init": str(tmp_path), "layers": 4}):
        student = Student(**{**section, "attention": "eager"})
        layers = make_layer_map("uniform", 4, 4)
        assert build_student(found[1], student, layers)[0].config._attn_implementation == "eager"
