"""Text that the base itself writes: context prefixes for the editors, and text for the metric when none is given.

Contexts are written by the model as it is. Documents are only measured, so they need the model's distribution and not its last digits:
they are written in bfloat16 where the processor multiplies that faster, and kept, to be continued where more is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from patchhub.cache import Cache, Kind, Slot
from patchhub.canonical import canonical_json
from patchhub.models.placement import quick, quick_type
from patchhub.models.tracing import Stack, plain_attention
from patchhub.text.tokens import tokenise

TEXT: Final = Kind("text", ".json", limit=1 << 28)
"""Documents of a base."""

# The five openings of the published MEMIT code (memit_main.py, get_context_templates).
_OPENINGS = ("The", "Therefore", "Because", "I", "You")
_BATCH, _BATCH_GPU = 128, 1024  # documents; each has numbers of its own, so they do not depend on it
_BLOCK = 256  # tokens of the vocabulary whose probabilities are summed before a draw looks into them

Choose = Callable[[Float[Tensor, "batch vocabulary"], int], Int[Tensor, " batch"]]
"""The next token of every row, given float32 logits and how many tokens were written before."""


def continue_tokens(
    stack: Stack, start: Int[Tensor, "batch time"], length: int, generator: torch.Generator
) -> Int[Tensor, "batch total"]:
    """Sample until each sequence has ``length`` tokens; ``generator`` lives on the CPU, so draws do not depend on the device."""

    def choose(logits: Float[Tensor, "batch vocabulary"], step: int) -> Int[Tensor, " batch"]:
        return torch.multinomial(logits.cpu().softmax(-1), 1, generator=generator)[:, 0]

    return continue_rows(stack, start, length, choose)


def context_templates(stack: Stack, tokenizer: Any, *, length: int = 10, seed: int = 0) -> tuple[str, ...]:
    """The contexts that a request is optimised and read in: the bare prompt and five sampled openings.

    As published: top-5 sampling up to ``length`` tokens in all from each opening, followed by ". {}". Openings of equally many tokens are
    continued together. A token is drawn as `torch.multinomial` draws it, the one that is first in a race of exponential times, with the
    times of one opening after those of the other: so the contexts of a seed are those that were drawn one by one.
    """
    generator = torch.Generator().manual_seed(seed)
    openings = [tokenise(tokenizer, [opening])[0][0] for opening in _OPENINGS]
    drawn = [
        [torch.empty(stack.vocabulary).exponential_(generator=generator) for _ in range(length - len(ids))]
        for ids in openings
    ]
    texts: dict[int, str] = {}
    for size in dict.fromkeys(map(len, openings)):
        rows = [row for row, ids in enumerate(openings) if len(ids) == size]
        race = torch.stack([torch.stack(drawn[row]) for row in rows])
        start = torch.tensor([openings[row] for row in rows])
        tokens = continue_rows(stack, start, length, _by_race(race, top_k=5))
        for row, ids in zip(rows, tokens, strict=True):
            texts[row] = tokenizer.decode(ids, skip_special_tokens=True)
    found = [texts[row].replace("{", " ").replace("}", " ").split() for row in range(len(openings))]
    return ("{}", *(" ".join(words) + ". {}" for words in found))


@dataclass(frozen=True)
class KeptText:
    """Where the documents of a base are kept, for all repositories of it.

    Attributes:
        cache: whose entries of `TEXT` they are.
        base: the base's id.
    """

    cache: Cache
    base: str


Elsewhere = Callable[[Sequence[range]], Iterator[tuple[int, list[list[int]]]]]
"""Writes documents, told by their numbers, in other processes: the place and the documents of each batch as they are finished."""


def sample_documents(
    stack: Stack,
    tokenizer: Any,
    total: int,
    *,
    length: int,
    seed: int = 0,
    kept: KeptText | None = None,
    elsewhere: Elsewhere | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """About ``total`` tokens in documents of ``length``, each begun at another random token of the vocabulary.

    Random beginnings matter: text that always starts at the end-of-text token covers far fewer of the base's keys. Tokens
    that the tokenizer puts in front of every text (``<s>``) come first. Sampling is from the whole distribution. Every document has random
    numbers of its own, so that the first ones of a longer text are a shorter one.

    Args:
        kept: where finished batches are looked for and put, so that what was interrupted goes on and nothing is sampled twice.
        elsewhere: where documents are written; None: by the model at hand. The batches are the same either way.
        progress: called with numbers of tokens, at every step, or at every batch that was written elsewhere.
    """
    text, count = _Beginnings.of(stack, tokenizer, length, seed), -(-total // length)
    quantization = str(getattr(stack.model.config, "quantization_config", None))
    model = {"dtype": str(quick_type(stack.model)), "quantization": quantization}
    slot = None if kept is None else kept.cache.slot(TEXT, base=kept.base, **model, **asdict(text))
    found = _kept_documents(slot) if slot else {}
    progress(length * sum(number < count for number in found))
    size = _BATCH if elsewhere or stack.device.type == "cpu" else _BATCH_GPU
    missing = [[number for number in batch if number not in found] for batch in _batches(count, size)]
    batches = [range(numbers[0], numbers[-1] + 1) for numbers in missing if numbers]
    if elsewhere:
        written: Iterator[tuple[range, list[list[int]]]] = ((batches[n], found) for n, found in elsewhere(batches))
    else:
        written = _written(stack, text, batches, progress)
    for numbers, documents in written:
        found |= zip(numbers, documents, strict=True)
        if elsewhere:
            progress(length * len(numbers))
        if slot:
            slot.keep([canonical_json({"first": numbers.start, "documents": documents})])
    return [found[number] for number in range(count)]


def write_documents(stack: Stack, tokenizer: Any, numbers: range, *, length: int, seed: int) -> list[list[int]]:
    """The documents with these numbers of what `sample_documents` gives."""
    text = _Beginnings.of(stack, tokenizer, length, seed)
    return [document for _, documents in _written(stack, text, [numbers]) for document in documents]


def _batches(count: int, size: int) -> list[range]:
    return [range(first, min(count, first + size)) for first in range(0, count, size)]


def _written(
    stack: Stack,
    text: _Beginnings,
    batches: Sequence[range],
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[range, list[list[int]]]]:
    """The documents of each batch, written by the model at hand."""
    if not batches:
        return
    with quick(stack.model):
        for numbers in batches:
            start, uniform = text.draw(numbers)
            progress(start.numel())
            choose = _by_cumulation(uniform.to(stack.device))
            yield numbers, continue_rows(stack, start, text.length, choose, progress=progress).tolist()


def _kept_documents(slot: Slot) -> dict[int, list[int]]:
    """The documents of a slot by their numbers."""
    found: dict[int, list[int]] = {}
    for entry in map(json.loads, slot.contents()):
        found |= enumerate(entry["documents"], entry["first"])
    return found


@dataclass(frozen=True)
class _Beginnings:
    """What documents depend on besides the model: tokens in front of each, tokens that none begins with, their length, and the seed."""

    front: tuple[int, ...]
    special: tuple[int, ...]
    vocabulary: int
    length: int
    seed: int

    @classmethod
    def of(cls, stack: Stack, tokenizer: Any, length: int, seed: int) -> _Beginnings:
        ids, offsets = tokenise(tokenizer, ["a"])[0]
        front = tuple(token for token, (begin, end) in zip(ids, offsets, strict=True) if begin == end)
        vocabulary = stack.model.config.get_text_config().vocab_size
        return cls(front, tuple(sorted(set(tokenizer.all_special_ids))), vocabulary, length, seed)

    def draw(self, documents: Iterable[int]) -> tuple[Int[Tensor, "batch time"], Float[Tensor, "batch steps"]]:
        """The first tokens of some documents, and a number from [0, 1) for each token that follows."""
        allowed = sorted(set(range(self.vocabulary)).difference(self.special))
        rows, numbers = [], []
        for place in documents:
            digest = hashlib.sha256(f"{self.seed}\0{place}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            drawn = torch.rand(max(1, self.length - len(self.front)), generator=generator, dtype=torch.float64)
            rows.append([*self.front, allowed[int(drawn[0] * len(allowed))]])
            numbers.append(drawn[1:])
        return torch.tensor(rows), torch.stack(numbers)


@torch.no_grad()
def continue_rows(
    stack: Stack,
    start: Int[Tensor, "batch time"],
    length: int,
    choose: Choose,
    *,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Int[Tensor, "batch total"]:
    """Go on from equally long texts until each has ``length`` tokens, with the model as it is; ``progress`` hears of every token."""
    cache = DynamicCache(config=stack.model.config)
    cache.layers = [_Roomy(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    latest = start.to(stack.device)
    tokens = [latest]
    with stack.fast(), plain_attention():
        for step in range(length - start.shape[1]):
            found = stack.model(input_ids=latest, past_key_values=cache, use_cache=True, logits_to_keep=1)
            latest = choose(found.logits[:, -1].float(), step).to(stack.device)[:, None]
            tokens.append(latest)
            progress(len(latest))
    return torch.cat(tokens, dim=1)


def _by_cumulation(uniform: Float[Tensor, "batch steps"]) -> Choose:
    """The token at which the cumulated probabilities pass each row's number.

    Sums of blocks are cumulated first, then the tokens of one block: a cumulated sum over a vocabulary takes ten times as long as its sum.
    """

    def choose(logits: Float[Tensor, "batch vocabulary"], step: int) -> Int[Tensor, " batch"]:
        shifted, missing = logits - logits.amax(1, keepdim=True), -logits.shape[1] % _BLOCK
        padded = functional.pad(shifted, (0, missing), value=-torch.inf) if missing else shifted
        weights = padded.exp_().view(len(logits), -1, _BLOCK)
        sums = weights.sum(-1).double().cumsum(1)
        level = uniform[:, step, None] * sums[:, -1:]
        block = torch.searchsorted(sums, level, right=True).clamp(max=sums.shape[1] - 1)
        before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
        inner = weights[torch.arange(len(logits), device=weights.device), block[:, 0]].double().cumsum(1)
        # The two sums round differently: what is left may reach the end of the block, where there may be nothing but padding.
        left = torch.minimum(level - before, torch.nextafter(inner[:, -1:], torch.zeros_like(level)))
        return (block * _BLOCK + torch.searchsorted(inner, left, right=True))[:, 0]

    return choose


def _by_race(times: Float[Tensor, "batch steps vocabulary"], top_k: int) -> Choose:
    """Of the k most probable tokens the one whose time divided by its probability is least."""

    def choose(logits: Float[Tensor, "batch vocabulary"], step: int) -> Int[Tensor, " batch"]:
        return (_truncated(logits.cpu(), top_k) / times[:, step]).argmax(-1)

    return choose


def _truncated(logits: Float[Tensor, "batch vocabulary"], top_k: int) -> Float[Tensor, "batch vocabulary"]:
    """Probabilities with everything outside the top k set to zero."""
    floor = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < floor, -torch.inf).softmax(-1)


class _Roomy(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers registers subclasses untyped
    """Keys and values of one block with room for all positions, which are not copied for each new one."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        room = [(*states.shape[:-2], self._length, states.shape[-1]) for states in (key_states, value_states)]
        self._keys, self._values = key_states.new_empty(room[0]), value_states.new_empty(room[1])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = begin + key_states.shape[-2]
        self._keys[..., begin:end, :], self._values[..., begin:end, :] = key_states, value_states
        self.keys, self.values = self._keys[..., :end, :], self._values[..., :end, :]
        return self.keys, self.values
