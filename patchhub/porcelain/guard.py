"""The guard: what a finished change must show before its commit is written (docs/guard.md). No torch unless the model is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, Final

from patchhub.errors import GuardError
from patchhub.evaluation.guard import Finding, Limits, Measured, Report, judge
from patchhub.store.repository import Repository

if TYPE_CHECKING:
    pass

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
