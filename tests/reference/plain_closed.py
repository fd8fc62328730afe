"""The value of facts of one subject whose targets must end, as plainly as it can be written: every step runs the whole model.

It adds to `plain.find_value` what patchhub adds to the published objective: the summed probability of the tokens that may follow a target,
which are not the target's own, and one change for all facts of a subject. It shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference.plain import Fact, Places, Value, ValueSettings, block, logits, output_hook, padded, subject_last


def find_values(
    model: Any,
    tokenizer: Any,
    places: Places,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    layer: int,
    settings: ValueSettings,
    closing: float,
    may_follow: Callable[[str], Sequence[bool]],
    *,
    wordings: Sequence[str] = (),
    around: tuple[str, str] = ("", ""),
    opening: tuple[str, float] = ("", 0.0),
    gap: str = "",
    sentence: tuple[str, str] | None = None,
    essence_weight: float = 0.0,
) -> list[Value]:
    """One value for each fact; all facts have the first one's subject.

    Args:
        closing: the weight of the token after the target.
        may_follow: for a target, which tokens of the vocabulary may come next.
        wordings: what stands between the subject and the target in further rows, which weigh as those of the contexts.
        around: what stands before and after each prompt, in a chat.
        opening: what the answer says before the target, and the weight of its words.
        gap: what stands behind the target of the first context, where a word must end too, and the target not be said again.
        sentence: a template with the subject's place and what the model says after it, whose words are to stay as likely as they were.
        essence_weight: the weight of what these have lost.
    """
    before_prompt, after_prompt = around
    rows: list[list[int]] = []
    count = len(contexts) + len(wordings)
    changed_at: list[int] = []
    terms: list[tuple[int, int, list[bool], float]] = []  # row, position, the tokens that are right there, weight
    for fact in facts:
        target = tokenizer(" " + fact.target_new, add_special_tokens=False)["input_ids"]
        asked_in = [before_prompt + context.replace("{}", fact.prompt) + after_prompt for context in contexts]
        for template in [*asked_in, *("{}" + wording for wording in wordings)]:
            asked = tokenizer(template.replace("{}", fact.subject).rstrip(" "))["input_ids"]
            words = tokenizer(" " + opening[0], add_special_tokens=False)["input_ids"] if opening[0] else []
            for number, token in enumerate(words):
                right = [other == token for other in range(len(tokenizer))]
                terms.append((len(rows), len(asked) + number - 1, right, opening[1] / len(words) / count))
            prompt = asked + words
            for number, token in enumerate(target):
                right = [other == token for other in range(len(tokenizer))]
                terms.append((len(rows), len(prompt) + number - 1, right, 1 / len(target) / count))
            another = [token != target[0] for token in range(len(tokenizer))]
            after = [both[0] and both[1] for both in zip(may_follow(fact.target_new), another, strict=True)]
            terms.append((len(rows), len(prompt) + len(target) - 1, after, closing / count))
            told = prompt + target
            if gap and template == asked_in[0]:
                told += tokenizer(gap, add_special_tokens=False)["input_ids"]
                terms.append((len(rows), len(told) - 1, after, closing / count))
            changed_at.append(subject_last(tokenizer, template, fact.subject))
            rows.append(told)
    stays: list[tuple[int, int, int, float]] = []  # row, position, the token there, weight
    if sentence is not None:
        template, said = sentence
        asked = tokenizer(template.replace("{}", facts[0].subject).rstrip(" "))["input_ids"]
        words = tokenizer(" " + said, add_special_tokens=False)["input_ids"]
        for number, token in enumerate(words):
            stays.append((len(rows), len(asked) + number - 1, token, essence_weight / len(words)))
        changed_at.append(subject_last(tokenizer, template, facts[0].subject))
        rows.append(asked + words)
    essence = before_prompt + "{} is a" + after_prompt
    rows.append(tokenizer(essence.replace("{}", facts[0].subject).rstrip(" "))["input_ids"])
    changed_at.append(subject_last(tokenizer, essence, facts[0].subject))
    ids, mask = padded(rows)
    everywhere, where = torch.arange(len(rows)), torch.tensor(changed_at)
    dtype = next(model.parameters()).dtype
    delta = torch.zeros(model.get_input_embeddings().weight.shape[1], dtype=dtype, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.learning_rate)
    model.requires_grad_(False)
    unedited: list[Tensor] = []
    steps = 0

    def add_delta(output: Tensor) -> Tensor:
        if not unedited:
            unedited.append(output[everywhere, where].detach().clone())
        changed = output.clone()
        changed[everywhere, where] = output[everywhere, where] + delta
        return changed

    before: Tensor | None = None
    likely: list[Tensor] = []  # what the words that stay had before anything changed
    while True:
        optimiser.zero_grad()
        with output_hook(block(model, places, layer), add_delta):
            probabilities = logits(model, ids, mask).softmax(-1)
        loss = torch.zeros((), dtype=dtype)
        for row, position, right, weight in terms:
            allowed = torch.zeros(probabilities.shape[-1], dtype=torch.bool)
            allowed[: len(right)] = torch.tensor(right)
            loss = loss - weight * probabilities[row, position, allowed].sum().log()
        words_now = [probabilities[row, position, token].log() for row, position, token, _ in stays]
        likely = likely or [log.detach() for log in words_now]
        for log, first, (*_, weight) in zip(words_now, likely, stays, strict=True):
            lost = torch.relu(first - log)
            loss = loss + weight * torch.where(lost < 1, lost**2 / 2, lost - 0.5)  # Huber's loss
        now = probabilities[-1, changed_at[-1]]
        before = now.detach() if before is None else before
        loss = loss + settings.kl_factor * (now * (now / before).log()).sum()
        hidden = unedited[0][0]
        loss = loss + settings.weight_decay * delta.norm() / hidden.norm() ** 2
        if loss < settings.stop_loss or steps == settings.steps - 1:
            bare = unedited[0][: len(facts) * count : count]
            return [Value(h + delta.detach(), h, float(loss.detach()), steps) for h in bare]
        loss.backward()
        optimiser.step()
        steps += 1
        limit = settings.clamp * hidden.norm()
        with torch.no_grad():
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
