"""MEMIT as published (Meng et al. 2023; memit/compute_z.py, compute_ks.py, memit_main.py), as plainly as it can be written.

One fact at a time; every step runs the whole model over all positions and contexts; keys and present values are read by whole
forward passes after every layer; the solve is dense and float64 with the second moment itself. It shares no code with
the package, and is the oracle of its tests and the "one fact at a time" side of its benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

Hook = Callable[[Tensor], "Tensor | None"]


class Fact(Protocol):
    """One request: ``prompt`` with ``{}`` where the subject stands."""

    @property
    def prompt(self) -> str: ...
    @property
    def subject(self) -> str: ...
    @property
    def target_new(self) -> str: ...


class Places(Protocol):
    """Module paths: the list of blocks, and the two output projections inside a block."""

    @property
    def blocks(self) -> str: ...
    @property
    def ffn_out(self) -> str: ...
    @property
    def attn_out(self) -> str: ...


class ValueSettings(Protocol):
    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def kl_factor(self) -> float: ...
    @property
    def clamp(self) -> float: ...
    @property
    def stop_loss(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Value:
    """z (d), the unedited hidden state (d), the loss of the last forward pass and how many steps of Adam were taken."""

    target: Tensor
    hidden: Tensor
    loss: float
    steps: int


@dataclass(frozen=True, eq=False)
class Rows:
    """The contexts of one fact and then its KL prompt, padded on the right; ``labels`` is -100 where nothing is predicted."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    subject_last: Tensor
    target_length: int


@dataclass(frozen=True, eq=False)
class Written:
    """Per layer: mean keys (n, in), shares of the residual (n, out) and the change of the weight (out, in), float64."""

    keys: dict[int, Tensor]
    shares: dict[int, Tensor]
    changes: dict[int, Tensor]


def fact_rows(tokenizer: Any, fact: Fact, contexts: Sequence[str]) -> Rows:
    """compute_z.py: contexts filled with the prompt, the target's tokens but the last one behind them, and "{} is a"."""
    target = tokenizer(" " + fact.target_new, add_special_tokens=False)["input_ids"]
    texts = [context.replace("{}", fact.prompt) for context in contexts] + ["{} is a"]
    rows = [tokenizer(text.replace("{}", fact.subject))["input_ids"] for text in texts]
    rows = [row + target[:-1] for row in rows[:-1]] + [rows[-1]]
    ids, mask = padded(rows)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows[:-1]):
        labels[number, len(row) - len(target) : len(row)] = torch.tensor(target)
    return Rows(ids, mask, labels, torch.tensor([subject_last(tokenizer, t, fact.subject) for t in texts]), len(target))


def subject_last(tokenizer: Any, template: str, subject: str) -> int:
    """The index of the subject's last token, by tokenising the text up to its end."""
    return len(tokenizer(template.split("{}", maxsplit=1)[0] + subject)["input_ids"]) - 1


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@contextmanager
def output_hook(module: nn.Module, change: Hook) -> Iterator[None]:
    """While open, the hidden states that ``module`` returns pass through ``change`` (None leaves them as they are)."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = change(hidden)
        if changed is None:
            return output
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def block(model: Any, places: Places, layer: int) -> nn.Module:
    module: nn.Module = model.get_submodule(f"{places.blocks}.{layer}")
    return module


def projection(model: Any, places: Places, layer: int) -> nn.Module:
    module: nn.Module = model.get_submodule(places.ffn_module(layer))
    return module


def logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return result


def objective_parts(logits: Tensor, rows: Rows, unedited: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood per context, KL(P_delta || P_0), and the KL prompt's log-probabilities."""
    log_probs = logits[:-1].log_softmax(-1)
    chosen = log_probs.gather(2, rows.labels[:-1].clamp(min=0)[..., None])[..., 0]
    nll = -(chosen * (rows.labels[:-1] != -100)).sum(1) / rows.target_length
    essence = logits[-1, rows.subject_last[-1]][None].log_softmax(-1)
    before = essence.detach() if unedited is None else unedited
    kl = functional.kl_div(before, essence, log_target=True, reduction="batchmean")
    return nll, kl, essence


def find_value(
    model: Any,
    tokenizer: Any,
    places: Places,
    fact: Fact,
    contexts: Sequence[str],
    layer: int,
    settings: ValueSettings,
) -> Value:
    """compute_z.py: the vector at the output of block ``layer`` that makes the model say the target."""
    rows = fact_rows(tokenizer, fact, contexts)
    everywhere = torch.arange(len(rows.ids))
    width, dtype = model.get_input_embeddings().weight.shape[1], next(model.parameters()).dtype
    delta = torch.zeros(width, dtype=dtype, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.learning_rate)
    hidden, unedited, steps = torch.zeros(0), None, 0
    model.requires_grad_(False)

    def add_delta(output: Tensor) -> Tensor:
        nonlocal hidden
        if not len(hidden):
            hidden = output[0, rows.subject_last[0]].detach().clone()
        changed = output.clone()
        changed[everywhere, rows.subject_last] = output[everywhere, rows.subject_last] + delta
        return changed

    while True:
        optimiser.zero_grad()
        with output_hook(block(model, places, layer), add_delta):
            nll, kl, essence = objective_parts(logits(model, rows.ids, rows.mask), rows, unedited)
        unedited = essence.detach() if unedited is None else unedited
        decay = settings.weight_decay * delta.norm() / hidden.norm() ** 2
        loss = nll.mean() + settings.kl_factor * kl + decay
        if loss < settings.stop_loss or steps == settings.steps - 1:
            return Value(hidden + delta.detach(), hidden, float(loss.detach()), steps)
        loss.backward()
        optimiser.step()
        steps += 1
        limit = settings.clamp * hidden.norm()
        with torch.no_grad():
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())


@torch.no_grad()
def mean_key(model: Any, tokenizer: Any, places: Places, fact: Fact, contexts: Sequence[str], layer: int) -> Tensor:
    """compute_ks.py: the projection's input at the subject's last token; mean within a context type, then over the types."""
    keys = []
    for context in contexts:
        template = context.replace("{}", fact.prompt)
        ids = torch.tensor([tokenizer(template.replace("{}", fact.subject))["input_ids"]])
        seen: list[Tensor] = []
        handle = projection(model, places, layer).register_forward_pre_hook(lambda _m, args, s=seen: s.append(args[0]))
        try:
            logits(model, ids, torch.ones_like(ids))
        finally:
            handle.remove()
        keys.append(seen[0][0, subject_last(tokenizer, template, fact.subject)].double())
    types = [keys[:1], keys[1:]] if len(keys) > 1 else [keys]
    return torch.stack([torch.stack(group).mean(0) for group in types]).mean(0)


@torch.no_grad()
def present_output(model: Any, tokenizer: Any, fact: Fact, module: nn.Module) -> Tensor:
    """What ``module`` gives at the subject's last token of the bare prompt."""
    ids = torch.tensor([tokenizer(fact.prompt.replace("{}", fact.subject))["input_ids"]])
    seen: list[Tensor] = []
    with output_hook(module, seen.append):
        logits(model, ids, torch.ones_like(ids))
    return seen[0][0, subject_last(tokenizer, fact.prompt, fact.subject)].double()


@torch.no_grad()
def spread(
    model: Any,
    tokenizer: Any,
    places: Places,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    layers: Sequence[int],
    targets: Tensor,
    ridge: float,
    moments: Mapping[int, Tensor],
    *,
    measured: nn.Module,
    divisor: Callable[[int], float],
) -> Written:
    """memit_main.py: write the layers one after the other in place, measure again after each, and put the weights back.

    Args:
        targets: wanted outputs of ``measured`` (n, out).
        moments: C per layer (in, in); the normal matrix is ridge C + K K^T.
        divisor: of the residual, from the number of layers still to write.
    """
    weights = {layer: projection(model, places, layer).get_parameter("weight") for layer in layers}
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    written = Written({}, {}, {})
    try:
        for number, layer in enumerate(layers):
            keys = torch.stack([mean_key(model, tokenizer, places, f, contexts, layer) for f in facts])
            present = torch.stack([present_output(model, tokenizer, f, measured) for f in facts])
            shares = (targets.double() - present) / divisor(len(layers) - number)
            adjusted = torch.linalg.solve(ridge * moments[layer].double() + keys.T @ keys, keys.T)
            change = shares.T @ adjusted.T
            written.keys[layer], written.shares[layer], written.changes[layer] = keys, shares, change
            stored = change if isinstance(projection(model, places, layer), nn.Linear) else change.T
            weights[layer].copy_(before[layer] + stored.to(before[layer].dtype))
    finally:
        for layer, weight in weights.items():
            weight.copy_(before[layer])
    return written


def memit(
    model: Any,
    tokenizer: Any,
    places: Places,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    layers: Sequence[int],
    settings: ValueSettings,
    ridge: float,
    moments: Mapping[int, Tensor],
) -> tuple[list[Value], Written]:
    """The whole edit: values one by one, then the spread with equal shares of what is still missing."""
    last = layers[-1]
    values = [find_value(model, tokenizer, places, fact, contexts, last, settings) for fact in facts]
    written = spread(
        model,
        tokenizer,
        places,
        facts,
        contexts,
        layers,
        torch.stack([value.target for value in values]),
        ridge,
        moments,
        measured=block(model, places, last),
        divisor=float,
    )
    return values, written
