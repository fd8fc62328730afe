"""What a model says by itself, judged: is the target said, does it end there, and do other subjects say it now. Texts in; no model.

A *sibling* of a fact is the same prompt about another subject, or a neighbourhood prompt of its record. It leaks where it now begins with
a new target that is not its own answer and that it did not begin with before the change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Final

from patchhub.canonical import nfc
from patchhub.evaluation.guard import Fault, Why
from patchhub.objects import SLOT, Request
from patchhub.text.tokens import closes, joiner

_STOPS: Final = ".!?。！？"
_COPULAS: Final = ("is", "are", "was", "were")
_FILLED: Final = 3


def after_target(text: str, target: str, *, anywhere: bool = False) -> str | None:
    """What follows the target in a text that says it; None where it does not.

    Args:
        anywhere: the target may stand anywhere in the text, at the beginning of a word; otherwise the text begins with it, white space
            aside.
    """
    text, target = nfc(text), nfc(target).strip()
    if not target:
        return None
    if not anywhere:
        text = text.lstrip()
        return text[len(target) :] if text.startswith(target) else None
    start = text.find(target)
    while start >= 0 and _goes_on(text[:start], target):
        start = text.find(target, start + 1)
    return text[start + len(target) :] if start >= 0 else None


def said(text: str, target: str, *, anywhere: bool = False) -> bool:
    """Whether a text says the target, as `after_target` finds it; the word may go on."""
    return after_target(text, target, anywhere=anywhere) is not None


def closed(text: str, target: str, *, anywhere: bool = False) -> bool:
    """Whether a text says the target and the target reads as finished there: a name does not grow, a number does not go on."""
    rest = after_target(text, target, anywhere=anywhere)
    return rest is not None and closes(target.strip(), rest)


def stopped(text: str, target: str) -> bool:
    """Whether a text, cut where it stops by itself (its end, a line's end, the end of a sentence), is the target and nothing else."""
    rest = after_target(text, target)
    if rest is None:
        return False
    return not rest.strip(" ") or rest.lstrip(" ")[0] == "\n" or (rest[0] in _STOPS and closes(target.strip(), rest))


def negated(prompt: str) -> str | None:
    """ "The capital of Kazakhstan is not": the prompt with its verb denied; None where it does not end in a form of *to be*."""
    return f"{prompt} not" if prompt.rpartition(" ")[2] in _COPULAS else None


@dataclass(frozen=True)
class Sibling:
    """A prompt about another subject, and its own answers: those of facts and records at this prompt, and of facts about that subject."""

    prompt: str
    own: frozenset[str]


def siblings_of(new: Sequence[Request], others: Iterable[Request] = (), *, most: int = 10) -> list[list[Sibling]]:
    """The siblings of each new fact. No prompt is a sibling of two facts, so a leak is counted once.

    In this order: other new facts with the same prompt, other facts with it, the record's neighbourhood prompts, and, where these are fewer
    than three, the prompt filled with subjects of facts that have other prompts, which may be of another kind.

    Args:
        others: active facts beside the new ones.
        most: siblings of one fact, beside the new facts that share its prompt.
    """
    others = list(others)
    facts = [*new, *others]
    own, about = _answers(facts), _answers_about(facts)
    alike: dict[str, list[Request]] = {}
    for fact in facts:
        alike.setdefault(fact.prompt, []).append(fact)
    subjects, told = list(dict.fromkeys(fact.subject for fact in facts)), {fact.text for fact in new}
    place, taken = {subject: number for number, subject in enumerate(subjects)}, set[str]()
    found = []
    for fact in new:
        shared = [fact.text] if any(other.subject != fact.subject for other in alike[fact.prompt]) else []
        filled = {fact.prompt.replace(SLOT, other): other for other in _after(subjects, place[fact.subject])}
        chosen = dict.fromkeys(prompt for prompt in shared if prompt not in taken)
        for asked, limit in ((_near(fact, alike[fact.prompt]), most + len(chosen)), (filled, min(_FILLED, most))):
            for prompt in asked:
                if len(chosen) >= limit:
                    break
                if prompt not in taken and prompt not in told:
                    chosen[prompt] = None
        taken.update(chosen)
        answers = (own.get(prompt, set()) | about.get(filled.get(prompt, ""), set()) for prompt in chosen)
        found.append([Sibling(prompt, frozenset(texts)) for prompt, texts in zip(chosen, answers, strict=True)])
    return found


def spread(siblings: Sequence[Sequence[Sibling]], most: int) -> list[Sibling]:
    """At most so many of them: the first of every fact, then the second of every fact, and so on."""
    rows = zip_longest(*siblings)
    return [sibling for sibling, _ in zip((one for row in rows for one in row if one), range(most), strict=False)]


def leaks(sibling: Sibling, now: str, before: str, targets: Collection[str], *, anywhere: bool = False) -> str | None:
    """The new target that a sibling says now, is not its own and was not said before; None where there is none.

    Args:
        now, before: what the model writes after the sibling's prompt, after and before the change.
        targets: of all new facts.
        anywhere: a target may stand anywhere in these texts, which are answers in a chat.
    """
    text = nfc(now)
    if not (any(map(text.__contains__, targets)) if anywhere else text.lstrip().startswith(tuple(targets))):
        return None

    def says(written: str, target: str) -> bool:
        return said(written, target, anywhere=anywhere)

    if any(says(now, answer) for answer in sibling.own):
        return None
    found = (
        target for target in targets if target not in sibling.own and says(now, target) and not says(before, target)
    )
    return max(found, key=len, default=None)


def fault_of(request: Request, text: str, *, anywhere: bool = False) -> Fault | None:
    """What is wrong with what a model writes after a fact's prompt, if anything is."""
    if closed(text, request.target_new, anywhere=anywhere):
        return None
    why: Why = "runs on" if said(text, request.target_new, anywhere=anywhere) else "not said"
    return Fault(why, request.id, request.text, request.target_new, text)


def _answers(facts: Iterable[Request]) -> dict[str, set[str]]:
    """What each prompt's own answers are."""
    own: dict[str, set[str]] = {}
    for fact in facts:
        own.setdefault(fact.text, set()).add(fact.target_new)
        for neighbor in fact.neighborhood:
            own.setdefault(neighbor.prompt, set()).add(neighbor.target)
    return own


def _answers_about(facts: Iterable[Request]) -> dict[str, set[str]]:
    """What facts say of each subject, whatever they are asked."""
    about: dict[str, set[str]] = {}
    for fact in facts:
        about.setdefault(fact.subject, set()).add(fact.target_new)
    return about


def _near(fact: Request, alike: Sequence[Request]) -> Iterator[str]:
    """The same prompt about others that have facts, and the record's neighbourhood prompts."""
    yield from (other.text for other in alike if other.subject != fact.subject)
    yield from (neighbor.prompt for neighbor in fact.neighborhood)


def _after(subjects: Sequence[str], place: int) -> Iterator[str]:
    """Some subjects beside the one at a place, those first that stand after it; more than are asked, since some may be told."""
    others = (subjects[(place + step) % len(subjects)] for step in range(1, len(subjects)))
    return islice(others, 4 * _FILLED)


def _goes_on(left: str, right: str) -> bool:
    """The last word of `left` goes on in `right`; in a script without spaces none does."""
    return left[-1:].isalnum() and right[:1].isalnum() and joiner(left, right) == " "
