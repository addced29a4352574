"""A student's folder on the hub: its files, its card, and nothing of anyone else's overwritten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from fastkd.errors import UserError, one_line, some_of
from fastkd.training.card import CARD_TAG
from fastkd.training.run_folder import RunFolder

# what the hub's client raises: refusals, connections, tokens that can't be read, uploads by xet
_HUB_ERRORS = (HTTPError, OSError, HFValidationError, RuntimeError)
_NAMED = 8
# what a killed process left, see `temporary_of`
_HALF_MADE = (".*", "*/.*")


@dataclass(frozen=True)
class Pushed:
    """What a push came to."""

    url: str
    """Address of the commit."""
    files: int
    """Number of files that were sent."""
    replaced: tuple[str, ...]
    """Files of the repository that were overwritten."""
    left: tuple[str, ...]
    """Files of the repository that stand beside the student's."""

    def lines(self) -> list[str]:
        """For the user."""
        said = [f"{self.files} files pushed: {self.url}"]
        for what, names in (("replaced", self.replaced), ("left as they were", self.left)):
            if names:
                said.append(f"{what}: {some_of(names, _NAMED)}")
        return said


@dataclass(frozen=True)
class _Found:
    """A repository as it is before a push."""

    files: frozenset[str]
    is_ours: bool
    private: bool
    commit: str | None
    """Commit that the push must follow on; `None` where the revision is to be made."""


def push_run(
    run: RunFolder,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
) -> Pushed:
    """Upload `student/` of a finished run to the hub, in one commit.

    Args:
        run: its folder.
        repo: `OWNER/NAME`; made where it does not exist.
        private: whether others may not see it.
        revision: branch, made from the main one where it does not exist.
        overwrite: replace files also of a repository that fastkd did not push to before.

    Raises:
        UserError: the run is not finished or has no card, its student's folder holds a link, there
            is no token or no connection, the hub refuses, or the push would overwrite files of
            somebody else.
    """
    run.read_finished()
    if not (run.student / "README.md").is_file():
        raise UserError(
            f"{run.student} has no model card (README.md); a run with run.lean leaves it out, so "
            "make one without, or write a card"
        )
    _check(repo)
    linked = next((path for path in sorted(run.student.rglob("*")) if path.is_symlink()), None)
    if linked is not None:
        raise UserError(
            f"{linked}: a link to {linked.resolve()}, which a push would send; put a copy there, "
            "or remove it"
        )
    inside = [path.relative_to(run.student) for path in run.student.rglob("*") if path.is_file()]
    files = {path.as_posix() for path in inside if not any(p.startswith(".") for p in path.parts)}
    api = HfApi()
    try:
        found = _look(api, repo, revision)
        replaced = _check_found(found, repo, files, private=private, overwrite=overwrite)
        if found is None:
            # without a word the owner's default decides
            api.create_repo(repo, private=private or None)
        if revision is not None and (found is None or found.commit is None):
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=run.student,
            ignore_patterns=list(_HALF_MADE),
            revision=revision,
            commit_message=f"Student of fastkd run {run.path.resolve().name}",
            parent_commit=found.commit if found else None,
        )
    except UserError:
        raise
    except _HUB_ERRORS as error:
        raise UserError(f"{repo}: the hub refused or was lost: {one_line(error)}") from error
    others = found.files - files - {".gitattributes"} if found else set()
    return Pushed(str(commit.commit_url), len(files), tuple(replaced), tuple(sorted(others)))


def _check(repo: str) -> None:
    """See that a push can be tried at all, before anything is asked of the hub."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo}: no name of a repository ({one_line(error)})") from error
    if repo.count("/") != 1:
        raise UserError(f"{repo}: expected OWNER/NAME, with a user or an organisation before the /")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if get_token() is None:
        raise UserError(
            "no token of the hub was found; log in with `hf auth login`, or set HF_TOKEN to one "
            "that may write"
        )


def _look(api: HfApi, repo: str, revision: str | None) -> _Found | None:
    """What stands in a repository, at the revision or where that will start from."""
    try:
        try:
            return _found(api.model_info(repo, revision=revision), exists=True)
        except RevisionNotFoundError:
            return _found(api.model_info(repo), exists=False)
    except GatedRepoError as error:
        raise UserError(f"{repo}: is gated, and this token has no access to it") from error
    except RepositoryNotFoundError:
        return None


def _found(info: Any, *, exists: bool) -> _Found:
    return _Found(
        files=frozenset(sibling.rfilename for sibling in info.siblings or ()),
        is_ours=CARD_TAG in (info.tags or ()),
        private=bool(info.private),
        commit=info.sha if exists else None,
    )


def _check_found(
    found: _Found | None, repo: str, files: set[str], *, private: bool, overwrite: bool
) -> list[str]:
    """The files that a push will replace.

    Raises:
        UserError: they are somebody else's, or all would be public that was to be private.
    """
    if found is None:
        return []
    if private and not found.private:
        raise UserError(
            f"{repo}: exists and is public, but --private is given; make it private on the hub "
            "first, or give another repository"
        )
    replaced = sorted(found.files & files)
    if replaced and not found.is_ours and not overwrite:
        raise UserError(
            f"{repo}: holds files that fastkd did not push and that would be replaced: "
            f"{some_of(replaced, _NAMED)}; give another repository, or --overwrite"
        )
    return replaced
