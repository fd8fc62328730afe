"""Wordings: what the base itself writes after a subject's name, up to where the answer of a fact may stand.

A value that was optimised behind one prompt is seldom said behind others: "The mother tongue of Danielle Darrieux is" teaches little to
"Danielle Darrieux, a". So the target is optimised at such places as well. They are found without a list of phrases in any language: the
base goes on from the subject in each of the ways that it finds likely, and a place is one where it finds the fact's answer likely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.editing.keeps import NAMES
from patchhub.editing.locate import encode_targets
from patchhub.models.tracing import Stack
from patchhub.objects import Request
from patchhub.text.sampling import continue_rows
from patchhub.text.tokens import Closers, context_length, tokenise

_BRANCHES: Final = 24
"""Ways to go on from a subject, each begun by another token."""
_STEPS: Final = 6
"""Tokens of each, after its first."""
_LEAST: Final = 0.01
"""What the base gives at least to the answer's first token at a place."""
_COMMON: Final = 0.002
"""What the base gives at most to a token that tells a place, after other names: "the" and "2" are no answers."""
_TELLING: Final = 3
"""Characters that the first of several tokens has at least, to tell a place."""
_OTHERS: Final = 8
"""Names of other kinds."""
_ROWS: Final = 240
"""Texts that are continued at a time."""

Tokens = tuple[int, ...]


@torch.no_grad()
def find_wordings(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], most: int
) -> dict[str, tuple[str, ...]]:
    """Texts that lead from the subject to the target, at most so many for each request that has any, by request id.

    A place counts where the base gives at least a hundredth to the first token of the true answer or of the target; those come first
    where it gives most. Where a record does not say what is true, the base's own answer to the prompt stands for it.
    """
    closers = Closers.of(tokenizer, stack.vocabulary)
    goes_on = torch.tensor([bool(text) and "\n" not in text for text in closers.texts])
    subjects = [ids for ids, _ in tokenise(tokenizer, [request.subject for request in requests])]
    room = context_length(stack.model) - 1 - _STEPS
    fitting = [n for n, request in enumerate(requests) if len(tokenise(tokenizer, [request.text])[0][0]) <= room]
    common = _common(stack, tokenizer, closers.after(NAMES[0]) & goes_on)
    sought = _sought(stack, tokenizer, requests, fitting, common)
    found: dict[str, tuple[str, ...]] = {}
    for group in _of_one_length(subjects, [n for n in fitting if sought[n]], _ROWS // _BRANCHES):
        begins = torch.stack([closers.after(requests[n].subject) & goes_on for n in group])
        branches = _branches(stack, tokenizer, begins, [(requests[n], subjects[n], sought[n]) for n in group])
        for number, places in zip(group, branches, strict=True):
            best = dict.fromkeys(text for _, text in sorted(places, reverse=True))
            if best:
                found[requests[number].id] = tuple(best)[:most]
    return found


def _of_one_length(texts: Sequence[Tokens], numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """The numbers of texts that are equally long, so many at a time."""
    ordered = sorted(numbers, key=lambda number: len(texts[number]))
    for _, alike in groupby(ordered, key=lambda number: len(texts[number])):
        rest = list(alike)
        yield from (rest[start : start + size] for start in range(0, len(rest), size))


def _common(
    stack: Stack, tokenizer: PreTrainedTokenizerBase, begins: Bool[Tensor, " vocabulary"]
) -> Bool[Tensor, " vocabulary"]:
    """The tokens that the base finds likely soon after names of any kind."""
    seen: list[Tensor] = []

    def choose(logits: Float[Tensor, "rows vocabulary"], step: int) -> Int[Tensor, " rows"]:
        seen.append(logits.softmax(-1).mean(0))
        return logits.argmax(-1)

    names = [ids for ids, _ in tokenise(tokenizer, NAMES[:: len(NAMES) // _OTHERS])]
    for group in _of_one_length(names, range(len(names)), _ROWS // _BRANCHES):
        start = torch.tensor([names[number] for number in group])
        opened = _opened(stack, start, begins.expand(len(group), -1))
        continue_rows(stack, opened, opened.shape[1] + 1, choose)
    return torch.stack(seen).mean(0).cpu() > _COMMON


def _sought(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    numbers: Sequence[int],
    common: Bool[Tensor, " vocabulary"],
) -> dict[int, Tokens]:
    """The tokens that tell a place of each request: the first of the target's and of the true or the base's own answer's."""

    def telling(ids: list[int]) -> Tokens:
        text = str(tokenizer.decode(ids[:1])).strip()
        enough = text[:1].isalnum() and (len(ids) == 1 or len(text) >= _TELLING)
        return (ids[0],) if enough and not common[ids[0]] else ()

    found: dict[int, Tokens] = {}
    for number in numbers:
        request = requests[number]
        answers = [answer for answer in (request.target_new, request.target_true) if answer]
        read = encode_targets(tokenizer, [(request.text, answer) for answer in answers])
        found[number] = tuple(token for text in read for token in telling(list(text.input_ids[text.target[0] :])))
    texts = [ids for ids, _ in tokenise(tokenizer, [request.text for request in requests])]
    for group in _of_one_length(texts, [n for n in numbers if not requests[n].target_true], _ROWS):
        start = torch.tensor([texts[number] for number in group])
        written = continue_rows(stack, start, start.shape[1] + 2, lambda logits, step: logits.argmax(-1))
        for number, own in zip(group, written[:, -2:].tolist(), strict=True):
            found[number] += telling(own)
    return found


def _opened(
    stack: Stack, start: Int[Tensor, "names time"], begins: Bool[Tensor, "names vocabulary"]
) -> Int[Tensor, "rows more"]:
    """Each name with one more token, in the likeliest ways, one name after the other."""
    found: list[Tensor] = []

    def choose(logits: Float[Tensor, "names vocabulary"], step: int) -> Int[Tensor, " names"]:
        found.append(logits.masked_fill(~begins.to(logits.device), -torch.inf).topk(_BRANCHES).indices.cpu())
        return logits.argmax(-1)

    continue_rows(stack, start, start.shape[1] + 1, choose)
    return torch.cat([start.repeat_interleave(_BRANCHES, 0), found[0].reshape(-1, 1)], dim=1)


def _branches(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    begins: Bool[Tensor, "requests vocabulary"],
    asked: Sequence[tuple[Request, Tokens, Tokens]],
) -> list[list[tuple[float, str]]]:
    """The places of some requests, whose subjects have equally many tokens: likelihood, and text after the subject.

    Args:
        begins: the tokens with which a text may go on from each subject.
        asked: each request with the tokens of its subject and those that tell a place.
    """
    width = max(len(sought) for _, _, sought in asked)
    sought = torch.tensor([[*tokens, *[tokens[0]] * (width - len(tokens))] for _, _, tokens in asked])
    sought = sought.repeat_interleave(_BRANCHES, 0).to(stack.device)
    heard: list[Tensor] = []

    def choose(logits: Float[Tensor, "rows vocabulary"], step: int) -> Int[Tensor, " rows"]:
        heard.append((logits.gather(1, sought).amax(1) - logits.logsumexp(1)).exp().cpu())
        return logits.argmax(-1)

    opened = _opened(stack, torch.tensor([subject for _, subject, _ in asked]), begins)
    rows = continue_rows(stack, opened, opened.shape[1] + _STEPS, choose).view(len(asked), _BRANCHES, -1).tolist()
    likely = torch.stack(heard, 1).view(len(asked), _BRANCHES, _STEPS)
    return [
        list(_places(tokenizer, request, opened.shape[1], texts, chances))
        for (request, _, _), texts, chances in zip(asked, rows, likely, strict=True)
    ]


def _places(
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    begin: int,
    texts: Sequence[list[int]],
    likely: Float[Tensor, "branches steps"],
) -> Iterator[tuple[float, str]]:
    """The best place of each branch, if it is one; each text has ``begin`` tokens before the first place."""
    for ids, probs in zip(texts, likely, strict=True):
        chance, step = probs.max(0)
        if float(chance) < _LEAST:
            continue
        text = str(
            tokenizer.decode(ids[: begin + int(step)], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        wording = text.removeprefix(request.subject).rstrip(" ")
        if text.startswith(request.subject) and wording and "\n" not in wording and request.target_new not in wording:
            yield float(chance), wording
