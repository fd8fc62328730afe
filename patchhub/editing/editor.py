"""The closed-form editors: MEMIT and PMET as two rows of one editor, which differ in three fields.

MEMIT: Meng et al. 2023, "Mass-Editing Memory in a Transformer". PMET: Li et al. 2024, "PMET: Precise Model Editing in a Transformer".
docs/methods.md maps their symbols to functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase

from patchhub.editing.locate import Encoded, encode_marked, mark, mark_text
from patchhub.editing.metric import MetricCache
from patchhub.editing.record import AS_IT_COMES, Edit, Recording, Running, Spread, State, record
from patchhub.editing.rows import BlockOutput, Fact, FeedForward, Projections, Site, key_rows
from patchhub.editing.settings import NORMED_CLAMP, NORMED_RATE, EditSettings, default_layers, inner_width, is_narrow
from patchhub.editing.values import Part, Values, ValueSettings, optimise_values
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
    follow = [
        (closers.after(request.target_new), closers.behind(request.target_new)) if closers else (None, None)
        for request in requests
    ]
    return [Fact(tuple(rows[i * count : (i + 1) * count]), essence, *follow[i]) for i, essence in enumerate(encoded)]


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
class Asked:
    """What a batch asks besides its requests.

    Attributes:
        keeps: requests that the present weights answer; their columns, after those of the requests, ask for no change.
        also: with facts outside a chat, the chat form in which each prompt is optimised as well, as ``settings.chat_weight`` says; the
            keys are those of the facts' own form.
        openings: what answers in a chat say before their targets, by request id.
        wordings: texts that lead from a subject to its target, by request id, in which the target is optimised as well.
        sentences: what the model says of a subject by itself, by subject, which is to stay as likely as it is.
    """

    keeps: Sequence[Request] = ()
    also: Chat | None = None
    openings: Mapping[str, str] = field(default_factory=dict)
    wordings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sentences: Mapping[str, Encoded] = field(default_factory=dict)


NOTHING_ELSE: Final = Asked()


@dataclass(frozen=True)
class Editor:
    """One way to write facts.

    Attributes:
        default_settings: the published settings, scaled to a model.
        plain: where values are optimised and how they are shared among layers, with nothing or a scale behind the projection.
        normed: the same in a model with norms behind it, in all layers or in some.
        until_sure: PMET's stop rule, see ``ValueSettings``.
    """

    default_settings: Callable[[Architecture], EditSettings]
    plain: Way
    normed: Way
    until_sure: bool

    def way(self, architecture: Architecture) -> Way:
        """How this model is edited."""
        return self.normed if architecture.normed else self.plain

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
        asked: Asked = NOTHING_ELSE,
        failing: Callable[[Recording], Mapping[int, Sequence[str]]] | None = None,
        running: Running = AS_IT_COMES,
    ) -> Edit:
        """Write ``requests`` on top of the stack's present weights.

        Args:
            contexts: templates with one ``{}``; the first is the bare prompt.
            asked: what else is asked.
            failing: the places of the requests that do not read right with a recording on top of the present weights, and for each, form by
                form, what stands between its target and the same target said again at once, or the punctuation behind which it goes on
                ("" where neither is so). With ``settings.repairs``, they are optimised further, there as well, and all is recorded again.
            running: how.

        Raises:
            EditError: the optimisation or the solve is not finite.
        """
        facts, keys = _encoded(stack, tokenizer, requests, contexts, settings, asked)
        chosen, together = settings.values(until_sure=self.until_sure), of_one_subject(requests)
        way = self.way(stack.architecture)
        site, values = way.site(stack, settings.layers), Values.of(len(facts), stack.architecture.d_model)
        pause = bool(failing and settings.repairs)
        _optimise(site, facts, together, chosen, running, values, pause, lambda done: running.progress("values", done))
        unmoved = torch.zeros(len(asked.keeps), stack.architecture.d_model)
        for done in range(settings.repairs + 1):
            running.release()
            recording = record(
                stack,
                settings.layers,
                key_rows(keys),
                torch.cat([values.targets, unmoved]),
                settings.ridge,
                metric,
                state,
                way.spread,
                still=range(len(facts), len(keys)),
                running=running,
            )
            running.release()
            wrong = failing(recording) if failing and done < settings.repairs else {}
            groups = [group for group in together if wrong.keys() & set(group)]
            if not groups:
                break
            for place, gaps in wrong.items():
                facts[place] = _saying_once(tokenizer, requests[place], facts[place], gaps, settings, asked)
            running.progress("further", 0)
            _optimise(site, facts, groups, _further(chosen, done + 1), running, values, pause)
        return Edit(recording, values)

    def optimise(self, stack: Stack, layers: Sequence[int], part: Part, memory: int | None = None) -> Values:
        """The values of one part of the facts of an edit, as `edit` optimises them."""
        return part.optimise(self.way(stack.architecture).site(stack, layers), memory)


def _encoded(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: EditSettings,
    asked: Asked,
) -> tuple[list[Fact], list[tuple[Encoded, ...]]]:
    """The requests as they are optimised, and the texts of requests and keeps whose keys are recorded."""
    limit, chat = context_length(stack.model), settings.chat
    closers = Closers.of(tokenizer, stack.vocabulary) if settings.closing else None
    form: dict[str, Any] = {"openings": asked.openings, "limit": limit}
    facts = encode_facts(tokenizer, requests, contexts, closers=closers, chat=chat, **form)
    kept = encode_facts(tokenizer, asked.keeps, contexts, chat=chat, limit=limit) if asked.keeps else []
    keys = [fact.rows for fact in (*facts, *kept)]
    facts = [_worded(tokenizer, *pair, asked.wordings) for pair in zip(requests, facts, strict=True)]
    for group in of_one_subject(requests):
        facts[group[0]] = replace(facts[group[0]], sentence=asked.sentences.get(requests[group[0]].subject))
    if asked.also is not None:
        others = encode_facts(tokenizer, requests, (SLOT,), chat=asked.also, **form)
        facts = _with_others(facts, others, settings.chat_weight)
    return facts, keys


def _worded(
    tokenizer: PreTrainedTokenizerBase, request: Request, fact: Fact, wordings: Mapping[str, Sequence[str]]
) -> Fact:
    """A fact with a row for each wording of its own."""
    texts = [mark_text("", request.subject, between, request.target_new) for between in wordings.get(request.id, ())]
    return replace(fact, rows=(*fact.rows, *encode_marked(tokenizer, texts)), wordings=len(texts))


def _saying_once(
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    fact: Fact,
    gaps: Sequence[str],
    settings: EditSettings,
    asked: Asked,
) -> Fact:
    """A fact whose bare row of each form goes on to where its target must not be said again, if there is such a place."""
    rows = list(fact.rows)
    for place, chat, gap in zip((0, len(rows) - fact.others), (settings.chat, asked.also), gaps, strict=False):
        if gap:
            opening = asked.openings.get(request.id, "") if chat else ""
            marked = mark(SLOT, request, chat=chat, opening=opening, after=gap)
            rows[place] = encode_marked(tokenizer, [marked], chat=chat)[0]
    return replace(fact, rows=tuple(rows))


def _with_others(facts: Sequence[Fact], others: Sequence[Fact], weight: float) -> list[Fact]:
    """Facts with rows in another form, which weigh so much of their objective."""
    return [
        replace(fact, rows=(*fact.rows, *other.rows), others=len(other.rows), weight=weight)
        for fact, other in zip(facts, others, strict=True)
    ]


def _optimise(
    site: Site,
    facts: Sequence[Fact],
    groups: Sequence[Sequence[int]],
    settings: ValueSettings,
    running: Running,
    values: Values,
    pause: bool,
    progress: Callable[[int], None] = lambda facts: None,
) -> None:
    """Optimise the values of some groups of facts, from where they were paused, and put them in their places among those of all."""
    places, numbers = [place for group in groups for place in group], iter(range(len(facts)))
    begun = {number: values.paused[place] for number, place in enumerate(places) if place in values.paused}
    found = optimise_values(
        site,
        [facts[place] for place in places],
        settings,
        together=[[next(numbers) for _ in group] for group in groups],
        begun=begun if pause else None,
        memory=running.memory,
        kept=running.kept(settings) if running.kept else None,
        elsewhere=running.elsewhere,
        progress=progress,
    )
    for number, place in enumerate(places):
        values.take(place, found, number)


def _further(settings: ValueSettings, times: int) -> ValueSettings:
    """Those of facts that did not read right so many times: half of the steps more each time, and a loss that is lower than they had."""
    return replace(
        settings, stop_loss=settings.stop_loss * _FURTHER, steps=settings.steps + times * settings.steps // 2
    )


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
        ridge=inner_width(architecture) / (8 if narrow or architecture.normed else 2),
        steps=20,
        learning_rate=1.0 if narrow else 0.5,
        weight_decay=0.5,
        kl_factor=0.0625,
        clamp=2.0 if narrow else 1.0,
        closing=0.5,
        opening=1.0,
        chat_weight=0.5,
        repairs=2,
    )
    return _behind_a_norm(settings) if architecture.normed else settings


def _behind_a_norm(settings: EditSettings) -> EditSettings:
    return replace(settings, learning_rate=NORMED_RATE, clamp=NORMED_CLAMP)


MEMIT = Editor(memit_settings, Way(BlockOutput, EQUAL_SHARES), Way(FeedForward, REPLAYED), until_sure=False)


def pmet_settings(architecture: Architecture) -> EditSettings:
    """The published settings, with layers and lambda from the model's size (docs/methods.md gives the measurements)."""
    narrow = is_narrow(architecture)
    own = 8.0 if architecture.site is None else 2.0  # in a mixture of experts it is relative to the stream, as MEMIT's
    settings = EditSettings(
        layers=default_layers(architecture),
        ridge=inner_width(architecture) / (16 if narrow or architecture.normed else 4),
        steps=30,
        learning_rate=0.5 if narrow else 0.2,
        weight_decay=0.5,
        kl_factor=0.25 if narrow else 1.0,
        clamp=own if narrow else 0.75,
        closing=0.5,
        opening=1.0,
        chat_weight=0.5,
        repairs=2,
    )
    return _behind_a_norm(settings) if architecture.normed else settings


PMET = Editor(
    pmet_settings, Way(Projections, ROOT_SHARES), Way(Projections, replace(ROOT_SHARES, length=0.75)), until_sure=True
)


EDITORS: Mapping[str, Editor] = {"memit": MEMIT, "pmet": PMET}
