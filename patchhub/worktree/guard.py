"""What the guard asks of the model: do the new facts hold, do earlier ones still, and how far has running text drifted.

The work is bounded by counting tokens, not by the clock, so the same commit is always measured in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from sys import float_info
from typing import Final

from patchhub.editing.locate import encode_prompts
from patchhub.errors import EditError
from patchhub.evaluation.drift import Drift, TextReading, drift, leading, read_text, room
from patchhub.evaluation.guard import Drifted, Measured, Report, Share, is_guessing
from patchhub.evaluation.metrics import score_targets
from patchhub.objects import SLOT, Metric, Request
from patchhub.progress import Progress
from patchhub.runtime.patched_model import PatchState, switch
from patchhub.sets.columns import weight_shapes
from patchhub.sets.elements import active_requests
from patchhub.sets.guard import Prepared, from_vectors, most_moved
from patchhub.store.store import Store
from patchhub.worktree.metric import held_documents
from patchhub.worktree.opening import Worktree, open_worktree
from patchhub.worktree.states import MODES, checked_mode, patch_state, read_routing, state_at

_POSITIONS: Final = (32, 1024)
_EARLIER: Final = (8, 200)
_TWO_SECONDS: Final = 7e10  # multiply-adds of one processor core
_TOKENS_PER_FACT: Final = 40  # a tenth of what writing one fact reads, counting backward passes
_TOKENS_PER_NEW: Final = 12  # its prompt and target
_TOKENS_PER_EARLIER: Final = 16  # the same, and a second reading of those that do not hold


@dataclass(frozen=True)
class Budget:
    """How many positions of held text and how many earlier facts are read at most."""

    positions: int = _POSITIONS[1]
    earlier: int = _EARLIER[1]

    @classmethod
    def of_commit(cls, facts: int, parameters: int) -> Budget:
        """About a tenth of a commit's work, or two seconds' on one core, whichever is more; both numbers within bounds."""
        tokens = max(_TWO_SECONDS / parameters, _TOKENS_PER_FACT * facts)
        positions = _within(tokens / 6, _POSITIONS)  # read three times: by the base, before and after
        left = tokens - 3 * positions - _TOKENS_PER_NEW * facts
        return cls(positions, _within(left / _TOKENS_PER_EARLIER, _EARLIER))


def ask_model(
    repository: Store,
    found: Prepared,
    progress: Progress,
    tree: Worktree | None,
    written: Sequence[Request],
    facts: int | None = None,
) -> Measured:
    """All checks of a prepared commit, with the model that its facts were written with, or with one that is tree for them.

    Args:
        tree: the model, in any state.
        written: the new facts; without a ``tree``, those of the commit.
        facts: how many facts the work may be measured by; None: those that were written.

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
    budget = Budget.of_commit(len(written) if facts is None else facts, tree.model.num_parameters())
    return from_model(repository, tree, found, written, budget)


def from_model(
    repository: Store, tree: Worktree, found: Prepared, requests: Sequence[Request], budget: Budget
) -> Measured:
    """All checks of a prepared commit. The model is left in the commit's state.

    Args:
        tree: the base in memory, in any state.
        requests: the new facts.

    Raises:
        EditError: the edited model's logits are not numbers.
    """
    earlier = _earlier(repository, found, requests)
    parent = found.commit.parents[0] if found.commit.parents else None
    before = state_at(repository, parent or "base")
    text = _read_base(repository, tree, budget)
    drifted_before = _recorded_drift(repository, parent, text.positions)
    if drifted_before is None:
        _put(tree, before)
        drifted_before = drift(tree.model, text).kl
    _put(tree, _state_after(repository, found))
    drifted = _finite(drift(tree.model, text))
    own = _holding(tree, requests)
    read = earlier[: budget.earlier]
    failing = [request for request, holds in zip(read, _holding(tree, read), strict=True) if not holds]
    lost = 0
    if failing:
        _put(tree, before)
        lost = sum(_holding(tree, failing))
        _put(tree, _state_after(repository, found))
    guessing = is_guessing(text.perplexity, text.logprobs[0].shape[1])
    return replace(
        from_vectors(repository, found),
        facts=len(requests),
        own=Share(sum(own), len(own)),
        earlier=Share(lost, len(read) - len(failing) + lost),
        active=len(earlier),
        drift=Drifted(drifted_before, drifted.kl, drifted.perplexity_ratio, drifted.positions, guessing),
        first_token=_at_first_token(tree, requests),
    )


def _earlier(repository: Store, found: Prepared, requests: Sequence[Request]) -> list[Request]:
    """The facts of before that stay and that no new one contradicts, those first that the change moves most."""
    own, told = {request.id for request in requests}, {(request.prompt, request.subject) for request in requests}
    texts = active_requests(repository, found.elements)
    places = {place for place, r in texts.items() if r.id not in own and (r.prompt, r.subject) not in told}
    return list({texts[place].id: texts[place] for place in most_moved(repository, found, places)}.values())


def _read_base(repository: Store, tree: Worktree, budget: Budget) -> TextReading:
    """The base's predictions on held text; the model is left as the base."""
    _put(tree, patch_state(repository, {}, None))
    pinned = repository.config.recording
    metric = Metric.from_json(repository.objects.get(pinned.metric)) if pinned else None
    documents = held_documents(repository, metric, tree.stack, tree.tokenizer)
    vocabulary = tree.model.config.get_text_config().vocab_size
    return read_text(tree.model, leading(documents, min(budget.positions, room(vocabulary))))


def _finite(found: Drift) -> Drift:
    """A drift that can be stored: JSON has no infinity."""
    if not isfinite(found.kl):
        raise EditError(
            "the edited model's logits are not numbers",
            remedy="Lower the editor's clamp and learning_rate, or write fewer facts at once.",
        )
    return replace(found, perplexity_ratio=min(found.perplexity_ratio, float_info.max))


def _recorded_drift(repository: Store, parent: str | None, positions: int) -> float | None:
    """The drift of a commit over the same text, where the guard measured it when it was made."""
    if parent is None:
        return 0.0
    report = Report.from_json(repository.commit(parent).check)
    known = report.measured.drift if report else None
    return known.kl if known and known.positions == positions else None


def _state_after(repository: Store, found: Prepared) -> PatchState:
    """The state of the prepared commit, its shards routed."""
    whole = {patch: repository.patch(patch) for patch, request in found.elements if request is None}
    mode = checked_mode(repository.config.settings.get("wise.mode", MODES[0]))
    routing = read_routing(whole, repository.objects.get, weight_shapes(repository), mode)
    return patch_state(repository, found.after, None, routing=routing)


def _put(tree: Worktree, state: PatchState) -> None:
    switch(tree.model, tree.checkpoint, state)


def _holding(tree: Worktree, requests: Sequence[Request]) -> list[bool]:
    """Whether each fact's target is the model's answer: the argmax at each of its tokens, teacher forced."""
    asked = [(request.text, request.target_new) for request in requests]
    return [score.argmax_right for score in score_targets(tree.model, tree.tokenizer, asked, chat=tree.chat)]


def _at_first_token(tree: Worktree, requests: Sequence[Request]) -> int:
    """How many subjects end at the first token that the model reads, in the form in which the facts are asked."""
    pairs = [(SLOT, request) for request in requests]
    encoded = encode_prompts(tree.tokenizer, pairs, with_target=False, chat=tree.chat)
    return sum(row.subject_last == 0 for row in encoded)


def _within(number: float, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return int(min(max(number, low), high))
