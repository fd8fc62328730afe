"""MEMIT (Meng et al. 2023, "Mass-Editing Memory in a Transformer"): its default settings and the edit itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from patchhub.editing.facts import encode_facts
from patchhub.editing.metric import MetricCache
from patchhub.editing.record import Edit, Spread, State, key_rows, record
from patchhub.editing.settings import EditSettings, default_layers, inner_width, is_narrow
from patchhub.editing.values import BlockOutput, optimise_values
from patchhub.models.architectures import Architecture
from patchhub.models.tracing import Stack
from patchhub.objects import Request

EQUAL_SHARES = Spread("block", lambda left: left)
"""What is missing in the residual stream after the last layer, over the number of layers left (algorithm 1)."""


def default_settings(architecture: Architecture) -> EditSettings:
    """The published settings, with layers and lambda from the model's size (docs/methods.md gives the measurements)."""
    narrow = is_narrow(architecture)
    return EditSettings(
        layers=default_layers(architecture),
        ridge=inner_width(architecture) / 8,
        steps=20,
        learning_rate=1.0 if narrow else 0.5,
        weight_decay=0.5,
        kl_factor=0.0625,
        clamp=2.0 if narrow else 0.75,
    )


def edit(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: EditSettings,
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
    facts = encode_facts(tokenizer, requests, contexts)
    values = optimise_values(
        BlockOutput(stack, settings.layers[-1]),
        facts,
        settings.values(until_sure=False),
        progress=lambda done: progress("values", done),
    )
    recording = record(
        stack,
        settings.layers,
        key_rows([fact.rows for fact in facts]),
        values.targets,
        settings.ridge,
        metric,
        state,
        EQUAL_SHARES,
        progress=lambda done: progress("layers", done),
    )
    return Edit(recording, values)
