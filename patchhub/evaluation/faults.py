"""What does not read right in what a model writes by itself, as it is kept with a commit. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Why = Literal["not said", "runs on", "leak"]


@dataclass(frozen=True)
class Fault:
    """What does not read right.

    Attributes:
        why: the target is not said, its last word or number goes on, or another subject's prompt says it now.
        request: the fact; None of a sibling that is no fact.
        prompt: what was asked.
        target: what a fact was to say, or what a sibling now says.
        continuation: what the model wrote.
    """

    why: Why
    request: str | None
    prompt: str
    target: str
    continuation: str

    def to_json(self) -> dict[str, Any]:
        return {
            "why": self.why,
            "request": self.request,
            "prompt": self.prompt,
            "target": self.target,
            "continuation": self.continuation,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fault:
        whys: dict[str, Why] = {"not said": "not said", "runs on": "runs on", "leak": "leak"}
        request = value["request"]
        texts = (str(value[name]) for name in ("prompt", "target", "continuation"))
        return cls(whys[value["why"]], None if request is None else str(request), *texts)
