"""PMET (Li et al. 2024, "PMET: Precise Model Editing in a Transformer"): its default settings and the edit itself.

Changes of the attention's and of the feed-forward projection's output are optimised together, and only the feed-forward one is
written, as in all published settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from patchhub.editing.facts import encode_facts
from patchhub.editing.metric import MetricCache
from patchhub.editing.record import Edit, Spread, State, key_rows, record
from patchhub.editing.settings import EditSettings, default_layers, inner_width, is_narrow
from patchhub.editing.values import Projections, optimise_values
from patchhub.models.architectures import Architecture
from patchhub.models.tracing import Stack
from patchhub.objects import Request

ROOT_SHARES = Spread("projection", math.sqrt)
"""What is missing at the last layer's feed-forward output, over the root of the number of layers left."""


def default_settings(architecture: Architecture) -> EditSettings:
    """The published settings, with layers and lambda from the model's size (docs/methods.md gives the measurements)."""
    narrow = is_narrow(architecture)
    return EditSettings(
        layers=default_layers(architecture),
        ridge=inner_width(architecture) / 16,
        steps=30,
        learning_rate=0.5 if narrow else 0.2,
        weight_decay=0.5,
        kl_factor=0.25 if narrow else 1.0,
        clamp=8.0 if narrow else 0.75,
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
    """Write ``requests`` on top of the stack's present weights. Arguments as for MEMIT's ``edit``."""
    facts = encode_facts(tokenizer, requests, contexts)
    values = optimise_values(
        Projections(stack, settings.layers[-1]),
        facts,
        settings.values(until_sure=True),
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
        ROOT_SHARES,
        progress=lambda done: progress("layers", done),
    )
    return Edit(recording, values)
