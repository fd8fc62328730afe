"""A closed-form editor: what MEMIT and PMET have in common, with the three things in which they differ as fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from patchhub.editing.facts import encode_facts
from patchhub.editing.kept_values import KeptValues
from patchhub.editing.key_rows import key_rows
from patchhub.editing.lengths import context_length
from patchhub.editing.metric import MetricCache
from patchhub.editing.record import Edit, Spread, State, record
from patchhub.editing.settings import EditSettings
from patchhub.editing.sites import Site
from patchhub.editing.values import ValueSettings, optimise_values
from patchhub.models.architectures import Architecture
from patchhub.models.tracing import Stack
from patchhub.objects import Request


@dataclass(frozen=True)
class Editor:
    """One way to write facts.

    Attributes:
        default_settings: the published settings, scaled to a model.
        site: where in the last edited layer values are optimised.
        spread: how what is missing there is shared among the layers.
        until_sure: PMET's stop rule, see ``ValueSettings``.
    """

    default_settings: Callable[[Architecture], EditSettings]
    site: Callable[[Stack, int], Site]
    spread: Spread
    until_sure: bool

    def edit(
        self,
        stack: Stack,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        contexts: Sequence[str],
        settings: EditSettings,
        metric: MetricCache,
        state: State,
        *,
        memory: int | None = None,
        kept: Callable[[ValueSettings], KeptValues] | None = None,
        progress: Callable[[str, int], None] = lambda stage, done: None,
    ) -> Edit:
        """Write ``requests`` on top of the stack's present weights.

        Args:
            contexts: templates with one ``{}``; the first is the bare prompt.
            memory: bytes that the process may hold, its model included; None: half of what is free may be taken besides.
            kept: where the values of these settings are kept, so that an interrupted edit goes on.
            progress: called with "values" and a number of requests, or "layers" and a number of layers.

        Raises:
            EditError: the optimisation or the solve is not finite.
        """
        limit = context_length(stack.model)
        facts = encode_facts(tokenizer, requests, contexts, chat=settings.chat, limit=limit)
        chosen = settings.values(until_sure=self.until_sure)
        values = optimise_values(
            self.site(stack, settings.layers[-1]),
            facts,
            chosen,
            memory=memory,
            kept=kept(chosen) if kept else None,
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
            self.spread,
            memory=memory,
            progress=lambda done: progress("layers", done),
        )
        return Edit(recording, values)
