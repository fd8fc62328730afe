"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer"): settings, their default rule, and the edit itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from patchhub.editing.locate import Marked, encode_marked, encode_prompts
from patchhub.editing.metric import MetricCache
from patchhub.editing.record import Recording, State, key_rows, record
from patchhub.editing.values import BlockOutput, Fact, Values, ValueSettings, optimise_values
from patchhub.errors import SettingsError
from patchhub.models.architectures import Architecture
from patchhub.models.tracing import Stack
from patchhub.objects import Request

_ESSENCE = " is a"  # the KL prompt is "{subject} is a" in the published code


@dataclass(frozen=True)
class MemitSettings:
    """Everything that a MEMIT edit depends on besides the model, the metric and the contexts.

    Args:
        layers: edited blocks, ascending; z is optimised at the output of the last.
        ridge: lambda, the weight of the preserved keys against one request.
        steps, learning_rate, weight_decay, kl_factor, clamp, stop_loss: see ``editing.values``.
    """

    layers: tuple[int, ...]
    ridge: float
    steps: int = 20
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 0.75
    stop_loss: float = 0.05

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise SettingsError(
                f"layers {list(self.layers)} are not ascending block numbers", remedy="For example 3,4,5."
            )
        for name in ("ridge", "steps", "learning_rate", "clamp"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be above 0, not {getattr(self, name)}", remedy=f"Set {name} > 0.")

    @property
    def values(self) -> ValueSettings:
        return ValueSettings(
            self.steps, self.learning_rate, self.weight_decay, self.kl_factor, self.clamp, self.stop_loss
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


def default_settings(architecture: Architecture, inner: int) -> MemitSettings:
    """The default rule, from depth L and the FFN's inner width alone (docs/methods.md gives the measurements behind it).

    Layers round(L/8) to max(round(L/4), round(L/8) + 2); lambda = inner / 8; learning rate and clamp for narrow models,
    whose hidden states are small against what an edit needs.
    """
    depth = architecture.n_layers
    first = round(depth / 8)
    last = min(max(round(depth / 4), first + 2), depth - 2)
    narrow = architecture.d_model < 1024
    return MemitSettings(
        layers=tuple(range(min(first, last), last + 1)),
        ridge=inner / 8,
        learning_rate=1.0 if narrow else 0.5,
        clamp=2.0 if narrow else 0.75,
    )


@dataclass(frozen=True, eq=False)
class Edit:
    """What the editor made: columns and change per weight, and z (n, d)."""

    recording: Recording
    values: Values


def edit(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: MemitSettings,
    metric: MetricCache,
    state: State,
    *,
    progress: Callable[[str, int], None] = lambda stage, done: None,
) -> Edit:
    """Write ``requests`` on top of the stack's present weights.

    Args:
        contexts: templates with one ``{}``; the first is the bare prompt.
        progress: called with "values" and a number of requests, or "layers" and a number of layers.
    """
    last = settings.layers[-1]
    facts = [
        Fact(tuple(rows), essence)
        for rows, essence in zip(
            _in_contexts(tokenizer, requests, contexts),
            encode_marked(tokenizer, [_essence(request.subject) for request in requests]),
            strict=True,
        )
    ]
    values = optimise_values(
        BlockOutput(stack, last), facts, settings.values, progress=lambda done: progress("values", done)
    )
    rows = key_rows([fact.rows for fact in facts])
    recording = record(
        stack,
        settings.layers,
        rows,
        values.targets,
        settings.ridge,
        metric,
        state,
        progress=lambda done: progress("layers", done),
    )
    return Edit(recording, values)


def _in_contexts(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], contexts: Sequence[str]
) -> list[list[Any]]:
    encoded = encode_prompts(tokenizer, [(context, request) for request in requests for context in contexts])
    return [encoded[start : start + len(contexts)] for start in range(0, len(encoded), len(contexts))]


def _essence(subject: str) -> Marked:
    text = subject + _ESSENCE
    return Marked(text, (0, len(subject)), len(text))
