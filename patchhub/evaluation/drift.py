"""Drift: how far a model's next-token predictions have moved from the base's on text that has nothing to do with the edits.

As scores: perplexity ratio and KL over documents, with intervals; and fluency, which shows how varied the words of generated text are,
as in ROME's evaluation. Repetition, the sign of a broken model, scores low."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from patchhub.errors import RequestError
from patchhub.evaluation.metrics import BATCH_TOKENS, cut, reading
from patchhub.evaluation.suites import Combined, Scores, scored
from patchhub.models.tracing import right_padded

ENTRIES: Final = 1 << 25
"""Log-probabilities that are held at once: 128 MiB in float32."""
_SAME: Final = 1e-2  # relative to the largest logit; bfloat16 rounds by less, a cap on logits changes more


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


def _log_softmax(logits: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n vocabulary"]:
    """In float32, or float64 where the logits are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _sum_at(logprobs: Float[Tensor, "positions vocabulary"], tokens: Int[Tensor, " positions"]) -> float:
    return float(logprobs.gather(-1, tokens[:, None]).sum(dtype=torch.float64))


def _exp(value: float) -> float:
    """exp, infinite where that is too large or ``value`` is not a number."""
    try:
        return math.inf if math.isnan(value) else math.exp(value)
    except OverflowError:
        return math.inf


def drift_scores(documents: Sequence[DocumentDrift], *, resamples: int = 1000, seed: int = 0) -> Scores:
    """perplexity_ratio and kl per token over all documents; the records of their intervals are the documents."""
    columns = {
        "growth": [document.growth for document in documents],
        "divergence": [document.divergence for document in documents],
        "positions": [float(document.positions) for document in documents],
    }
    combined = {
        "perplexity_ratio": Combined(("growth", "positions"), _exp_of_ratio),
        "kl": Combined(("divergence", "positions"), _ratio),
    }
    scores = scored("drift", {}, columns, combined, resamples=resamples, seed=seed)
    shown = {name: found for name, found in scores.estimates.items() if name in combined}
    return Scores(scores.suite, scores.settings, shown, {}, {})


def _ratio(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 2) to (...)."""
    return np.asarray(means[..., 0] / means[..., 1])


def _exp_of_ratio(means: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.exp(_ratio(means)))


WEIGHTS: Final[Mapping[int, float]] = {2: 2 / 3, 3: 4 / 3}
"""The weight of each n-gram length; their mean is 1."""

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Runs of letters and digits, and every other visible character by itself."""
    return _WORD.findall(text)


def entropy(items: Sequence[str], n: int) -> float:
    """The entropy in bits of the n-grams of `items`, H = -sum_g p(g) log2 p(g); 0 where there is no n-gram."""
    counts = Counter(tuple(items[start : start + n]) for start in range(len(items) - n + 1))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


def fluency(text: str) -> float:
    """The mean of 2/3 H(bigrams) and 4/3 H(trigrams) of a text, in bits."""
    found = words(text)
    return sum(weight * entropy(found, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def fluency_scores(texts: Sequence[str | None], *, resamples: int = 1000, seed: int = 0) -> Scores:
    """fluency, the mean over texts; None stands for a record that has no text."""
    column = [None if text is None else fluency(text) for text in texts]
    return scored("fluency", {}, {"fluency": column}, {}, resamples=resamples, seed=seed)
