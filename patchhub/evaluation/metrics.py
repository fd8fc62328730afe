"""What a causal language model says, read in batches: scores of target strings, perplexity of texts, and drift.

A prompt is read once and its cache serves every target that follows it, so targets share their prompt's work and the
head is applied only where a target token is predicted. Prompts are padded on the left and targets on the right, which
keeps positions, masks and windows those of the unpadded text. The rows of a prompt's and its targets' forward passes
are the same: a model that decides something per sequence at the prompt keeps its decision for the target.

Drift is how far next-token predictions have moved from the base's on text that has nothing to do with the edits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from patchhub.editing.locate import encode_targets
from patchhub.editing.rows import common_beginning
from patchhub.errors import EditError, RequestError, SettingsError
from patchhub.models.streaming import streamed
from patchhub.models.structure import is_recurrent, takes_gaps
from patchhub.models.tracing import Prefix, fast, left_padded, right_padded
from patchhub.text.tokens import Chat, beginning, context_length, tokenise, too_long

TokenIds = tuple[int, ...]

BATCH_TOKENS = 2048
_BUSY_TOKENS = 512
_PADDING_SHARE = 1 / 8
_LONG_TARGETS_PER_ROW = 2

_SHARED: Final = 64  # positions by which a batch is smaller where what its rows begin with is read once

ENTRIES: Final = 1 << 25
"""Log-probabilities that are held at once: 128 MiB in float32."""

_SAME: Final = 1e-2  # relative to the largest logit; bfloat16 rounds by less, a cap on logits changes more


@dataclass(frozen=True)
class TargetScore:
    """A target after a prompt: its tokens, the natural log-probability of all of them, and what argmax says at each.

    Teacher forced: token i is predicted from the prompt and the target's tokens before i.
    """

    tokens: TokenIds
    logprob: float
    argmax: TokenIds

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def argmax_right(self) -> bool:
        """Every token of the target is the most probable one."""
        return self.argmax == self.tokens


@dataclass(frozen=True)
class _Row:
    """A prompt with the targets that are read after it: any number of one token, up to two longer ones."""

    prompt: TokenIds
    short: tuple[TokenIds, ...]
    long: tuple[TokenIds, ...]

    @property
    def width(self) -> int:
        return len(self.prompt) + max(map(len, self.long), default=1) - 1


@dataclass(frozen=True)
class _Prediction:
    """One target token's natural log-probability, and the most probable token in its place."""

    logprob: float
    argmax: int


def score_targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[tuple[str, str]],
    *,
    chat: Chat | None = None,
    openings: Sequence[str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[TargetScore]:
    """Score (prompt, target) pairs; the text is the prompt, a space and the target, tokenised as one.

    Args:
        chat: the prompts are the user's messages of this chat form, and the targets the answers.
        openings: in a chat, what each answer says before its target.
        batch_tokens: padded positions in one forward pass; it changes speed and memory, not the scores.

    Raises:
        RequestError: a text is longer than the model reads, or its target has no token or no token before it.
        EditError: the model's logits are not numbers.
    """
    encoded = encode_targets(tokenizer, items, chat=chat, openings=openings)
    limit = context_length(model)
    keys = []
    for (prompt, target), text in zip(items, encoded, strict=True):
        if len(text.input_ids) > limit:
            raise too_long(f"{prompt} {target}", len(text.input_ids), limit)
        if text.target[0] == 0:
            raise RequestError(
                f"'{beginning(f'{prompt} {target}')}' has no token before the target, and the model needs one",
                remedy="Give the prompt a beginning.",
                prompt=prompt,
                target=target,
            )
        keys.append((text.input_ids[: text.target[0]], text.input_ids[text.target[0] :]))
    scores: dict[tuple[TokenIds, TokenIds], TargetScore] = {}
    with reading(model):
        for batch in _batches(_rows(keys), batch_tokens):
            scores.update(_score_batch(model, batch))
    return [scores[key] for key in keys]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> float:
    """exp of the mean negative log-probability per token, over all tokens of all texts but each text's first.

    Every text is read alone, from its beginning, cut after `max_tokens` tokens (by default what the model reads).

    Raises:
        RequestError: no text has two tokens.
        EditError: the model's logits are not numbers.
    """
    limit = min(max_tokens or context_length(model), context_length(model))
    rows = sorted((ids[:limit] for ids, _ in tokenise(tokenizer, texts) if len(ids[:limit]) > 1), key=len)
    if not rows:
        raise RequestError("no text to measure perplexity on has two tokens", remedy="give longer texts")
    total, count = 0.0, 0
    with reading(model):
        for batch in cut([len(row) for row in rows], batch_tokens):
            ids, mask, positions = right_padded(rows[batch], model.device)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.to(
                ids.device
            )
            real = mask[:, 1:].bool()
            losses = _logprobs(logits[:, :-1][real], ids[:, 1:][real])
            total, count = total - float(losses.sum(dtype=torch.float64)), count + losses.numel()
    _check_number(total)
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def cut(lengths: Sequence[int], batch_tokens: int) -> Iterator[slice]:
    """Slices of consecutive rows, sorted by length, to be padded to the longest and read together.

    A slice's padded size stays within `batch_tokens`, unless it is one row, and beyond a size that keeps a processor
    busy at most an eighth of it is padding.
    """
    if batch_tokens < 1:
        raise SettingsError(f"batch_tokens is {batch_tokens}", remedy="give a number of tokens above 0")
    start, filled = 0, 0
    for index, length in enumerate(lengths):
        size = (index + 1 - start) * length
        wasteful = size > _BUSY_TOKENS and size - filled - length > size * _PADDING_SHARE
        if index > start and (size > batch_tokens or wasteful):
            yield slice(start, index)
            start, filled = index, 0
        filled += length
    if lengths:
        yield slice(start, len(lengths))


@contextmanager
def reading(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients and dropout, computed by `fast`; the model's training mode is put back afterwards."""
    training = model.training
    model.train(False)
    try:
        with torch.no_grad(), fast(model):
            yield
    finally:
        model.train(training)


def opened(
    model: PreTrainedModel, rows: Sequence[TokenIds], longest: int, cache: Any = None, least: int = 1
) -> tuple[Any, Int[Tensor, "rows time"], Int[Tensor, "rows cached+time"], Int[Tensor, "rows time"]]:
    """A cache, and what is left to read of some rows: token ids, mask and positions, padded on the left.

    What all rows begin with, the template of a chat for one, is read once, where the model can go on from there and does not read its
    blocks from the disk for each pass.

    Args:
        longest: how many positions the cache will have at most.
        cache: an empty one; None: where nothing is read here, none is needed.
        least: tokens of every row that are left to read.
    """
    shared = common_beginning([row[:-least] for row in rows])
    worthwhile = len(shared) * (len(rows) - 1) >= _SHARED and streamed(model) is None
    if not worthwhile or not takes_gaps(model, longest):
        return cache, *left_padded(rows, model.device)
    cache = DynamicCache() if cache is None else cache
    ids, mask, positions = left_padded([shared], model.device)
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(len(rows))
    ids, mask, positions = left_padded([row[len(shared) :] for row in rows], model.device)
    return cache, ids, torch.cat([mask.new_ones(len(rows), len(shared)), mask], dim=1), positions + len(shared)


def _rows(pairs: Iterable[tuple[TokenIds, TokenIds]]) -> list[_Row]:
    """Each distinct prompt with its distinct targets, on as many rows as its longer targets need."""
    targets: dict[TokenIds, dict[TokenIds, None]] = {}
    for prompt, target in pairs:
        targets.setdefault(prompt, {})[target] = None
    rows = []
    for prompt, after in targets.items():
        short = tuple(target for target in after if len(target) == 1)
        long = sorted((target for target in after if len(target) > 1), key=len)
        for start in range(0, max(len(long), 1), _LONG_TARGETS_PER_ROW):
            rows.append(_Row(prompt, short if start == 0 else (), tuple(long[start : start + _LONG_TARGETS_PER_ROW])))
    return rows


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[Sequence[_Row]]:
    """Rows of similar width, all with the same number of longer targets."""
    for count in range(_LONG_TARGETS_PER_ROW + 1):
        alike = sorted((row for row in rows if len(row.long) == count), key=lambda row: (row.width, len(row.prompt)))
        for batch in cut([row.width for row in alike], batch_tokens):
            yield alike[batch]


def _score_batch(
    model: PreTrainedModel, rows: Sequence[_Row]
) -> Iterator[tuple[tuple[TokenIds, TokenIds], TargetScore]]:
    """Read the prompts, then the first longer target of every row, then the second, over the prompts' cache."""
    if is_recurrent(model.config):
        yield from _score_whole(model, rows)
        return
    rounds = len(rows[0].long)
    prompts, empty = [row.prompt for row in rows], DynamicCache() if rounds else None
    longest = max(map(len, prompts)) + max(row.width for row in rows)  # with what is masked behind a beginning
    cache, ids, mask, positions = opened(model, prompts, longest, empty)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    ).logits[:, -1]
    first = _first_tokens(logits, rows)
    for index, row in enumerate(rows):
        for target in row.short:
            yield (row.prompt, target), _score(target, [first[index, target[0]]])
    if not rounds:
        return
    layers: list[Any] = cache.layers
    prefix = Prefix([(layer.keys, layer.values) for layer in layers])
    for number in range(rounds):
        targets = [row.long[number] for row in rows]
        rest = _later_tokens(model, targets, mask, prefix)
        for index, (row, target) in enumerate(zip(rows, targets, strict=True)):
            yield (row.prompt, target), _score(target, [first[index, target[0]], *rest[index]])


def _score_whole(
    model: PreTrainedModel, rows: Sequence[_Row]
) -> Iterator[tuple[tuple[TokenIds, TokenIds], TargetScore]]:
    """Read each prompt with each of its targets, from the beginning, where what was read of the prompt cannot be kept."""
    pairs = [(row.prompt, target) for row in rows for target in row.short + row.long]
    ids, mask, positions = right_padded([prompt + target[:-1] for prompt, target in pairs], model.device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for found, (prompt, target) in zip(logits, pairs, strict=True):
        predicted = found[len(prompt) - 1 :][: len(target)]
        logprobs = _logprobs(predicted, torch.tensor(target, device=predicted.device)).tolist()
        argmax = predicted.argmax(-1).tolist()
        yield (prompt, target), _score(target, [_Prediction(*one) for one in zip(logprobs, argmax, strict=True)])


def _first_tokens(logits: Float[Tensor, "rows vocabulary"], rows: Sequence[_Row]) -> dict[tuple[int, int], _Prediction]:
    """The prediction of every target's first token, by row and token."""
    keys = sorted({(index, target[0]) for index, row in enumerate(rows) for target in row.short + row.long})
    row_of, tokens = torch.tensor(keys, device=logits.device).unbind(1)
    logprobs = _log_softmax(logits)[row_of, tokens].tolist()
    argmax = logits.argmax(-1)[row_of].tolist()
    return {key: _Prediction(*values) for key, *values in zip(keys, logprobs, argmax, strict=True)}


def _later_tokens(
    model: PreTrainedModel, targets: Sequence[TokenIds], prompt_mask: Int[Tensor, "rows time"], prefix: Prefix
) -> list[list[_Prediction]]:
    """The predictions of each target's tokens after the first, one target per row of the prompts' cache."""
    ids, mask, positions = right_padded([target[:-1] for target in targets], model.device)
    logits = model(
        input_ids=ids,
        attention_mask=torch.cat([prompt_mask, mask], dim=1),
        position_ids=prompt_mask.sum(1, keepdim=True) + positions,
        past_key_values=prefix,
        use_cache=True,
    ).logits.to(mask.device)[mask.bool()]
    tokens = torch.tensor([token for target in targets for token in target[1:]], device=logits.device)
    values = zip(_logprobs(logits, tokens).tolist(), logits.argmax(-1).tolist(), strict=True)
    return [[_Prediction(*next(values)) for _ in target[1:]] for target in targets]


def _score(target: TokenIds, predictions: Sequence[_Prediction]) -> TargetScore:
    logprob = math.fsum(prediction.logprob for prediction in predictions)
    _check_number(logprob)
    return TargetScore(target, logprob, tuple(prediction.argmax for prediction in predictions))


def _check_number(logprob: float) -> None:
    if math.isnan(logprob):
        raise EditError("the model's logits are not numbers", remedy="undo the edit that broke the model")


def _log_softmax(logits: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n vocabulary"]:
    """In float32, or float64 where the logits are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _logprobs(logits: Float[Tensor, "n vocabulary"], tokens: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return _log_softmax(logits).gather(-1, tokens[:, None])[:, 0]


# --- drift ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """What changed over some predicted positions.

    Attributes:
        perplexity_ratio: perplexity now over the base's, exp of the mean growth of the loss per position.
        kl: mean KL(p_base || p_now) per position in nats, over the whole vocabulary; never negative, 0 where nothing changed.
        positions: how many were read.

    Both numbers are infinite where the model's logits are not numbers.
    """

    perplexity_ratio: float
    kl: float
    positions: int


@dataclass(frozen=True)
class DocumentDrift:
    """Sums over the predicted positions of one document: growth of the loss, KL(p_base || p_now), and how many there are."""

    growth: float
    divergence: float
    positions: int


@dataclass(frozen=True, eq=False)
class Head:
    """The last linear step of a model as it was when it was read, whatever is done to the model later.

    Attributes:
        weight, bias: of the output embeddings.
    """

    weight: Float[Tensor, "vocabulary d"]
    bias: Float[Tensor, " vocabulary"] | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head | None:
        """A model's head; None where its logits are more than a linear function of what the head is given."""
        module = _output(model)
        bias = getattr(module, "bias", None)
        if not module.weight.is_floating_point():
            return None
        head = cls(module.weight.detach(), None if bias is None else bias.detach())
        ids = torch.arange(1, 5, device=model.device)[None] % head.weight.shape[0]
        with reading(model), _given(model) as given:
            logits = model(input_ids=ids, use_cache=False).logits
        told = head(given[-1]).to(logits.device, logits.dtype)
        return head if bool((told - logits).abs().max() <= _SAME * logits.abs().max()) else None

    def __call__(self, states: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocabulary"]:
        return torch.nn.functional.linear(states.to(self.weight.device, self.weight.dtype), self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class TextReading:
    """What a model predicts at every position of some documents but the last of each, batch by batch.

    Attributes:
        batches: the documents, those of one batch of similar length.
        parts: per batch, what the head was given at each position, from which ``head`` makes predictions; without a ``head``, natural
            log-probabilities of the next token.
        head: the head of the model that was read.
        perplexity: of the model that was read, on these documents.
        vocabulary: how many tokens there are logits of.
    """

    batches: tuple[tuple[tuple[int, ...], ...], ...]
    parts: tuple[Float[Tensor, "positions width"], ...]
    head: Head | None
    perplexity: float
    vocabulary: int

    @property
    def positions(self) -> int:
        return sum(len(part) for part in self.parts)

    def logprobs(self, place: int) -> Float[Tensor, "positions vocabulary"]:
        """Natural log-probabilities at the positions of one batch."""
        part = self.parts[place]
        return part if self.head is None else _log_softmax(self.head(part))


def from_states(
    head: Head,
    documents: Sequence[Sequence[int]],
    states: Float[Tensor, "positions d"],
    perplexity: float,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> TextReading:
    """A reading made again from what the head was given, batch after batch, when these documents were read."""
    vocabulary = head.weight.shape[0]
    batches = batches_of([tuple(document) for document in documents if len(document) > 1], vocabulary, batch_tokens)
    sizes = [sum(len(document) - 1 for document in batch) for batch in batches]
    return TextReading(batches, tuple(torch.split(states, sizes)), head, perplexity, vocabulary)


def part_of(
    whole: TextReading, documents: Sequence[Sequence[int]], positions: int, *, batch_tokens: int = BATCH_TOKENS
) -> TextReading:
    """The reading of the first of the documents that were read, with so many predicted positions together.

    Args:
        whole: a reading of these documents by states (`TextReading.head`).
        documents: in the order in which the first are taken.
    """
    states: dict[tuple[int, ...], Tensor] = {}
    for batch, part in zip(whole.batches, whole.parts, strict=True):
        states.update(zip(batch, torch.split(part, [len(document) - 1 for document in batch]), strict=True))
    read = [tuple(document) for document in documents if len(document) > 1]
    chosen = leading(read, positions)
    known = {cut_short: states[full] for cut_short, full in zip(chosen, read, strict=False)}
    batches = batches_of(chosen, whole.vocabulary, batch_tokens)
    parts = tuple(torch.cat([known[document][: len(document) - 1] for document in batch]) for batch in batches)
    return replace(whole, batches=batches, parts=parts)


def leading(documents: Sequence[Sequence[int]], positions: int) -> list[tuple[int, ...]]:
    """The first documents with that many predicted positions together, the last of them cut; at least one position each."""
    chosen: list[tuple[int, ...]] = []
    for document in documents:
        part = tuple(document[: positions + 1])
        if len(part) > 1:
            chosen.append(part)
            positions -= len(part) - 1
    return chosen


def room(vocabulary: int) -> int:
    """How many positions' log-probabilities are held at once for a vocabulary of that size."""
    return max(1, ENTRIES // vocabulary)


def read_text(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], *, batch_tokens: int = BATCH_TOKENS
) -> TextReading:
    """Read documents of token ids, each alone and from its beginning, with the model as it is now.

    Raises:
        RequestError: no document has two tokens.
    """
    rows = [tuple(document) for document in documents if len(document) > 1]
    if not rows:
        raise RequestError("no text to measure drift on has two tokens", remedy="Give longer texts.")
    batches = batches_of(rows, vocabulary_of(model), batch_tokens)
    head, parts, loss = Head.of(model), [], 0.0
    with reading(model), _given(model) as given:
        for batch in batches:
            found, tokens, real = _predictions(model, batch)
            parts.append(found if head is None else given[-1][:, :-1][real.to(given[-1].device)])
            given.clear()
            loss -= _sum_at(found, tokens)
    perplexity = _exp(loss / sum(map(len, parts)))
    return TextReading(batches, tuple(parts), head, perplexity, vocabulary_of(model))


def batches_of(
    rows: Sequence[tuple[int, ...]], vocabulary: int, batch_tokens: int = BATCH_TOKENS
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Documents sorted by length and cut so that the log-probabilities of a batch are as many as are held at once."""
    rows = sorted(rows, key=len)
    return tuple(tuple(rows[part]) for part in cut([len(row) for row in rows], min(batch_tokens, room(vocabulary))))


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many tokens a model gives logits of."""
    module = _output(model)
    return int(module.weight.shape[0])


def _output(model: Any) -> Any:
    """The module that makes logits."""
    return model.get_output_embeddings()


@contextmanager
def _given(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """While open, what the head is given in each pass."""
    seen: list[Tensor] = []
    module = _output(model)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def drift(model: PreTrainedModel, base: TextReading) -> Drift:
    """How far the model is, as it is now, from what was read."""
    parts = document_drifts(model, base)
    growth, divergence = sum(part.growth for part in parts), sum(part.divergence for part in parts)
    kl = divergence / base.positions
    return Drift(_exp(growth / base.positions), kl if math.isfinite(kl) else math.inf, base.positions)


def document_drifts(model: PreTrainedModel, base: TextReading) -> list[DocumentDrift]:
    """The same for each document that was read, in the order of `TextReading.batches`."""
    found: list[DocumentDrift] = []
    with reading(model):
        for place, batch in enumerate(base.batches):
            now, tokens, _ = _predictions(model, batch)
            before = base.logprobs(place)
            at = tokens[:, None]
            growth = (before.gather(-1, at) - now.gather(-1, at))[:, 0].double()
            divergence = (before.exp() * (before - now)).sum(-1, dtype=torch.float64)
            sizes = [len(document) - 1 for document in batch]
            parts = zip(torch.split(growth, sizes), torch.split(divergence, sizes), sizes, strict=True)
            found += [DocumentDrift(float(one.sum()), max(float(other.sum()), 0.0), size) for one, other, size in parts]
    return found


def _predictions(
    model: PreTrainedModel, rows: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "positions vocabulary"], Int[Tensor, " positions"], Bool[Tensor, "rows time"]]:
    """Log-probabilities of what follows every token but each row's last, in float32 or the model's float64, what does follow, and where."""
    ids, mask, positions = right_padded(rows, model.device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.to(ids.device)
    real = mask[:, 1:].bool()
    return _log_softmax(logits[:, :-1][real]), ids[:, 1:][real], real


def _sum_at(logprobs: Float[Tensor, "positions vocabulary"], tokens: Int[Tensor, " positions"]) -> float:
    return float(logprobs.gather(-1, tokens[:, None]).sum(dtype=torch.float64))


def _exp(value: float) -> float:
    """exp, infinite where that is too large or ``value`` is not a number."""
    try:
        return math.inf if math.isnan(value) else math.exp(value)
    except OverflowError:
        return math.inf
