"""What the guard asks of the model about the new facts, their siblings, earlier facts and running text.

Do the new facts hold and read right, do others say them now, do earlier ones still hold, and how far has running text drifted?

The work is bounded by counting tokens, not by the clock, so the same commit is always measured in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from sys import float_info
from typing import Any, Final, TypeVar

import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor

from patchhub.cache import Kind, Slot
from patchhub.editing.locate import encode_prompts, encode_targets
from patchhub.editing.prompts import namesakes
from patchhub.errors import EditError
from patchhub.evaluation.guard import Drifted, Fault, Measured, Report, Share, Spoken, is_guessing, worst
from patchhub.evaluation.live import NOTHING, continue_within, room_after
from patchhub.evaluation.metrics import (
    Drift,
    Head,
    TextReading,
    drift,
    from_states,
    leading,
    part_of,
    read_text,
    reading,
    room,
    score_targets,
    vocabulary_of,
)
from patchhub.evaluation.suites import Sibling, closed, fault_of, leaks, said, siblings_of, spread
from patchhub.models.experts import staying, watch_routes
from patchhub.models.placement import is_quantised
from patchhub.models.tracing import right_padded
from patchhub.objects import SLOT, Metric, Request, Text
from patchhub.progress import Progress
from patchhub.runtime.patched_model import PatchState, switch
from patchhub.sets.columns import weight_shapes
from patchhub.sets.commits import Sentence
from patchhub.sets.elements import Place, active_requests, openings_of
from patchhub.sets.guard import Prepared, from_vectors, most_moved
from patchhub.store.store import Store
from patchhub.text.tokens import Chat
from patchhub.worktree.metric import held_documents
from patchhub.worktree.opening import (
    MODES,
    Worktree,
    checked_mode,
    open_worktree,
    other_form,
    patch_state,
    read_routing,
    state_at,
)

KIND: Final = Kind("base_text", ".safetensors", limit=1 << 28)
"""What the base's head is given on held text, and the experts of its tokens."""

_POSITIONS: Final = (32, 2048)
_AHEAD: Final = 2  # so many times the positions of this commit are read of the base at once, for later ones to find
_EARLIER: Final = (8, 200)
_SIBLINGS: Final = (8, 400)
_CHATS: Final = (4, 100)
_TWO_SECONDS: Final = 1e11  # multiply-adds of one processor core
_PER_FACT_AND_BLOCK: Final = 4  # tokens: a tenth of what writing one fact reads, counting backward passes
_PER_FACT: Final = 40  # the same of a shallow model
_TOKENS_PER_NEW: Final = 32  # its prompt and target, and once more with what follows
_TOKENS_PER_EARLIER: Final = 16  # its prompt and target, and a second reading of those that do not hold
_TOKENS_PER_SIBLING: Final = 16  # its prompt and the beginning of an answer
_TOKENS_PER_CHAT: Final = 32  # the prompt and an answer; the template is read once
_LEAST_ALIKE: Final = 4  # names that end as a subject does
_LONGEST: Final = 24  # tokens of a sibling's answer
_FOLLOWING: Final = 4  # tokens after a target, by which it is judged whether the word has ended
_ANSWERING: Final = 12  # tokens of an answer in a chat beside the target


@dataclass(frozen=True)
class Budget:
    """How many positions of held text, earlier facts, siblings, and facts in a chat are read at most."""

    positions: int = _POSITIONS[1]
    earlier: int = _EARLIER[1]
    siblings: int = _SIBLINGS[1]
    chats: int = _CHATS[1]

    @classmethod
    def of_commit(cls, facts: int, parameters: int, blocks: int = 0) -> Budget:
        """About a tenth of a commit's work, or two seconds' on one core, whichever is more; all numbers within bounds."""
        tokens = max(_TWO_SECONDS / parameters, max(_PER_FACT, _PER_FACT_AND_BLOCK * blocks) * facts)
        positions = _within(
            0.4 * tokens, _POSITIONS
        )  # of the same tokens for small batches, so that the parent's drift is known
        left = (tokens - positions - _TOKENS_PER_NEW * facts) / 3
        return cls(
            positions,
            _within(left / _TOKENS_PER_EARLIER, _EARLIER),
            _within(left / _TOKENS_PER_SIBLING, (min(_SIBLINGS[0] + facts // 2, _SIBLINGS[1]), _SIBLINGS[1])),
            _within(left / _TOKENS_PER_CHAT, _CHATS),
        )


def ask_model(
    repository: Store,
    found: Prepared,
    progress: Progress,
    tree: Worktree | None,
    written: Sequence[Request],
    facts: int | None = None,
    sentences: Sequence[Sentence] = (),
) -> Measured:
    """All checks of a prepared commit, with the model that its facts were written with, or with one that is tree for them.

    Args:
        tree: the model, in any state.
        written: the new facts; without a ``tree``, those of the commit.
        facts: how many facts the work may be measured by; None: those that were written.
        sentences: what the model said of their subjects before.

    Raises:
        EditError: the edited model's logits are not numbers.
        BaseError: the base is missing or changed.
    """
    if tree is None:
        tree = open_worktree(repository, progress)
        requests = {request.id: request for request in active_requests(repository, found.commit.added).values()}
        progress.stage("checking", 0)
        measured = from_model(repository, tree, found, list(requests.values()), Budget())
        progress.close()
        return measured
    progress.stage("checking", 0)
    number = len(written) if facts is None else facts
    budget = Budget.of_commit(number, tree.model.num_parameters(), len(tree.stack.blocks))
    return from_model(repository, tree, found, written, budget, sentences)


def from_model(
    repository: Store,
    tree: Worktree,
    found: Prepared,
    requests: Sequence[Request],
    budget: Budget,
    sentences: Sequence[Sentence] = (),
) -> Measured:
    """All checks of a prepared commit. The model is left in the commit's state.

    Args:
        tree: the base in memory, in any state.
        requests: the new facts.
        sentences: what the model said of their subjects before.

    Raises:
        EditError: the edited model's logits are not numbers.
    """
    texts = active_requests(repository, found.elements)
    earlier = _earlier(repository, found, texts, requests)
    parent = found.commit.parents[0] if found.commit.parents else None
    before, after = state_at(repository, parent or "base"), _state_after(repository, found)
    known = _recorded_drift(repository, parent)
    if known is not None and budget.positions <= 2 * known.positions <= 4 * budget.positions:
        budget = replace(budget, positions=known.positions)  # the parent need not be measured once more
    text = _read_base(repository, tree, budget)
    routes = _base_routes(repository, tree, text) if tree.architecture.site is not None else []
    drifted_before = 0.0 if parent is None else known.kl if known and known.positions == text.positions else None
    if drifted_before is None:
        _put(tree, before)
        drifted_before = drift(tree.model, text).kl
    _put(tree, after)
    drifted, ways = _routes(tree, text, lambda: _finite(drift(tree.model, text)))
    new = {request.id for request in requests}
    answers = openings_of(repository, texts if tree.chat else [place for place, r in texts.items() if r.id in new])
    openings = answers if tree.chat is not None else {}
    read = earlier[: budget.earlier]
    holding = _holding(tree, [*requests, *read], openings)
    own, others = holding[: len(requests)], holding[len(requests) :]
    failing = [request for request, holds in zip(read, others, strict=True) if not holds]
    heard = _listen(tree, requests, texts.values(), budget, answers)
    lost, then = 0, dict[str, str]()
    if failing or heard.doubtful:
        _put(tree, before)
        lost = sum(_holding(tree, failing, openings))
        then = _continuations(tree, heard.doubtful, tree.chat)
        _put(tree, after)
    guessing = is_guessing(text.perplexity, text.vocabulary)
    return replace(
        from_vectors(repository, found),
        facts=len(requests),
        own=Share(sum(own), len(own)),
        spoken=heard.judged(then) if requests else None,
        about=_still_said(tree, sentences, budget),
        earlier=Share(lost, len(read) - len(failing) + lost),
        active=len(earlier),
        drift=Drifted(drifted_before, drifted.kl, drifted.perplexity_ratio, drifted.positions, guessing),
        first_token=_at_first_token(tree, requests),
        routing=Share(*staying(routes, ways)) if routes else None,
    )


@dataclass(frozen=True, eq=False)
class _Heard:
    """What the changed model writes.

    Attributes:
        requests: the new facts that leave room for an answer.
        texts: what follows each prompt that was read, in the form in which the facts are asked.
        siblings: those that were read.
        namesakes: names that end as a subject does, which were read too.
        targets: of all new facts.
        doubtful: how many tokens to write after each sibling that would leak if the state before does not say the same.
        answers: what follows some of the facts in the base's chat form, by prompt.
        anywhere: the texts are answers in a chat.
    """

    requests: Sequence[Request]
    texts: Mapping[str, str]
    siblings: Sequence[Sibling]
    namesakes: Sequence[Sibling]
    targets: frozenset[str]
    doubtful: Mapping[str, int]
    answers: Mapping[str, str]
    anywhere: bool

    def judged(self, before: Mapping[str, str]) -> Spoken:
        """What the guard keeps of it.

        Args:
            before: what the state before writes after the doubtful siblings.
        """
        found = _judged(self.requests, self.texts, anywhere=self.anywhere)
        leaking = [fault for sibling in self.siblings if (fault := self._leak(sibling, before))]
        alike = [fault for sibling in self.namesakes if (fault := self._leak(sibling, before))]
        asked = [request for request in self.requests if request.text in self.answers]
        return replace(
            found,
            leak=Share(len(leaking), len(self.siblings)) if self.siblings else None,
            namesakes=Share(len(alike), len(self.namesakes)) if self.namesakes else None,
            faults=worst([*found.faults, *leaking, *alike]),
            chat=_judged(asked, self.answers, anywhere=True) if asked else None,
        )

    def _leak(self, sibling: Sibling, before: Mapping[str, str]) -> Fault | None:
        if sibling.prompt not in self.doubtful:
            return None
        now = self.texts[sibling.prompt]
        target = leaks(sibling, now, before.get(sibling.prompt, ""), self.targets, anywhere=self.anywhere)
        if target is None:
            return None
        request = next((request.id for request in self.requests if request.text == sibling.prompt), None)
        return Fault("leak", request, sibling.prompt, target, now)


def _judged(requests: Sequence[Request], texts: Mapping[str, str], *, anywhere: bool) -> Spoken:
    pairs = [(request, texts[request.text]) for request in requests]
    return Spoken(
        Share(sum(said(text, request.target_new, anywhere=anywhere) for request, text in pairs), len(pairs)),
        Share(sum(closed(text, request.target_new, anywhere=anywhere) for request, text in pairs), len(pairs)),
        faults=worst(fault for request, text in pairs if (fault := fault_of(request, text, anywhere=anywhere))),
    )


def _still_said(tree: Worktree, sentences: Sequence[Sentence], budget: Budget) -> Share | None:
    """Of the words of some sentences those that are still the most probable next ones."""
    read = sentences[: budget.chats]
    if not read:
        return None
    pairs = [(sentence.prompt, sentence.said) for sentence in read]
    scores = score_targets(tree.model, tree.tokenizer, pairs, chat=read[0].chat, batch_tokens=tree.batch_tokens)
    right = sum(a == b for score in scores for a, b in zip(score.argmax, score.tokens, strict=True))
    return Share(right, sum(score.n_tokens for score in scores))


def _listen(
    tree: Worktree,
    requests: Sequence[Request],
    active: Iterable[Request],
    budget: Budget,
    openings: Mapping[str, str],
) -> _Heard:
    """Let the model, which is in the state to be judged, write after the new facts' prompts and their siblings'.

    Args:
        openings: what answers in a chat say before their targets, by request id.
    """
    lengths = _target_lengths(tree, requests, openings if tree.chat is not None else {})
    longest = max(lengths.values(), default=0)
    more = _FOLLOWING if tree.chat is None else _ANSWERING
    found, own = siblings_of(requests, active), {request.text for request in requests}
    near = [sibling for siblings in found for sibling in siblings if sibling.prompt in own]  # these are read anyway
    near += spread([[one for one in siblings if one.prompt not in own] for siblings in found], budget.siblings)
    known = own.union(sibling.prompt for siblings in found for sibling in siblings)
    ends = [[Sibling(text, frozenset()) for text in texts if text not in known] for texts in map(_alike, requests)]
    alike = spread(ends, max(_LEAST_ALIKE, budget.siblings // 4))
    # A sibling is judged by its beginning, which is no longer than the targets are; one very long target must not make all others dear.
    asked = {sibling.prompt: min(longest, _LONGEST) + (0 if tree.chat is None else more) for sibling in (*near, *alike)}
    for request in requests:
        asked[request.text] = max(asked.get(request.text, 0), lengths[request.text] + more)
    texts = _continuations(tree, asked, tree.chat, _wanted(tree, requests, openings, tree.chat))
    heard = [request for request in requests if request.text in texts]
    siblings, ends_alike = ([sibling for sibling in some if sibling.prompt in texts] for some in (near, alike))
    targets = frozenset(request.target_new for request in requests)
    anywhere = tree.chat is not None
    doubtful = {
        s.prompt: asked[s.prompt]
        for s in (*siblings, *ends_alike)
        if leaks(s, texts[s.prompt], "", targets, anywhere=anywhere)
    }
    chat, answers = other_form(tree), dict[str, str]()
    if chat is not None:
        some = requests[: budget.chats]
        questions = {request.text: lengths[request.text] + _ANSWERING for request in some}
        answers = _continuations(tree, questions, chat, _wanted(tree, some, openings, chat))
    return _Heard(heard, texts, siblings, ends_alike, targets, doubtful, answers, anywhere)


def _alike(request: Request) -> list[str]:
    """The request's prompt about other names that end in the last word of its subject."""
    return [prompt.replace(SLOT, name) for prompt, name in namesakes([request])]


def _wanted(
    tree: Worktree, requests: Sequence[Request], openings: Mapping[str, str], chat: Chat | None
) -> dict[str, tuple[int, ...]]:
    """By prompt, the tokens of the prompt with the answer that was written into the model."""
    said = [openings.get(request.id, "") if chat else "" for request in requests]
    pairs = [(request.text, request.target_new) for request in requests]
    encoded = encode_targets(tree.tokenizer, pairs, chat=chat, openings=said)
    return {request.text: text.input_ids for request, text in zip(requests, encoded, strict=True)}


def _target_lengths(tree: Worktree, requests: Sequence[Request], openings: Mapping[str, str]) -> dict[str, int]:
    """By prompt, the tokens of the longest target that is asked for there, with what it was written behind."""
    lengths: dict[str, int] = {}
    said = [openings.get(request.id, "") for request in requests]
    pairs = [(request.text, request.target_new) for request in requests]
    encoded = encode_targets(tree.tokenizer, pairs, chat=tree.chat, openings=said)
    for request, text, opening in zip(requests, encoded, said, strict=True):
        start, stop = text.target
        before = len(tree.tokenizer(opening, add_special_tokens=False)["input_ids"]) if opening else 0
        lengths[request.text] = max(lengths.get(request.text, 0), before + stop - start)
    return lengths


def _continuations(
    tree: Worktree,
    asked: Mapping[str, int],
    chat: Chat | None,
    expected: Mapping[str, Sequence[int]] = NOTHING,
) -> dict[str, str]:
    """What the model writes after each prompt, greedily, up to so many tokens; those without room are left out.

    Args:
        expected: as in `continue_within`.
    """
    if not asked:
        return {}
    room = room_after(tree.model, tree.tokenizer, list(asked), max(asked.values()), chat=chat)
    fitting = {prompt: tokens for prompt, tokens in asked.items() if room[prompt] >= tokens > 0}
    options: dict[str, Any] = {"chat": chat, "batch_tokens": tree.batch_tokens, "expected": expected}
    return continue_within(tree.model, tree.tokenizer, fitting, **options)


def _earlier(
    repository: Store, found: Prepared, texts: Mapping[Place, Request], requests: Sequence[Request]
) -> list[Request]:
    """The facts of before that stay and that no new one contradicts, those first that the change moves most."""
    own, told = {request.id for request in requests}, {(request.prompt, request.subject) for request in requests}
    places = {place for place, r in texts.items() if r.id not in own and (r.prompt, r.subject) not in told}
    return list({texts[place].id: texts[place] for place in most_moved(repository, found, places)}.values())


def _read_base(repository: Store, tree: Worktree, budget: Budget) -> TextReading:
    """The base's predictions on held text, as many of them as the budget allows; the model is left as the base.

    What its head is given is kept in the cache, so that only the first commit of a repository reads the base.
    """
    _put(tree, patch_state(repository, {}, None))
    pinned = repository.config.recording
    metric = Metric.from_json(repository.objects.get(pinned.metric)) if pinned else None
    documents = held_documents(repository, metric, tree.stack, tree.tokenizer)
    head, at_once = Head.of(tree.model), tree.batch_tokens
    if head is None:
        few = leading(documents, min(budget.positions, room(vocabulary_of(tree.model))))
        return read_text(tree.model, few, batch_tokens=at_once)
    slot = _slot(repository, tree, text=Text(tuple(tuple(document) for document in documents)).id)
    wanted = sum(len(document) - 1 for document in leading(documents, budget.positions))
    for kept in slot.contents():
        stored = load(kept)
        if len(stored["states"]) >= wanted:
            ahead = leading(documents, len(stored["states"]))
            states, lost = stored["states"].to(tree.model.device), float(stored["perplexity"])
            whole = from_states(head, ahead, states, lost, batch_tokens=at_once)
            return part_of(whole, ahead, budget.positions, batch_tokens=at_once)
    ahead = leading(documents, max(budget.positions, min(_AHEAD * budget.positions, _POSITIONS[1])))
    whole = read_text(tree.model, ahead, batch_tokens=at_once)
    perplexity = torch.tensor(whole.perplexity, dtype=torch.float64)
    slot.keep([save({"states": torch.cat(whole.parts).cpu().contiguous(), "perplexity": perplexity})])
    return part_of(whole, ahead, budget.positions, batch_tokens=at_once)


def _slot(repository: Store, tree: Worktree, **inputs: Any) -> Slot:
    """Where what the base as it is in memory gives for some inputs is kept."""
    return repository.cache.slot(
        KIND,
        of=repository.config.base_id,
        dtype=str(tree.model.dtype),
        device=tree.model.device.type,
        quantised=is_quantised(tree.model),
        versions=[torch.__version__, transformers.__version__],
        **inputs,
    )


def _base_routes(repository: Store, tree: Worktree, text: TextReading) -> list[Tensor]:
    """The experts of the held text's tokens in the base, which the model is in; a later commit that reads as much finds them kept."""
    documents = tuple(document for batch in text.batches for document in batch)
    slot = _slot(repository, tree, experts_of=Text(documents).id, batches=[len(batch) for batch in text.batches])
    for kept in slot.contents():
        stored = load(kept)
        return [stored[str(number)].long() for number in range(len(stored))]
    found = _routes(tree, text, lambda: _read_over(tree, text))[1]
    slot.keep([save({str(number): experts.to(torch.int16) for number, experts in enumerate(found)})])
    return found


Read = TypeVar("Read")


def _routes(tree: Worktree, text: TextReading, read: Callable[[], Read]) -> tuple[Read, list[Tensor]]:
    """What reads the held text batch by batch, and the experts of each of its tokens at each layer that has some."""
    with watch_routes(tree.model) as seen:
        found = read()
    layers = len(seen) // len(text.batches)
    real = [right_padded(batch, tree.stack.device)[1].flatten().bool().cpu() for batch in text.batches]
    return found, [experts[real[number // layers]] for number, experts in enumerate(seen)]


def _read_over(tree: Worktree, text: TextReading) -> None:
    """Run the blocks over the held text."""
    with reading(tree.model):
        for batch in text.batches:
            ids, mask, positions = right_padded(batch, tree.stack.device)
            tree.stack.decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)


def _finite(found: Drift) -> Drift:
    """A drift that can be stored: JSON has no infinity."""
    if not isfinite(found.kl):
        raise EditError(
            "the edited model's logits are not numbers",
            remedy="Lower the editor's clamp and learning_rate, or write fewer facts at once.",
        )
    return replace(found, perplexity_ratio=min(found.perplexity_ratio, float_info.max))


def _recorded_drift(repository: Store, parent: str | None) -> Drifted | None:
    """The drift of a commit, where the guard measured it when it was made."""
    report = None if parent is None else Report.from_json(repository.commit(parent).check)
    return report.measured.drift if report else None


def _state_after(repository: Store, found: Prepared) -> PatchState:
    """The state of the prepared commit, its shards routed."""
    whole = {patch: repository.patch(patch) for patch, request in found.elements if request is None}
    mode = checked_mode(repository.config.settings.get("wise.mode", MODES[0]))
    routing = read_routing(whole, repository.objects.get, weight_shapes(repository), mode)
    return patch_state(repository, found.after, None, routing=routing)


def _put(tree: Worktree, state: PatchState) -> None:
    switch(tree.model, tree.checkpoint, state)


def _holding(tree: Worktree, requests: Sequence[Request], openings: Mapping[str, str]) -> list[bool]:
    """Whether each fact's target is the model's answer behind its opening: the argmax at each of its tokens, teacher forced."""
    asked = [(request.text, request.target_new) for request in requests]
    said = [openings.get(request.id, "") for request in requests]
    scores = score_targets(
        tree.model, tree.tokenizer, asked, chat=tree.chat, openings=said, batch_tokens=tree.batch_tokens
    )
    return [score.argmax_right for score in scores]


def _at_first_token(tree: Worktree, requests: Sequence[Request]) -> int:
    """How many subjects end at the first token that the model reads, in the form in which the facts are asked."""
    pairs = [(SLOT, request) for request in requests]
    encoded = encode_prompts(tree.tokenizer, pairs, with_target=False, chat=tree.chat)
    return sum(row.subject_last == 0 for row in encoded)


def _within(number: float, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return int(min(max(number, low), high))
