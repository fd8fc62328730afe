"""Prompts that an edit finds by itself: keeps, which must stay as they are, and wordings, in which a fact is written as well.

A keep is a request whose target is what is there already: its z is the present state after the last edited block, so its share is zero
at the first edited layer, and at the others what earlier layers have moved it by. Its column asks (nearly) for no change at its
key, and that is all that the solve needs to know; nothing is optimised for it.

A wording is what the base itself writes after a subject's name, up to where the answer of a fact may stand. A value that was optimised
behind one prompt is seldom said behind others: "The mother tongue of Danielle Darrieux is" teaches little to "Danielle Darrieux, a". So the
target is optimised at such places as well. They are found without a list of phrases in any language: the base goes on from the subject in
each of the ways that it finds likely, and a place is one where it finds the fact's answer likely."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.delta import Delta
from patchhub.editing.locate import encode_prompts, encode_targets
from patchhub.editing.rows import key_rows, mean_keys
from patchhub.models.tracing import SidePath, Stack, right_padded
from patchhub.objects import SLOT, Request
from patchhub.text.sampling import continue_rows
from patchhub.text.tokens import Chat, Closers, context_length, tokenise

_TOKENS = 4096  # positions of a batch
_FIRST_WORDS: Final = ("Northern", "Albert", "Royal", "Tokyo")

NAMES: Final = (
    *(
        "France",
        "Germany",
        "Japan",
        "Egypt",
        "Brazil",
        "Norway",
        "India",
        "Kenya",
        "Poland",
        "Peru",
        "Uzbekistan",
        "Canada",
    ),
    *("Paris", "London", "Tokyo", "Cairo", "Chicago", "Moscow", "Sydney", "Barcelona"),
    *("Microsoft", "Toyota", "Sony", "Nestlé", "Boeing", "IBM", "BBC", "Air France"),
    *("iPhone", "Ford Mustang", "Windows 95", "PlayStation 2", "Boeing 747", "Gmail"),
    *("Albert Einstein", "William Shakespeare", "Leo Tolstoy", "Marie Curie", "Victor Hugo", "Wolfgang Amadeus Mozart"),
    *("Barack Obama", "Napoleon", "Lionel Messi", "Michael Jordan", "Elvis Presley", "Angela Merkel", "Muhammad Ali"),
    *("Macbeth", "War and Peace", "Star Wars", "The Simpsons", "Harry Potter", "The Beatles", "Mona Lisa"),
    *("Oxford University", "Harvard University", "Amazon River", "Mount Everest", "Eiffel Tower", "Roman Empire"),
    *("Christianity", "Buddhism", "English", "Latin", "Python", "piano", "gold", "tiger"),
)
"""Subjects that a base is likely to know, of many kinds: those are kept that are of a fact's kind, as their keys tell."""


@torch.no_grad()
def most_moved(
    stack: Stack, changes: Mapping[int, Delta], documents: Sequence[Sequence[int]], count: int
) -> list[tuple[int, ...]]:
    """The ``count`` texts, each cut after one of its tokens, where the changes of the edited weights add most to the residual stream.

    A place's score is || sum over layers of phi(y + dW k) - phi(y) || at the keys of the present weights, with phi what stands behind
    the projection and y its output; the text up to it is what it is read in.
    """
    layers = sorted(changes)
    paths = {layer: SidePath([changes[layer]]) for layer in layers}
    scores: list[tuple[float, int, int]] = []
    for places in _batches(documents):
        ids, mask, positions = right_padded([documents[place] for place in places], stack.device)
        with stack.fast(), stack.watch_keys(layers) as keys, stack.watch_values(layers) as projected:
            start = stack.begin(ids, mask, positions)
            start.run(start.hidden, 0, layers[-1] + 1)
        zero = torch.zeros(*ids.shape, stack.architecture.d_model)
        moved = zero
        for layer in layers:
            behind, y = stack.behind(layer), projected[layer].float()
            added = paths[layer](stack.ffn_out[layer], (keys[layer],), zero.to(y.device))
            moved = moved + (behind(added) if behind.gain is None else behind(y + added) - behind(y)).cpu()
        norms = moved.norm(dim=-1)
        scores += [
            (-float(norms[row, column]), place, column)
            for row, place in enumerate(places)
            for column in range(len(documents[place]))
        ]
    return [tuple(documents[place][: column + 1]) for _, place, column in sorted(scores)[:count]]


def siblings(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    layer: int,
    preimages: Callable[[Float[Tensor, "n in"]], Float[Tensor, "n in"]],
    most: int,
    *,
    names: Sequence[str] = NAMES,
    chat: Chat | None = None,
) -> list[tuple[str, str]]:
    """For each prompt of the requests, the names that are nearest to its subjects when they stand in their place: pairs (prompt, name).

    Two subjects are the nearer, the greater <k, C^-1 k'> / sqrt(<k, C^-1 k> <k', C^-1 k'>) is of their keys at ``layer``: what an edit
    moves at a key that it was not written at. Names that are subjects of the prompt, or parts of one, are left out.

    Args:
        preimages: C^-1 k of keys.
        most: names for a prompt.
    """
    prompts: dict[str, list[str]] = {}
    for request in requests:
        prompts.setdefault(request.prompt, []).append(request.subject)
    asked = [Request.make(prompt, subject, ".") for prompt, own in prompts.items() for subject in own]
    for prompt, own in prompts.items():
        asked += [Request.make(prompt, name, ".") for name in names if not any(name in subject for subject in own)]
    if not asked:
        return []
    rows = encode_prompts(tokenizer, [(SLOT, request) for request in asked], with_target=False, chat=chat)
    keys = mean_keys(stack, layer, key_rows([[row] for row in rows]))
    inverse = preimages(keys).double()
    lengths = (keys * inverse).sum(1).clamp(min=1e-12).sqrt()
    found, begun = [], len(requests)
    for prompt in prompts:
        places = [place for place in range(begun, len(asked)) if asked[place].prompt == prompt]
        mine = [place for place in range(begun) if asked[place].prompt == prompt]
        near = (keys[places] @ inverse[mine].T / lengths[places][:, None] / lengths[mine]).max(1).values
        chosen = near.topk(min(most, len(places))).indices.tolist()
        found += [(prompt, asked[places[place]].subject) for place in sorted(chosen)]
    return found


def namesakes(requests: Sequence[Request]) -> list[tuple[str, str]]:
    """For each prompt of the requests, other names that end in its subjects' last words: pairs (prompt, name).

    An edit is written at the subject's last token, whose key depends on the words before it so little that most such names get the new
    target too (docs/methods.md). A subject of one word has none.
    """
    found: dict[tuple[str, str], None] = {}
    for request in requests:
        before, _, last = request.subject.rpartition(" ")
        found |= {(request.prompt, f"{first} {last}"): None for first in _FIRST_WORDS if before}
    return [pair for pair in found if pair not in {(request.prompt, request.subject) for request in requests}]


def _batches(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of texts of similar length, a bounded number of positions together."""
    groups: list[list[int]] = []
    for place in sorted(range(len(texts)), key=lambda place: len(texts[place])):
        if not groups or (len(groups[-1]) + 1) * len(texts[place]) > _TOKENS:
            groups.append([])
        groups[-1].append(place)
    return groups


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
