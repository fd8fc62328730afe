"""The guard: what a finished change must show before its commit is written (docs/guard.md). No torch unless the model is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from patchhub.errors import GuardError
from patchhub.evaluation.guard import Finding, Limits, Measured, Report, judge
from patchhub.objects import Commit, Request
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.snapshot import Judge
from patchhub.store.repository import Repository

if TYPE_CHECKING:
    from patchhub.porcelain.guard_vectors import Prepared
    from patchhub.porcelain.opened import Opened

PREFIX: Final = "guard."

_REMEDIES: Final[Mapping[str, str]] = {
    "drift": "Write fewer facts at once, or lower the editor's clamp and learning_rate",
    "total": "Revert facts that are not needed any more, or raise guard.total",
    "own": "Check the prompts and subjects of the facts, or look for better layers with `patchhub tune`",
    "earlier": "Write fewer facts at once, or take back what they compete with",
    "misfit": "Take contradicting facts back with `patchhub revert --subject`, or commit with --on-conflict replace",
    "spectrum": "Write fewer facts at once, lower the editor's clamp and learning_rate, or raise its ridge",
    "survival": "Use the base in a wider type, or load with the deltas beside the weights",
}


@dataclass(frozen=True)
class Guarding:
    """How a verb that works on stored vectors is guarded.

    Attributes:
        force: write what fails all the same, and say so in the commit.
        check: ask the model too.
    """

    force: bool = False
    check: bool = False

    def judge(
        self, repository: Repository, progress: Progress, *, facts: int | None = None, remedy: str | None = None
    ) -> Judge:
        """The judge of one commit of a repository; ``facts`` and ``remedy`` are as in `decided`."""

        def look(commit: Commit) -> Mapping[str, Any]:
            from patchhub.porcelain.guard_vectors import from_vectors, prepared

            found = prepared(repository, commit)
            measured = _ask_model(repository, found, progress) if self.check else from_vectors(repository, found)
            return decided(repository, measured, force=self.force, facts=facts, remedy=remedy)

        return look


GUARDED: Final = Guarding()
"""Stored vectors and the cast alone; what fails is refused."""


def judge_edit(
    repository: Repository, opened: Opened, requests: Sequence[Request], progress: Progress, *, force: bool
) -> Judge:
    """The judge of a commit of new facts, with the model that they were written with."""

    def look(commit: Commit) -> Mapping[str, Any]:
        from patchhub.porcelain.guard_model import from_model
        from patchhub.porcelain.guard_vectors import prepared

        progress.stage("checking", 0)
        measured = from_model(repository, opened, prepared(repository, commit), requests)
        _warn(measured, progress)
        return decided(repository, measured, force=force)

    return look


def limits_of(repository: Repository) -> Limits:
    """The limits of a repository: the defaults, changed by its settings."""
    settings = repository.config.settings
    return Limits(**{f.name: settings[PREFIX + f.name] for f in fields(Limits) if PREFIX + f.name in settings})


def decided(
    repository: Repository, measured: Measured, *, force: bool, facts: int | None = None, remedy: str | None = None
) -> dict[str, Any]:
    """What ``check`` says of a measured change: the fields ``guard``, ``forced`` and ``survival`` of docs/format.md.

    Args:
        facts: it may drift as much as so many new facts; None: as those that it brings.
        remedy: what to do about a refusal, where that is not a matter of how facts are written.

    Raises:
        GuardError: a check failed and ``force`` is not set.
    """
    judged = measured if facts is None else replace(measured, facts=facts)
    findings = judge(judged, limits_of(repository))
    if findings and not force:
        raise refusal(findings, remedy)
    return Report(measured, tuple(finding.words for finding in findings), force).to_json()


def refusal(findings: Sequence[Finding], remedy: str | None = None) -> GuardError:
    """The error that says what failed, what the limits are and what to do: ``remedy``, or what helps where facts are written."""
    listed = "; ".join(f"{found.words} ({PREFIX}{found.check} is {found.limit:g})" for found in findings)
    return GuardError(
        f"the guard refused this change: {listed}",
        remedy=f"{remedy or _REMEDIES[findings[0].check]}; --force writes it all the same. Nothing was committed.",
        findings=[asdict(found) for found in findings],
    )


def _ask_model(repository: Repository, found: Prepared, progress: Progress) -> Measured:
    """All checks, with the base loaded for them."""
    from patchhub.models.architectures import describe, read_config
    from patchhub.porcelain.facts import active_requests
    from patchhub.porcelain.guard_model import Budget, from_model
    from patchhub.porcelain.loading import open_base
    from patchhub.porcelain.opened import open_model

    progress.stage("loading the base", 0)
    checkpoint = open_base(repository)
    opened = open_model(repository, checkpoint, describe(read_config(checkpoint.folder)), [], {})
    requests = {request.id: request for request in active_requests(repository, found.commit.added).values()}
    progress.stage("checking", 0)
    measured = from_model(repository, opened, found, list(requests.values()), Budget())
    _warn(measured, progress)
    progress.close()
    return measured


def _warn(measured: Measured, progress: Progress) -> None:
    if measured.first_token:
        facts = "1 subject ends" if measured.first_token == 1 else f"{measured.first_token} subjects end"
        progress.warn(
            f"{facts} at the first token of the prompt, where the keys of all texts are alike: such an edit reaches unrelated "
            "text; put words before the subject"
        )
