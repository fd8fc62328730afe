"""`blame`: how much each active request, and each patch, moves the answer to a prompt.

One pass of the model gives the key k of every edited weight at one token of the prompt. With D = sum_i b_i u_i^T, request i
moves the weight's output there by c_i = b_i (u_i^T k), and

    share_i = sum over weights of ||c_i||  /  sum over weights of ||D k||,

for a patch with c summed over its requests first (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from patchhub.constraints import responsibilities
from patchhub.editing.chat import Chat
from patchhub.editing.locate import encode_text
from patchhub.errors import RequestError, RevisionError
from patchhub.models.architectures import describe, read_config
from patchhub.models.tokenizer import load_tokenizer
from patchhub.models.tracing import Stack, right_padded
from patchhub.objects import Element, Request
from patchhub.porcelain.chat_form import chat_form
from patchhub.porcelain.columns import read_columns
from patchhub.porcelain.facts import active_requests, places_of
from patchhub.porcelain.history import request_json
from patchhub.porcelain.loading import main_state_at, open_base
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.search import fact_json, mentioned
from patchhub.porcelain.shards import without_shards
from patchhub.runtime.patched_model import attach
from patchhub.store.lookup import Fact
from patchhub.store.repository import Repository

Keys = Mapping[str, Float[np.ndarray, " in"]]


@dataclass(frozen=True)
class Share:
    """One active request: its share of the change at the prompt's key, and its text unless that is withheld."""

    patch: str
    request_id: str
    share: float
    request: Request | None

    def to_json(self) -> dict[str, Any]:
        text = {"id": self.request_id} if self.request is None else request_json(self.request)
        return {"patch": self.patch, "share": self.share, **text}


@dataclass(frozen=True)
class Blame:
    """Who moves the answer to a prompt.

    Attributes:
        commit: the revision asked.
        token: the token of the prompt whose keys were read, and its position in what the model read.
        answer: the likeliest next token there and its probability.
        change: per weight, ||D k|| over ||W0 k + D k||: how much of the output at that key is the edits'.
        requests, patches: shares, the largest first.
        mentioned: active facts whose subject is in the prompt; those of exactly this text first.
        shards: how many active facts are in shards, which answer beside the weights and have no share in their change.
        chat: the form in which the prompt was asked; None: as it is.
    """

    commit: str
    prompt: str
    token: tuple[str, int]
    answer: tuple[str, float]
    change: Mapping[str, float]
    requests: tuple[Share, ...]
    patches: Mapping[str, float]
    mentioned: tuple[Fact, ...]
    shards: int = 0
    chat: Chat | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "mentioned": [fact_json(fact) for fact in self.mentioned],
            "requests": [share.to_json() for share in self.requests],
        }


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one pass of the patched model gives at one token: keys and outputs per edited weight, and the answer; in which form it was."""

    keys: Keys
    outputs: Mapping[str, float]
    token: tuple[str, int]
    answer: tuple[str, float]
    chat: Chat | None


def blame(
    repository: Repository,
    prompt: str,
    progress: Progress,
    *,
    subject: str | None = None,
    revision: str = "HEAD",
    base: str | None = None,
    chat: bool | None = None,
) -> Blame:
    """Split the change at a prompt's key among the active requests.

    Args:
        subject: read the keys at the last token of this part of the prompt. Default: of the longest subject of an active fact that is
            in the prompt, since that is where facts are written; without one, the prompt's last token.
        chat: the prompt is the user's message of the base's chat form; None: as the repository's config says.

    Raises:
        RevisionError: no such revision, or nothing is active there.
        RequestError: the subject is not in the prompt.
        SettingsError: it is to be asked in a chat, and the base has no chat template that can be used.
    """
    prompt = prompt.strip()
    commit = repository.resolve(revision)
    elements = repository.active(commit)
    columns_alone = without_shards(repository, elements)
    if commit is None or not columns_alone:
        shards = ", and those in shards answer beside the weights" if elements else ""
        raise RevisionError(
            f"no fact in the weights is active at {revision}{shards}",
            remedy="Name a revision with facts in its weights.",
        )
    facts = mentioned(repository, prompt, revision)
    place = subject if subject is not None else next((fact.subject for fact in facts), None)
    columns = read_columns(repository, elements)
    reading = _read(repository, prompt, place, sorted(columns), revision, base, chat, progress)
    contributions = {
        weight: responsibilities(found) * (found.preimages.astype(np.float64) @ reading.keys[weight])[:, None]
        for weight, found in columns.items()
    }
    changes = {weight: float(np.linalg.norm(rows.sum(0))) for weight, rows in contributions.items()}
    owners = {weight: _owners(repository, elements, weight) for weight in columns}
    whole = sum(changes.values()) or 1.0
    requests = _norms(contributions, owners)
    patches = _norms(contributions, {weight: [(patch, None) for patch, _ in found] for weight, found in owners.items()})
    texts = active_requests(repository, elements)
    shares = [Share(e[0], str(e[1]), norm / whole, texts.get(e)) for e, norm in requests.items()]
    return Blame(
        commit,
        prompt,
        reading.token,
        reading.answer,
        {weight: changes[weight] / (reading.outputs[weight] or 1.0) for weight in changes},
        tuple(sorted(shares, key=lambda share: (-share.share, share.request_id))),
        {patch: norm / whole for (patch, _), norm in sorted(patches.items(), key=lambda item: -item[1])},
        tuple(facts),
        len(places_of(repository, elements - columns_alone)),
        reading.chat,
    )


def _owners(repository: Repository, elements: frozenset[Element], weight: str) -> list[Element]:
    """Whose column each row of `read_columns` is, for one weight."""
    ordered = sorted((patch, request) for patch, request in elements if request is not None)
    return [element for element in ordered if weight in repository.patch(element[0]).weights]


def _norms(
    contributions: Mapping[str, Float[np.ndarray, "n out"]], owners: Mapping[str, Sequence[Element]]
) -> dict[Element, float]:
    """For each owner, the norm of the sum of its rows, summed over weights."""
    norms: dict[Element, float] = {}
    for weight, rows in contributions.items():
        places = {owner: number for number, owner in enumerate(dict.fromkeys(owners[weight]))}
        sums = np.zeros((len(places), rows.shape[1]))
        np.add.at(sums, [places[owner] for owner in owners[weight]], rows)
        for owner, norm in zip(places, np.linalg.norm(sums, axis=1).tolist(), strict=True):
            norms[owner] = norms.get(owner, 0.0) + norm
    return norms


@torch.no_grad()
def _read(
    repository: Repository,
    prompt: str,
    subject: str | None,
    weights: Sequence[str],
    revision: str,
    base: str | None,
    chat: bool | None,
    progress: Progress,
) -> _Reading:
    checkpoint = open_base(repository, base)
    progress.stage("loading the base", 0)
    tokenizer = load_tokenizer(checkpoint)
    form = chat_form(repository, tokenizer, chat)
    ids, place = _place(tokenizer, prompt, subject, form)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, local_files_only=True)
    attach(model, checkpoint, main_state_at(repository, revision))
    architecture = describe(read_config(checkpoint.folder))
    stack = Stack(model, architecture)
    layers = [layer for layer in range(architecture.n_layers) if architecture.ffn_weight(layer) in weights]
    outputs: dict[int, float] = {}
    handles = [stack.ffn_out[layer].register_forward_hook(_keep_norm(outputs, layer, place)) for layer in layers]
    batch = right_padded([ids], stack.device)
    with stack.watch_keys(layers) as seen:
        logits = model(input_ids=batch[0], attention_mask=batch[1]).logits[0, -1]
    for handle in handles:
        handle.remove()
    best = logits.float().softmax(-1).max(-1)
    progress.close()
    return _Reading(
        {architecture.ffn_weight(layer): seen[layer][0, place].double().cpu().numpy() for layer in layers},
        {architecture.ffn_weight(layer): outputs[layer] for layer in layers},
        (str(tokenizer.decode([ids[place]])), place),
        (str(tokenizer.decode([int(best.indices)])), float(best.values)),
        form,
    )


def _keep_norm(outputs: dict[int, float], layer: int, place: int) -> Any:
    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        outputs[layer] = float(output.reshape(-1, output.shape[-1])[place].float().norm())  # OPT: (time, d)

    return keep


def _place(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str | None, chat: Chat | None
) -> tuple[tuple[int, ...], int]:
    """The tokens that ask the prompt, and the index of its subject's last one (of the last of the whole prompt without a subject)."""
    if not prompt:
        raise RequestError("the prompt is empty", remedy="Write the beginning of a sentence.")
    part = prompt if subject is None else subject
    start = prompt.find(part) if part else -1
    if start < 0:
        raise RequestError(
            f"the subject {subject!r} is not in the prompt {prompt!r}",
            remedy="Write it as it stands in the prompt, or leave --subject out.",
        )
    encoded = encode_text(tokenizer, prompt, (start, start + len(part)), chat=chat)
    return encoded.input_ids, encoded.subject_last
