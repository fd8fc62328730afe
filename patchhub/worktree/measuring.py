"""Measuring revisions: what is asked of a model, and one model in memory that is switched from state to state to answer it.

Raw results are kept by the state that was measured and the item that was asked. Losing them costs time only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchhub.cache import Cache, Kind
from patchhub.canonical import canonical_json, object_id
from patchhub.editing.locate import encode_targets
from patchhub.evaluation import metrics, suites
from patchhub.evaluation.live import LiveReading, continue_within, live_prompts, room_after, sample_continuations
from patchhub.evaluation.metrics import DocumentDrift, TargetScore, TextReading, score_targets
from patchhub.evaluation.suites import FactReading, Sibling, negated, siblings_of
from patchhub.models.architectures import read_config
from patchhub.models.placement import Placement, chosen_dtype, name_of
from patchhub.objects import Metric, Request, Text
from patchhub.progress import Progress
from patchhub.sets.elements import openings_of
from patchhub.store.store import Store
from patchhub.text.tokens import Chat, load_tokenizer
from patchhub.worktree.metric import held_documents, read_documents
from patchhub.worktree.metric import kept_held_documents as kept_documents
from patchhub.worktree.opening import Worktree, base_files, chat_form, check_base, open_worktree, placement_of, state_at
from patchhub.worktree.workers import Machines, Opened, Opening, Workers, machines_of, refuse_without_ray

KIND: Final = Kind("scores", ".json")


def state_key(**inputs: Any) -> str:
    """The identity of a measured model: of its base, changes, type, tokenizer and whatever else decides what it says."""
    return object_id(canonical_json({**inputs, "version": KIND.version}))


def item_key(kind: str, **inputs: Any) -> str:
    """The identity of one question to a model, with every setting that the answer depends on."""
    return object_id(canonical_json({**inputs, "kind": kind}))


class StateResults(Mapping[str, Any]):
    """Results of one state by item key, as JSON values, an entry of the cache for each time that some were found."""

    def __init__(self, cache: Cache, state: str) -> None:
        self._slot = cache.slot(KIND, state=state)
        self._known: dict[str, Any] = {}
        for found in self._slot.contents():
            self._known.update(json.loads(found))

    def __getitem__(self, item: str) -> Any:
        return self._known[item]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def keep(self, found: Mapping[str, Any]) -> None:
        """Add results."""
        if found:
            self._known.update(found)
            self._slot.keep([json.dumps(found, separators=(",", ":")).encode()])


Tokens = tuple[int, ...]

CONTEXTS: Final = ("It had rained all morning, and when we came home the house was quiet. {}",)
"""What stands before the prompt in live decoding, on purpose none of the contexts that the editors optimise in."""
NEW_TOKENS: Final = 20
"""Tokens that live decoding writes; more where a target is longer."""
SHORT_TOKENS: Final = 8
"""Tokens that are written after prompts of which only the beginning of the answer is judged; a multiple where a target is longer."""
FLUENCY_FACTS: Final = 100
FLUENCY_TOKENS: Final = 100
FLUENCY_TOP_K: Final = 5
BASE: Final = "base"

_KEPT_AT_ONCE: Final = 256
"""How many answers are found before they are kept: an interrupted evaluation goes on there, and a bar moves."""


Ask = Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[Any]], list[Any]]
"""Asks a model and gives a JSON value for each item: a module-level function with `functools.partial`, which workers are sent."""


@dataclass(frozen=True)
class Questions:
    """What is asked of every state.

    Attributes:
        requests: the facts.
        seed: of sampled text.
        text: files to measure drift on; none: the text that the repository keeps aside, or samples.
        contexts: templates with one `{}` that live decoding puts the prompt into, beside the bare prompt.
        fluency_facts: text is sampled after the prompts of that many facts.
    """

    requests: tuple[Request, ...]
    seed: int = 0
    text: tuple[Path, ...] = ()
    contexts: tuple[str, ...] = CONTEXTS
    fluency_facts: int = FLUENCY_FACTS


@dataclass(frozen=True)
class Measured:
    """What a state answered.

    Attributes:
        facts, live: one per request.
        texts: prompt and sampled continuation of the first facts, None for the others.
        documents: per document, how far it is from the base.
    """

    facts: tuple[FactReading, ...]
    live: tuple[LiveReading, ...]
    texts: tuple[str | None, ...]
    documents: tuple[DocumentDrift, ...]


class Measurer:
    """Answers questions for one revision after another; see `measure`.

    Args:
        placement: on which device, in which type or quantisation the model runs; None: as the repository's config says.
        workers: how many processes answer what is asked; None: this one, or as many as ``on`` has room for. The answers are the same.
        on: the address of the Ray cluster that has them; None: this machine.
        chat: ask the facts' prompts, contexts and neighbours in the base's chat form; None: as the repository's config says. Text is
            sampled and drift is measured outside it.

    Raises:
        SettingsError: the base has no chat template that can be used, under ``chat``.
        BaseError: the base is not where it was.
    """

    def __init__(
        self,
        repository: Store,
        questions: Questions,
        progress: Progress,
        *,
        placement: Placement | None = None,
        chat: bool | None = None,
        workers: int | None = None,
        on: str | None = None,
    ) -> None:
        if on is not None:
            refuse_without_ray()
        self.repository, self.questions, self.progress = repository, questions, progress
        self._elsewhere = workers, on
        self._machines: Machines | None = None
        self._workers: tuple[str, Workers] | None = None
        self._files, self._placement = base_files(repository), placement or placement_of(repository)
        check_base(repository, self._files.checkpoint)
        self.dtype = chosen_dtype(self._files.checkpoint, self._placement)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self._files.checkpoint)
        self.chat, self._in_chat = chat_form(repository, self.tokenizer, chat), chat
        self._open: tuple[str, Worktree] | None = None
        self._base_text: TextReading | None = None
        self._tokenizer_id = object_id(self.tokenizer.backend_tokenizer.to_str().encode("utf-8"))
        longest = _longest_target(self.tokenizer, questions.requests, self.chat)
        self.new_tokens = max(NEW_TOKENS, 1 + longest)
        self.siblings: list[list[Sibling]] = siblings_of(questions.requests)
        self._short_tokens = self.new_tokens if self.chat else SHORT_TOKENS * (1 + longest // SHORT_TOKENS)

    @property
    def running(self) -> dict[str, Any]:
        """How models run here, as far as it changes what they say."""
        settings = self.repository.config.settings
        return {
            "dtype": name_of(self.dtype),
            "quantization": self._placement.quantization,
            "routing": {name: value for name, value in settings.items() if name.startswith("wise.")},
        }

    @property
    def asking(self) -> dict[str, Any]:
        """The chat form in which facts are asked; nothing where they are asked as they are, as in all that was kept before."""
        return {} if self.chat is None else {"chat": self.chat.to_json()}

    def measure(self, revision: str, *, behind: str | None = None) -> Measured:
        """What a revision answers.

        Args:
            behind: in a chat, facts are read behind the openings with which this revision holds them; None: the same revision.

        Raises:
            RevisionError: no such revision.
            BaseError: the base is not where it was, or is another model now.
            EditError: the model's logits are not numbers.
        """
        results = StateResults(self.repository.cache, self._state_key(revision))
        return Measured(
            facts=tuple(self._facts(revision, results, self._openings(revision if behind is None else behind))),
            live=tuple(self._live(revision, results)),
            texts=tuple(self._texts(revision, results)),
            documents=tuple(self._drift(revision, results)),
        )

    # --- the four kinds of question ---------------------------------------------------------------------------------

    def _openings(self, revision: str) -> dict[str, str]:
        """What answers in a chat say before their targets, of the facts that a revision holds, by request id."""
        if self.chat is None:
            return {}
        elements = self.repository.active(self.repository.resolve(revision))
        return openings_of(self.repository, [(patch, request) for patch, request in elements if request is not None])

    def _facts(self, revision: str, results: StateResults, openings: Mapping[str, str]) -> list[FactReading]:
        requests = self.questions.requests
        items = [
            (prompt, target, opening)
            for request in requests
            for (prompt, target), opening in zip(
                suites.counterfact_items(request),
                suites.openings_at(request, openings.get(request.id, "")),
                strict=True,
            )
        ]

        def key(item: tuple[str, str, str]) -> str:
            behind = {"opening": item[2]} if item[2] else {}  # without one the key is what it always was
            return item_key("target", prompt=item[0], target=item[1], **behind, **self.asking)

        label, ask = f"reading {_short(revision)}", partial(_scores, self.chat)
        found = self._answers(label, revision, results, items, key, ask)
        scores = (TargetScore(tuple(tokens), logprob, tuple(argmax)) for tokens, logprob, argmax in found)
        return suites.readings(requests, scores)

    def _live(self, revision: str, results: StateResults) -> list[LiveReading]:
        """What is written after every request's prompts, and after those of its siblings, of which the beginning is enough."""
        requests, contexts = self.questions.requests, self.questions.contexts
        own = [live_prompts(request, contexts) for request in requests]
        whole = [
            prompt
            for request, prompts in zip(requests, own, strict=True)
            for prompt in (*prompts, *request.paraphrases)
        ]
        denied = [negated(request.text) for request in requests]
        near = [sibling.prompt for siblings in self.siblings for sibling in siblings]
        short = [*near, *(prompt for prompt in denied if prompt is not None)]
        label = f"live decoding {_short(revision)}"
        written = self._continuations(label, revision, results, whole, self.new_tokens)
        begun = self._continuations(label, revision, results, short, self._short_tokens)
        return [
            LiveReading(
                request.id,
                request.target_new,
                tuple(written[prompt] for prompt in prompts),
                tuple(written[prompt] for prompt in request.paraphrases),
                None if denial is None else begun[denial],
                tuple((sibling, begun[sibling.prompt]) for sibling in siblings),
            )
            for request, prompts, denial, siblings in zip(requests, own, denied, self.siblings, strict=True)
        ]

    def _continuations(
        self, label: str, revision: str, results: StateResults, prompts: Sequence[str], new_tokens: int
    ) -> dict[str, str | None]:
        """What a revision writes after each prompt; None where there is no room for so many tokens."""
        unique = list(dict.fromkeys(prompts))

        def key(prompt: str) -> str:
            return item_key("greedy", prompt=prompt, new_tokens=new_tokens, **self.asking)

        ask = partial(_continued, self.chat, new_tokens)
        return dict(zip(unique, self._answers(label, revision, results, unique, key, ask), strict=True))

    def _texts(self, revision: str, results: StateResults) -> list[str | None]:
        asked = [request.text for request in self.questions.requests[: self.questions.fluency_facts]]
        settings = {"seed": self.questions.seed, "total_tokens": FLUENCY_TOKENS, "top_k": FLUENCY_TOP_K}

        def key(prompt: str) -> str:
            return item_key("sampled", prompt=prompt, **settings)

        label, ask = f"sampling text {_short(revision)}", partial(_sampled, settings)
        found = self._answers(label, revision, results, asked, key, ask)
        texts = [prompt + written if written else None for prompt, written in zip(asked, found, strict=True)]
        return texts + [None] * (len(self.questions.requests) - len(texts))

    def _drift(self, revision: str, results: StateResults) -> list[DocumentDrift]:
        digest = Text(self.documents).id

        key = item_key("drift", text=digest)
        if key not in results:
            self.progress.stage(f"drift {_short(revision)}", 0)
            if self._base_text is None:
                self._base_text = metrics.read_text(self._model(BASE), self.documents)
            parts = metrics.document_drifts(self._model(revision), self._base_text)
            results.keep({key: [[part.growth, part.divergence, part.positions] for part in parts]})
        found = results[key]
        return [DocumentDrift(growth, divergence, positions) for growth, divergence, positions in found]

    # --- the model and its cache ------------------------------------------------------------------------------------

    def _answers(
        self,
        label: str,
        revision: str,
        results: StateResults,
        items: Sequence[Any],
        key: Callable[[Any], str],
        ask: Ask,
    ) -> list[Any]:
        """A revision's answer to each item: those that are known, and those that `ask` finds now, which are kept."""
        keys = [key(item) for item in items]
        missing = {name: item for name, item in zip(keys, items, strict=True) if name not in results}
        if missing:
            self.progress.stage(label, len(missing) if len(missing) > 1 else 0)
            names = list(missing)
            parts = [names[begin : begin + _KEPT_AT_ONCE] for begin in range(0, len(names), _KEPT_AT_ONCE)]
            asked = [[missing[name] for name in part] for part in parts]
            for number, found in self._asked(revision, asked, ask):
                results.keep(dict(zip(parts[number], found, strict=True)))
                self.progress.advance(len(found))
        return [results[name] for name in keys]

    def _asked(self, revision: str, parts: Sequence[list[Any]], ask: Ask) -> Iterator[tuple[int, list[Any]]]:
        """The place of each part and what was answered, by the workers where there is more than one. The parts are the same either way."""
        if self._elsewhere == (None, None) or len(parts) == 1:
            for number, part in enumerate(parts):
                yield number, ask(self._model(revision), self.tokenizer, part)
        else:
            yield from self._workers_at(revision).map([partial(_answered, ask, part) for part in parts])

    def _workers_at(self, revision: str) -> Workers:
        """The workers, in the state of a revision."""
        if self._workers is None or self._workers[0] != revision:
            opening = Opening.of(self.at(revision), asked=True)
            if self._workers is not None:
                workers = self._workers[1]
                workers.move(opening)
            else:
                self._machines = machines_of(*self._elsewhere)
                workers = Workers(self._machines, opening, self.progress)
            self._workers = revision, workers
        return self._workers[1]

    def close(self) -> None:
        """Stop the workers, if there are any."""
        if self._workers is not None:
            self._workers[1].close()
            self._workers = None
        if self._machines is not None:
            self._machines.close()
            self._machines = None

    def _model(self, revision: str) -> PreTrainedModel:
        """The model in the state of a revision."""
        model: PreTrainedModel = self.at(revision).model
        return model

    def at(self, revision: str) -> Worktree:
        """The model in the state of a revision, with its tokenizer and blocks."""
        if self._open is None:
            state = state_at(self.repository, revision)
            self._open = (
                revision,
                open_worktree(
                    self.repository,
                    self.progress,
                    state,
                    base=self._files,
                    placement=self._placement,
                    chat=self._in_chat,
                ),
            )
        present, tree = self._open
        if present != revision:
            tree = tree.moved(state_at(self.repository, revision))
            self._open = revision, tree
        return tree

    def _state_key(self, revision: str) -> str:
        commit = self.repository.resolve(revision)
        patches = sorted({patch for patch, request in self.repository.active(commit) if request is None})
        return state_key(
            base=self.repository.config.base_id,
            deltas=sorted(self.repository.state(commit)),
            shards=[patch for patch in patches if self.repository.patch(patch).kind == "shard"],
            tokenizer=self._tokenizer_id,
            **self.running,
            versions=[torch.__version__, transformers.__version__],
        )

    @cached_property
    def documents(self) -> tuple[Tokens, ...]:
        """The text to measure drift on, as much of it as is read at once.

        Raises:
            RequestError: it cannot be read.
        """
        vocabulary = int(read_config(self._files.checkpoint.folder).get_text_config().vocab_size)
        return tuple(metrics.leading(self._text(), metrics.room(vocabulary)))

    def _text(self) -> Sequence[Sequence[int]]:
        recording = self.repository.config.recording
        if self.questions.text:
            return read_documents(self.at(BASE).stack, self.tokenizer, self.questions.text)
        metric = None if recording is None else Metric.from_json(self.repository.objects.get(recording.metric))
        kept = kept_documents(self.repository, metric)
        if kept is not None:
            return kept
        return held_documents(self.repository, metric, self.at(BASE).stack, self.tokenizer)


def _scores(
    chat: Chat | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[tuple[str, str, str]]
) -> list[Any]:
    """Tokens, log-probability and argmax of each (prompt, target, opening)."""
    pairs, before = [(prompt, target) for prompt, target, _ in items], [opening for *_, opening in items]
    scores = score_targets(model, tokenizer, pairs, chat=chat, openings=before)
    return [[score.tokens, score.logprob, score.argmax] for score in scores]


def _continued(
    chat: Chat | None,
    new_tokens: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
) -> list[Any]:
    """What is written after each prompt; None where there is no room for so many tokens."""
    room = room_after(model, tokenizer, prompts, new_tokens, chat=chat)
    fitting = {prompt: new_tokens for prompt in prompts if room[prompt] == new_tokens}
    written = continue_within(model, tokenizer, fitting, chat=chat)
    return [written.get(prompt) for prompt in prompts]


def _sampled(
    settings: Mapping[str, int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[Any]:
    """What is sampled after each prompt."""
    return list(sample_continuations(model, tokenizer, prompts, **settings))


def _answered(ask: Ask, items: list[Any], opened: Opened) -> list[Any]:
    """A worker's answers."""
    return ask(opened.model, opened.tokenizer, items)


def _longest_target(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], chat: Chat | None) -> int:
    """In tokens, in a chat where the template joins prompt and target."""
    if not requests:
        return 0
    if chat is not None:
        pairs = [(request.text, request.target_new) for request in requests]
        spans = (text.target for text in encode_targets(tokenizer, pairs, chat=chat))
        return max(stop - start for start, stop in spans)
    encoded = tokenizer([f" {request.target_new}" for request in requests])["input_ids"]
    return max(map(len, encoded))


def _short(revision: str) -> str:
    return revision[:12]
