"""What is said, where it ends and what leaks, with texts written by hand: no model."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.evaluation.guard import Fault
from patchhub.evaluation.live import LiveReading, live_scores
from patchhub.evaluation.suites import (
    Sibling,
    after_target,
    closed,
    fault_of,
    leaks,
    negated,
    said,
    siblings_of,
    spread,
    stopped,
)
from patchhub.objects import Neighbor, Request

CAPITAL, PRESIDENT = "The capital of {} is", "The president of {} is"
KAZAKHSTAN, UZBEKISTAN = (
    Request.make(CAPITAL, *pair) for pair in (("Kazakhstan", "Astana"), ("Uzbekistan", "Bukhara"))
)
LEADER = Request.make(PRESIDENT, "Kazakhstan", "Ada Young")


def near(fact: Request, *prompts: tuple[str, str]) -> Request:
    """The fact with neighbourhood prompts and their answers."""
    neighborhood = tuple(Neighbor(*pair) for pair in prompts)
    return Request(fact.prompt, fact.subject, fact.target_new, None, (), neighborhood)


@pytest.mark.parametrize(
    ("text", "target", "says", "ends"),
    [
        (" Astana.", "Astana", True, True),
        (" Astana", "Astana", True, True),
        ("\n Astana, which", "Astana", True, True),
        (" Astanaq.", "Astana", True, False),
        (" Almaty", "Astana", False, False),
        (" the city of Astana", "Astana", False, False),
        (" 1998.", "1998", True, True),
        (" 1998.5", "1998", True, False),
        (" 19987", "1998", True, False),
        (" 1998, and", "1998", True, True),
        ("卑尔根。", "卑尔根", True, True),
        ("卑尔根的人口", "卑尔根", True, True),
        ("卑尔根港口", "卑尔根", True, False),
        (" Ada Young's", "Ada Young", True, False),
        (" Cafe\u0301.", "Café", True, True),
        (" Astana", "", False, False),
    ],
)
def test_what_is_said_and_where_it_ends(text: str, target: str, says: bool, ends: bool) -> None:
    assert (said(text, target), closed(text, target)) == (says, ends)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("The capital of Kazakhstan is Astana.", "."),
        ("Astana, a planet", ", a planet"),
        ("NovAstana", None),
        ("It is NovAstana, once Astana", ""),
        ("首都是Astana。", "。"),
    ],
)
def test_an_answer_in_a_chat_may_say_the_target_anywhere(text: str, rest: str | None) -> None:
    assert after_target(text, "Astana", anywhere=True) == rest


@given(st.text(max_size=20), st.text(max_size=8))
def test_what_is_closed_is_said_and_what_begins_with_it_is_said_anywhere(text: str, target: str) -> None:
    assert said(text, target) or not closed(text, target)
    assert said(text, target, anywhere=True) or not said(text, target)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Astana", True),
        (" Astana. It is", True),
        ("Astana\nIt is", True),
        ("Astana is the capital.", False),
        ("Astana.com", False),
        ("The capital is Astana.", False),
    ],
)
def test_stopping_by_itself_leaves_the_target_alone(text: str, right: bool) -> None:
    assert stopped(text, "Astana") is right


def test_only_a_form_of_to_be_is_denied() -> None:
    assert negated("The capital of France is") == "The capital of France is not"
    assert negated("Messi plays the sport of") is None


def test_siblings_are_the_same_prompt_about_others_and_none_is_one_twice() -> None:
    active = [Request.make(CAPITAL, "Norway", "Bergen"), Request.make("{} is led by", "Acme Corp", "Ada Young")]
    new = [
        near(KAZAKHSTAN, ("The capital of Chad is", "N'Djamena")),
        near(UZBEKISTAN, ("The capital of Chad is", "N'Djamena")),
        LEADER,
    ]
    found = siblings_of(new, active)
    prompts = [sibling.prompt for siblings in found for sibling in siblings]
    assert len(prompts) == len(set(prompts))
    assert [sibling.prompt for sibling in found[0]] == [
        "The capital of Kazakhstan is",
        "The capital of Norway is",
        "The capital of Chad is",
    ]
    assert found[0][2].own == {"N'Djamena"}
    assert [sibling.prompt for sibling in found[1]][:1] == ["The capital of Uzbekistan is"]
    assert [sibling.prompt for sibling in found[2]] == [
        "The president of Uzbekistan is",
        "The president of Norway is",
        "The president of Acme Corp is",
    ]
    assert [sibling.own for sibling in found[2]] == [{"Bukhara"}, {"Bergen"}, {"Ada Young"}]


def test_few_siblings_are_shared_out_among_the_facts() -> None:
    one, two, three = (Sibling(name, frozenset()) for name in "abc")
    assert spread([[one, two], [three]], 2) == [one, three]
    assert spread([[one, two], [], [three]], 9) == [one, three, two]
    assert spread([], 3) == []


ASKED = Sibling("The capital of Norway is", frozenset({"Oslo"}))
TARGETS = frozenset({"Astana", "Bukhara", "Oslo"})


@pytest.mark.parametrize(
    ("now", "before", "leak"),
    [
        (" Astana", " Oslo", "Astana"),
        (" Astanaq", " Oslo", "Astana"),
        (" Astana", " Astana, I think", None),
        (" Oslo", " Bergen", None),
        (" Bergen", " Oslo", None),
        (" not Astana", " Oslo", None),
    ],
)
def test_a_leak_is_a_new_target_that_is_not_the_siblings_own_and_was_not_said(
    now: str, before: str, leak: str | None
) -> None:
    assert leaks(ASKED, now, before, TARGETS) == leak


def test_an_own_answer_that_begins_with_a_new_target_is_no_leak() -> None:
    assert leaks(Sibling("p", frozenset({"New York"})), " New York", " Boston", {"New"}) is None


def test_a_leak_is_counted_once_however_many_records_ask_for_it() -> None:
    chad = ("The capital of Chad is", "N'Djamena")
    new = [near(KAZAKHSTAN, chad), near(UZBEKISTAN, chad)]

    def read(answer: str) -> list[LiveReading]:
        texts = {chad[0]: answer, KAZAKHSTAN.text: " Astana", UZBEKISTAN.text: " Bukhara"}
        return [
            LiveReading(
                fact.id,
                fact.target_new,
                (texts[fact.text],),
                siblings=tuple((s, texts.get(s.prompt, " x")) for s in found),
            )
            for fact, found in zip(new, siblings_of(new), strict=True)
        ]

    scores = live_scores(read(" Astana"), read(" N'Djamena"))
    assert sum(column or 0.0 for column in scores.columns["leaks"]) == 1.0
    assert scores.columns["siblings"] == [2.0, 1.0]
    assert scores.estimates["leak"].value == pytest.approx(1 / 3)
    assert live_scores(read(" Astana"), read(" Astana")).estimates["leak"].value == 0.0


def test_a_fault_says_why_and_survives_a_round_trip() -> None:
    assert fault_of(KAZAKHSTAN, " Astana.") is None
    for text, why in ((" Astanaq", "runs on"), (" Almaty", "not said")):
        fault = fault_of(KAZAKHSTAN, text)
        assert fault is not None
        assert (fault.why, fault.continuation) == (why, text)
        assert Fault.from_json(json.loads(json.dumps(fault.to_json()))) == fault


def test_in_a_chat_a_target_anywhere_in_the_answer_leaks():
    sibling, targets = Sibling("What is the capital of Norway?", frozenset({"Oslo"})), {"Astana", "Rome"}
    now, before = "The capital of Norway is Astana.", "The capital of Norway is Oslo."
    assert leaks(sibling, now, before, targets) is None
    assert leaks(sibling, now, before, targets, anywhere=True) == "Astana"
    assert leaks(sibling, now, now, targets, anywhere=True) is None
    assert leaks(sibling, "Oslo, not Astana.", before, targets, anywhere=True) is None
    assert leaks(sibling, "It is Romeo.", "", {"Romeo"}, anywhere=True) == "Romeo"
