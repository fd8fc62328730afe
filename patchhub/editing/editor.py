"""The closed-form editors: MEMIT and PMET as two rows of one editor, which differ in three fields.

MEMIT: Meng et al. 2023, "Mass-Editing Memory in a Transformer". PMET: Li et al. 2024, "PMET: Precise Model Editing in a Transformer".
docs/methods.md maps their symbols to functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase

from patchhub.editing.budget import release_memory
from patchhub.editing.locate import encode_marked, mark, mark_text
from patchhub.editing.metric import MetricCache
from patchhub.editing.record import Edit, Recording, Spread, State, record
from patchhub.editing.rows import BlockOutput, FeedForward, Projections, Site, key_rows
from patchhub.editing.settings import NORMED_CLAMP, NORMED_RATE, EditSettings, default_layers, inner_width, is_narrow
from patchhub.editing.values import Fact, KeptValues, Values, ValueSettings, optimise_values
from patchhub.models.architectures import Architecture
from patchhub.models.tracing import Stack
from patchhub.objects import SLOT, Request
from patchhub.text.tokens import Chat, Closers, check_lengths, context_length

NOTHING_SAID: Final[Mapping[str, str]] = {}
"""No answer has words of its own before its target."""

_FURTHER: Final = 0.2  # of the loss below which a fact is finished, where it does not read right yet (docs/methods.md)
_ESSENCE = " is a"  # the KL prompt is "{subject} is a" in the published code of both editors


def encode_facts(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Sequence[str],
    *,
    closers: Closers | None = None,
    chat: Chat | None = None,
    openings: Mapping[str, str] = NOTHING_SAID,
    limit: int | None = None,
) -> list[Fact]:
    """Every request in every context (templates with one ``{}``; the first is the bare prompt), in two tokenizer calls.

    Args:
        closers: the tokens that may follow a target; None: what follows it is not optimised.
        chat: put each of these texts, and the prompt of the KL term, into a chat as the user's message.
        openings: in a chat, what the answer to a request says before its target, by request id.
        limit: refuse texts of more tokens, before any of them is given to the model; None: any length will do.

    Raises:
        RequestError: a text is longer than ``limit``, or a subject or target has no token of its own.
    """
    pairs = [(context, request) for request in requests for context in contexts]
    marked = [mark(context, request, chat=chat, opening=openings.get(request.id, "")) for context, request in pairs]
    rows = encode_marked(tokenizer, marked, chat=chat)
    essences = [mark_text("", request.subject, _ESSENCE, chat=chat) for request in requests]
    count = len(contexts)
    encoded = encode_marked(tokenizer, essences, chat=chat)
    if limit is not None:
        texts = [request.text + " " + request.target_new for _, request in pairs]
        check_lengths(zip(texts, (len(row.input_ids) for row in rows), strict=True), limit)
        subjects = [request.subject + _ESSENCE for request in requests]
        check_lengths(zip(subjects, (len(text.input_ids) for text in encoded), strict=True), limit)
    return [
        Fact(tuple(rows[i * count : (i + 1) * count]), essence, closers.after(request.target_new) if closers else None)
        for i, (request, essence) in enumerate(zip(requests, encoded, strict=True))
    ]


def of_one_subject(requests: Sequence[Request]) -> list[list[int]]:
    """The places of the requests in groups of one subject, in order of their first."""
    groups: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.subject, []).append(place)
    return list(groups.values())


@dataclass(frozen=True)
class Way:
    """Where values are optimised, and how what they ask for is shared among the edited layers."""

    place: Callable[[Stack, int], Site]
    spread: Spread

    def layer(self, layers: Sequence[int]) -> int:
        """The edited layer at which values are optimised: the first where the others' are replayed from it, else the last."""
        return layers[0] if self.spread.measured == "replay" else layers[-1]

    def site(self, stack: Stack, layers: Sequence[int]) -> Site:
        """Where values are optimised."""
        return self.place(stack, self.layer(layers))


@dataclass(frozen=True)
class Editor:
    """One way to write facts.

    Attributes:
        default_settings: the published settings, scaled to a model.
        plain: where values are optimised and how they are shared among layers, with nothing or a scale behind the projection.
        normed: the same with a norm behind it.
        until_sure: PMET's stop rule, see ``ValueSettings``.
    """

    default_settings: Callable[[Architecture], EditSettings]
    plain: Way
    normed: Way
    until_sure: bool

    def way(self, architecture: Architecture) -> Way:
        """How this model is edited."""
        return self.plain if architecture.norm is None else self.normed

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
        keeps: Sequence[Request] = (),
        openings: Mapping[str, str] = NOTHING_SAID,
        also: Chat | None = None,
        failing: Callable[[Recording], Sequence[int]] | None = None,
        memory: int | None = None,
        kept: Callable[[ValueSettings], KeptValues] | None = None,
        progress: Callable[[str, int], None] = lambda stage, done: None,
    ) -> Edit:
        """Write ``requests`` on top of the stack's present weights.

        Args:
            contexts: templates with one ``{}``; the first is the bare prompt.
            keeps: requests that the present weights answer; their columns, after those of ``requests``, ask for no change.
            openings: as in `encode_facts`.
            also: with facts outside a chat, the chat form in which each prompt is optimised as well, as ``settings.chat_weight`` says; the
                keys are those of the facts' own form.
            failing: the places of the requests that do not read right with a recording on top of the present weights. With
                ``settings.repairs``, they are optimised further and all is recorded again.
            memory: bytes that the process may hold, its model included; None: half of what is free may be taken besides.
            kept: where the values of these settings are kept, so that an interrupted edit goes on.
            progress: called with "values" and a number of requests, or "layers" and a number of layers.

        Raises:
            EditError: the optimisation or the solve is not finite.
        """
        limit = context_length(stack.model)
        closers = Closers.of(tokenizer, stack.vocabulary) if settings.closing else None
        form: dict[str, Any] = {"openings": openings, "limit": limit}
        facts = encode_facts(tokenizer, requests, contexts, closers=closers, chat=settings.chat, **form)
        texts = [fact.rows for fact in facts]
        if also is not None:
            others = encode_facts(tokenizer, requests, (SLOT,), chat=also, **form)
            facts = _with_others(facts, others, settings.chat_weight)
        together = of_one_subject(requests)
        chosen, way = settings.values(until_sure=self.until_sure), self.way(stack.architecture)
        site = way.site(stack, settings.layers)
        values = optimise_values(
            site,
            facts,
            chosen,
            together=together,
            memory=memory,
            kept=kept(chosen) if kept else None,
            progress=lambda done: progress("values", done),
        )
        if keeps:
            texts += [fact.rows for fact in encode_facts(tokenizer, keeps, contexts, chat=settings.chat, limit=limit)]
        rows, still = key_rows(texts), range(len(facts), len(texts))
        further = replace(chosen, stop_loss=chosen.stop_loss * _FURTHER, steps=2 * chosen.steps)
        for left in range(settings.repairs, -1, -1):
            if memory is not None:
                release_memory()  # what optimising and asking left in pieces would come on top
            recording = record(
                stack,
                settings.layers,
                rows,
                torch.cat([values.targets, torch.zeros(len(keeps), values.targets.shape[1])]),
                settings.ridge,
                metric,
                state,
                way.spread,
                still=still,
                memory=memory,
                progress=lambda done: progress("layers", done),
            )
            if memory is not None:
                release_memory()
            wrong = set(failing(recording)) if failing and left else set()
            groups = [group for group in together if wrong.intersection(group)]
            if not groups:
                break
            _optimise_further(site, facts, groups, further, values, memory)
        return Edit(recording, values)


def _with_others(facts: Sequence[Fact], others: Sequence[Fact], weight: float) -> list[Fact]:
    """Facts with rows in another form, which weigh so much of their objective."""
    return [
        replace(fact, rows=(*fact.rows, *other.rows), others=len(other.rows), weight=weight)
        for fact, other in zip(facts, others, strict=True)
    ]


def _optimise_further(
    site: Site,
    facts: Sequence[Fact],
    groups: Sequence[Sequence[int]],
    settings: ValueSettings,
    values: Values,
    memory: int | None,
) -> None:
    """Replace the values of some groups of facts by such as are optimised with other settings."""
    places = [place for group in groups for place in group]
    start, inner = 0, []
    for group in groups:
        inner.append(range(start, start + len(group)))
        start += len(group)
    found = optimise_values(site, [facts[place] for place in places], settings, together=inner, memory=memory)
    for number, place in enumerate(places):
        values.put(place, found.at(number))


EQUAL_SHARES = Spread("block", lambda left: left)
"""What is missing in the residual stream after the last layer, over the number of layers left (algorithm 1)."""

ROOT_SHARES = Spread("projection", math.sqrt)
"""What is missing at the last layer's feed-forward output, over the root of the number of layers left."""

REPLAYED = Spread("replay", lambda left: 1.0, length=0.75)
"""What each layer gives when the whole change is made at the first one (Forward replay, arXiv 2605.00358)."""


def memit_settings(architecture: Architecture) -> EditSettings:
    """The published settings, with layers and lambda from the model's size (docs/methods.md gives the measurements)."""
    narrow = is_narrow(architecture)
    settings = EditSettings(
        layers=default_layers(architecture),
        ridge=inner_width(architecture) / 8,
        steps=20,
        learning_rate=1.0 if narrow else 0.5,
        weight_decay=0.5,
        kl_factor=0.0625,
        clamp=2.0 if narrow else 0.75,
        closing=0.5,
        opening=1.0,
        chat_weight=0.5,
        repairs=2,
    )
    return settings if architecture.norm is None else _behind_a_norm(settings)


def _behind_a_norm(settings: EditSettings) -> EditSettings:
    return replace(settings, learning_rate=NORMED_RATE, clamp=NORMED_CLAMP)


MEMIT = Editor(memit_settings, Way(BlockOutput, EQUAL_SHARES), Way(FeedForward, REPLAYED), until_sure=False)


def pmet_settings(architecture: Architecture) -> EditSettings:
    """The published settings, with layers and lambda from the model's size (docs/methods.md gives the measurements)."""
    narrow = is_narrow(architecture)
    settings = EditSettings(
        layers=default_layers(architecture),
        ridge=inner_width(architecture) / 16,
        steps=30,
        learning_rate=0.5 if narrow else 0.2,
        weight_decay=0.5,
        kl_factor=0.25 if narrow else 1.0,
        clamp=8.0 if narrow else 0.75,
        closing=0.5,
        opening=1.0,
        chat_weight=0.5,
        repairs=2,
    )
    return settings if architecture.norm is None else _behind_a_norm(settings)


PMET = Editor(
    pmet_settings, Way(Projections, ROOT_SHARES), Way(Projections, replace(ROOT_SHARES, length=0.75)), until_sure=True
)


EDITORS: Mapping[str, Editor] = {"memit": MEMIT, "pmet": PMET}
