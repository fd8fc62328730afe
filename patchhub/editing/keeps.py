"""Keeps: places of texts whose states must stay, recorded as columns beside those of facts; and which prompts to keep by default.

A keep is a request whose target is what is there already: its z is the present state after the last edited block, so its share is zero
at the first edited layer, and at the others what earlier layers have moved it by. Its column asks (nearly) for no change at its
key, and that is all that the solve needs to know; nothing is optimised for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from patchhub.delta import Delta
from patchhub.editing.locate import encode_prompts
from patchhub.editing.rows import KeyRow, at, key_rows, mean_keys
from patchhub.models.tracing import SidePath, Stack, right_padded
from patchhub.objects import SLOT, Request
from patchhub.text.tokens import Chat

_TOKENS = 4096  # positions of a batch

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


def keep_rows(texts: Sequence[Sequence[int]], first: int) -> list[KeyRow]:
    """Texts, each cut after the place that is kept, as the rows of requests ``first``, ``first + 1``, ..."""
    return [KeyRow(tuple(text), request, 0, 1.0) for request, text in enumerate(texts, first)]


@torch.no_grad()
def present_states(stack: Stack, texts: Sequence[Sequence[int]], layer: int) -> Float[Tensor, "n d"]:
    """What is there at the last token of each text, where the targets of facts are: float32 on the CPU.

    The hidden state after block ``layer``; where a norm comes behind the feed-forward projection, the output of that.
    """
    found = torch.zeros(len(texts), stack.architecture.d_model)
    for places in _batches(texts):
        ids, mask, positions = right_padded([texts[place] for place in places], stack.device)
        with stack.fast(), stack.watch_values([layer]) as projected:
            start = stack.begin(ids, mask, positions)
            hidden = start.run(start.hidden, 0, layer + 1)
        if stack.architecture.norm is not None:
            hidden = projected[layer]
        last = torch.tensor([len(texts[place]) - 1 for place in places])
        found[places] = at(hidden, torch.arange(len(places)), last).float().cpu()
    return found


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


def _batches(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of texts of similar length, a bounded number of positions together."""
    groups: list[list[int]] = []
    for place in sorted(range(len(texts)), key=lambda place: len(texts[place])):
        if not groups or (len(groups[-1]) + 1) * len(texts[place]) > _TOKENS:
            groups.append([])
        groups[-1].append(place)
    return groups
