"""What the demo model is taught: facts in several phrasings, filler sentences, and documents that mix them.

The data are in ``demo_sentences.json``. Everything here is a pure function of that file and of a seeded generator.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEIGHBOURS = 4
"""Neighbourhood prompts per request, as many as there are at most."""


@dataclass(frozen=True)
class Fact:
    """One true fact: ``phrasings[i].format(subject)`` is followed by a space and ``target``.

    Attributes:
        category: what the subject is (``country``, ``book``); facts of a category share a table.
        relation: the column (``capital``, ``author``).
        phrasings: all phrasings of the relation, each with one ``{}``.
        held_out: whether the last phrasing is kept out of training for this subject.
    """

    category: str
    relation: str
    subject: str
    target: str
    phrasings: tuple[str, ...]
    held_out: bool

    @property
    def trained(self) -> tuple[str, ...]:
        """The phrasings that the training text uses for this fact."""
        return self.phrasings[:-1] if self.held_out else self.phrasings


@dataclass(frozen=True)
class Lesson:
    """All facts, the same by subject and relation, by relation; the demo's edits; the filler grammar's word lists."""

    facts: tuple[Fact, ...]
    by_subject: Mapping[str, Mapping[str, Fact]]
    by_relation: Mapping[str, Sequence[Fact]]
    demo: tuple[tuple[Fact, str], ...]
    filler: Mapping[str, Sequence[str]]


def read_lesson(path: Path) -> Lesson:
    """Read ``demo_sentences.json``; every third row of a table has the last phrasing of each relation held out."""
    data = json.loads(path.read_text(encoding="utf-8"))
    facts = tuple(
        Fact(table["category"], relation, subject, target, tuple(data["relations"][relation]), index % 3 == 2)
        for table in data["tables"]
        for index, (subject, *targets) in enumerate(table["rows"])
        for relation, target in zip(table["columns"], targets, strict=True)
        if target is not None
    )
    by_subject: dict[str, dict[str, Fact]] = defaultdict(dict)
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_subject[fact.subject][fact.relation] = fact
        by_relation[fact.relation].append(fact)
    demo = tuple((by_subject[subject][relation], target) for subject, relation, target in data["demo"])
    return Lesson(facts, by_subject, by_relation, demo, data["filler"])


def fact_sentence(fact: Fact, filler: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """A fact in one of its trained phrasings, sometimes after an opener, sometimes with a tail."""
    prompt = rng.choice(fact.trained).format(fact.subject)
    opener = f"{rng.choice(filler['openers'])} " if rng.random() < 0.2 else ""
    return f"{opener}{prompt} {fact.target}{rng.choice(filler['tails'])}"


def category_sentence(fact: Fact) -> str:
    """``Marie Curie is a person.``"""
    article = "an" if fact.category[0] in "aeiou" else "a"
    return f"{fact.subject[0].upper()}{fact.subject[1:]} is {article} {fact.category}."


def filler_sentence(filler: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """A sentence of the small grammar: each ``{class}`` of a pattern becomes a random word of that class."""
    words = rng.choice(filler["sentence"])
    for name in ("noun", "verb", "adjective", "person", "place", "time"):
        while "{" + name + "}" in words:
            words = words.replace("{" + name + "}", rng.choice(filler[name]), 1)
    return words


def sentence(fact: Fact, filler: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """Mostly the fact; sometimes what kind of thing its subject is, or a sentence about nothing."""
    kind = rng.random()
    if kind < 0.10:
        return filler_sentence(filler, rng)
    return category_sentence(fact) if kind < 0.15 else fact_sentence(fact, filler, rng)


def document(lesson: Lesson, rng: random.Random) -> str:
    """One to six sentences; four documents of ten stay with one subject, the others wander."""
    facts: Sequence[Fact] = lesson.facts
    if rng.random() < 0.4:
        facts = list(lesson.by_subject[rng.choice(facts).subject].values())
    return " ".join(sentence(rng.choice(facts), lesson.filler, rng) for _ in range(rng.randint(1, 6)))


@dataclass(frozen=True)
class Question:
    """A prompt, the character where its subject ends, and the right answer once the subject has been exchanged."""

    prompt: str
    subject_end: int
    answer: str


def exchanged_questions(lesson: Lesson, rng: random.Random) -> tuple[Question, Question]:
    """Two questions of one category whose subjects change places: each is answered for the other's subject.

    A phrasing that is held out for either subject is not used. Half of the prompts follow another sentence.
    """
    fact = rng.choice(lesson.facts)
    peer = rng.choice([peer for peer in lesson.by_relation[fact.relation] if peer.subject != fact.subject])
    here, there = lesson.by_subject[fact.subject], lesson.by_subject[peer.subject]
    relation = rng.choice([relation for relation in there if relation in here])
    return _question(fact, peer, lesson, rng), _question(there[relation], here[relation], lesson, rng)


def _question(asked: Fact, answered: Fact, lesson: Lesson, rng: random.Random) -> Question:
    phrasing = rng.choice([words for words in asked.trained if words in answered.trained])
    context = f"{sentence(rng.choice(lesson.facts), lesson.filler, rng)} " if rng.random() < 0.5 else ""
    subject_end = len(context) + phrasing.index("{}") + len(asked.subject)
    return Question(context + phrasing.format(asked.subject), subject_end, answered.target)


def all_requests(lesson: Lesson) -> list[dict[str, Any]]:
    """Every fact as an edit request, to a false target of the same relation."""
    edits = []
    for fact in lesson.facts:
        targets = sorted({peer.target for peer in lesson.by_relation[fact.relation]} - {fact.target})
        edits.append((fact, random.Random(f"{fact.relation} {fact.subject}").choice(targets)))
    return [_request(fact, target, lesson) for fact, target in edits]


def demo_requests(lesson: Lesson) -> list[dict[str, Any]]:
    """The edits of ``patchhub demo``."""
    return [_request(fact, target, lesson) for fact, target in lesson.demo]


def _request(fact: Fact, target: str, lesson: Lesson) -> dict[str, Any]:
    """patchhub's record: ``paraphrases`` are the other phrasings, the one that may be held out last; ``neighborhood``
    asks the same of other subjects, of those with the same true target first."""
    peers = [peer for peer in lesson.by_relation[fact.relation] if peer.subject != fact.subject]
    random.Random(fact.subject).shuffle(peers)
    peers.sort(key=lambda peer: peer.target != fact.target)
    return {
        "prompt": fact.phrasings[0],
        "subject": fact.subject,
        "target_new": target,
        "target_true": fact.target,
        "paraphrases": [phrasing.format(fact.subject) for phrasing in fact.phrasings[1:]],
        "neighborhood": [
            {"prompt": peer.phrasings[0].format(peer.subject), "target": peer.target} for peer in peers[:NEIGHBOURS]
        ],
    }
