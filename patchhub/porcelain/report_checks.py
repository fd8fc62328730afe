"""What a commit's `check` says. Commits come from other stores too, so whatever has another form is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

SHARES: Final = ("own", "earlier", "crushed")
"""The guard's counts of facts, each {"count", "of"}; see docs/guard.md."""

NORMS: Final = ("base", "change", "state")


def norms(check: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Per weight the norm of its "state" or "change" over that of the base's weight, to four digits."""
    return {
        weight: float(f"{found[kind] / (found['base'] or 1.0):.4g}")
        for weight, found in _mappings(check.get("norms"))
        if _is_number(found.get(kind)) and _is_number(found.get("base"))
    }


def base_norms(check: Mapping[str, Any]) -> dict[str, float]:
    """The norm of the base's weight for each weight that was measured."""
    return {weight: found["base"] for weight, found in _mappings(check.get("norms")) if _is_number(found.get("base"))}


def measured_norms(check: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per weight the norms "base", "change" and "state" as they were measured, of weights that have all three."""
    return {
        weight: {kind: float(found[kind]) for kind in NORMS}
        for weight, found in _mappings(check.get("norms"))
        if all(_is_number(found.get(kind)) for kind in NORMS)
    }


def numbers(check: Mapping[str, Any], name: str) -> list[float]:
    """The number of each weight under a name, such as "proof" or "survival"."""
    found = check.get(name)
    return [value for value in found.values() if _is_number(value)] if isinstance(found, Mapping) else []


def guard(check: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the guard measured: counts as [count, of], growth of the drift in nats per token, perplexity over the base's, the largest
    ratio of the state's largest singular value to the base weight's, what failed in words, and whether that was overruled."""
    found = check.get("guard")
    if not isinstance(found, Mapping):
        return None
    drift = dict(_mappings(found)).get("drift", {})
    growth = [drift.get("kl"), drift.get("kl_before", 0.0)]
    ratio = drift.get("perplexity_ratio")
    failed = found.get("failed")
    return {
        **{name: _share(found.get(name)) for name in SHARES},
        "drift": growth[0] - growth[1] if all(map(_is_number, growth)) else None,
        "perplexity_ratio": ratio if _is_number(ratio) else None,
        "stretch": max(_ratios(found.get("spectrum")), default=None),
        "failed": [str(words) for words in failed] if isinstance(failed, list) else [],
        "forced": check.get("forced") is True,
    }


def _ratios(spectrum: Any) -> Iterator[float]:
    for _, values in _mappings(spectrum):
        if _is_number(values.get("state")) and _is_number(values.get("base")):
            yield values["state"] / (values["base"] or 1.0)


def _share(value: Any) -> list[int] | None:
    if not isinstance(value, Mapping):
        return None
    parts = [part for part in (value.get("count"), value.get("of")) if type(part) is int]
    return parts if len(parts) == 2 and parts[1] else None


def _mappings(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries of a mapping that are mappings themselves."""
    for name, found in value.items() if isinstance(value, Mapping) else ():
        if isinstance(found, Mapping):
            yield name, found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
