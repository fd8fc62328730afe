"""Text that the base itself writes: context prefixes for the editors, and text for the metric when none is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from patchhub.models.tracing import Stack
from patchhub.text.tokens import tokenise

# The five openings of the published MEMIT code (memit_main.py, get_context_templates).
_OPENINGS = ("The", "Therefore", "Because", "I", "You")
_BATCH = 128


@torch.no_grad()
def continue_tokens(
    stack: Stack,
    start: Int[Tensor, "batch time"],
    length: int,
    generator: torch.Generator,
    *,
    top_k: int | None = None,
) -> Int[Tensor, "batch total"]:
    """Sample until each sequence has ``length`` tokens; ``generator`` lives on the CPU, so draws do not depend on the device."""
    cache = DynamicCache(config=stack.model.config)
    tokens, latest = start.to(stack.device), start.to(stack.device)
    while tokens.shape[1] < length:
        with stack.fast():
            logits = stack.model(input_ids=latest, past_key_values=cache, use_cache=True).logits[:, -1].float().cpu()
        latest = torch.multinomial(_truncated(logits, top_k), 1, generator=generator).to(stack.device)
        tokens = torch.cat([tokens, latest], dim=1)
    return tokens


def context_templates(stack: Stack, tokenizer: Any, *, length: int = 10, seed: int = 0) -> tuple[str, ...]:
    """The contexts that a request is optimised and read in: the bare prompt and five sampled openings.

    As published: top-5 sampling up to ``length`` tokens in all from each opening, followed by ". {}".
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for opening in _OPENINGS:
        start = torch.tensor([tokenise(tokenizer, [opening])[0][0]])
        tokens = continue_tokens(stack, start, length, generator, top_k=5)
        text = tokenizer.decode(tokens[0], skip_special_tokens=True)
        found.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return ("{}", *found)


def sample_documents(
    stack: Stack,
    tokenizer: Any,
    total: int,
    *,
    length: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """About ``total`` tokens in documents of ``length``, each begun at another random token of the vocabulary.

    Random beginnings matter: text that always starts at the end-of-text token covers far fewer of the base's keys. Tokens
    that the tokenizer puts in front of every text (``<s>``) come first. Sampling is from the whole distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = stack.model.config.get_text_config().vocab_size
    allowed = torch.tensor(sorted(set(range(vocabulary)) - set(tokenizer.all_special_ids)))
    ids, offsets = tokenise(tokenizer, ["a"])[0]
    front = [token for token, (begin, end) in zip(ids, offsets, strict=True) if begin == end]
    documents: list[list[int]] = []
    while len(documents) * length < total:
        rows = min(_BATCH, -(-(total - len(documents) * length) // length))
        begun = allowed[torch.randint(len(allowed), (rows, 1), generator=generator)]
        start = torch.cat([torch.tensor([front] * rows, dtype=torch.long), begun], dim=1)
        documents += continue_tokens(stack, start, length, generator).tolist()
        progress(rows * length)
    return documents


def _truncated(logits: Float[Tensor, "batch vocabulary"], top_k: int | None) -> Float[Tensor, "batch vocabulary"]:
    """Probabilities with everything outside the top k set to zero."""
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits.softmax(-1)
