"""The guard's judgement: each check fails alone where it should, chance excuses small numbers, and reports survive a round trip."""

from __future__ import annotations

import json
from dataclasses import replace
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.canonical import canonical_json
from patchhub.cli.options import guard_lines
from patchhub.evaluation.guard import (
    KEPT_FAULTS,
    Drifted,
    Fault,
    Limits,
    Measured,
    Report,
    Share,
    Spoken,
    is_guessing,
    judge,
    worst,
)

FAULT = Fault("runs on", None, "The capital of Kazakhstan is", "Astana", " Astanaq.")
SPOKEN = Spoken(
    Share(84, 100),
    Share(80, 100),
    Share(4, 100),
    (FAULT,),
    Spoken(Share(50, 100), Share(40, 100), faults=(FAULT,)),
    Share(3, 8),
)
HEALTHY = Measured(
    facts=100,
    own=Share(84, 100),
    spoken=SPOKEN,
    earlier=Share(8, 80),
    active=100,
    unmet=Share(1, 100),
    crushed=Share(0, 100),
    drift=Drifted(0.13, 0.31, 1.35, 800),
    spectrum={"w": {"base": 2.0, "change": 9.0, "state": 12.0}},
    survival={"w": 0.99},
    first_token=1,
)
LIMITS = Limits()


def failed(found: Measured, limits: Limits = LIMITS) -> list[str]:
    return [finding.check for finding in judge(found, limits)]


@given(st.integers(0, 50).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_an_interval_are_where_the_normal_test_just_fails(numbers: tuple[int, int]) -> None:
    """Wilson's interval are the p at which |count / n - p| = z sqrt(p (1 - p) / n)."""
    share = Share(*numbers)
    if not share.of:
        assert (share.lowest, share.highest) == (0.0, 1.0)
        return
    mean = share.count / share.of
    assert -1e-12 <= share.lowest <= mean + 1e-12
    assert mean - 1e-12 <= share.highest <= 1 + 1e-12
    for end in (max(share.lowest, 0.0), min(share.highest, 1.0)):
        assert abs(mean - end) == pytest.approx(1.96 * sqrt(end * (1 - end) / share.of), abs=1e-6)


def test_a_healthy_change_passes() -> None:
    assert failed(HEALTHY) == []
    assert failed(Measured()) == []


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("own", {"own": Share(3, 100)}),
        ("fewest", {"own": Share(0, 3)}),
        ("closed", {"spoken": replace(SPOKEN, closed=Share(0, 100))}),
        ("leak", {"spoken": replace(SPOKEN, leak=Share(60, 100))}),
        ("earlier", {"earlier": Share(70, 100)}),
        ("earlier", {"crushed": Share(70, 100)}),
        ("misfit", {"unmet": Share(90, 100)}),
        ("drift", {"drift": Drifted(0.13, 0.9, 2.2, 800)}),
        ("drift", {"drift": Drifted(0.13, float("nan"), 2.2, 800)}),
        ("total", {"drift": Drifted(2.4, 2.6, 8.0, 800)}),
        ("spectrum", {"spectrum": {"w": {"base": 2.0, "change": 9.0, "state": 120.0}}}),
        ("survival", {"survival": {"w": 0.99, "v": 0.05}}),
    ],
)
def test_each_check_fails_alone(check: str, broken: dict[str, object]) -> None:
    assert failed(replace(HEALTHY, **broken)) == [check]


def test_a_change_that_leads_back_to_the_base_is_not_held_against_the_whole_way() -> None:
    assert failed(replace(HEALTHY, drift=Drifted(4.0, 3.9, 9.0, 800))) == []
    assert failed(replace(HEALTHY, drift=Drifted(3.9, 4.0, 9.0, 800))) == ["total"]


def test_few_facts_are_excused_by_chance_and_may_drift_less() -> None:
    few = Spoken(Share(0, 3), Share(0, 3), Share(3, 6))
    assert failed(Measured(facts=3, own=Share(1, 3), spoken=few, unmet=Share(3, 3), earlier=Share(3, 3))) == []
    assert failed(Measured(facts=30, own=Share(0, 30))) == ["own"]
    drifted = Drifted(0.0, 0.3, 1.3, 800)
    assert failed(Measured(facts=1, drift=drifted)) == ["drift"]
    assert failed(Measured(facts=20, drift=drifted)) == []


@given(st.integers(0, 500), st.integers(0, 500))
def test_more_facts_may_drift_more(one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert 0 < LIMITS.drift_limit(few) <= LIMITS.drift_limit(many) <= LIMITS.drift * max(1.0, many / 100)
    assert LIMITS.drift_limit(34) == LIMITS.drift_limit(100) == LIMITS.drift


@given(st.integers(1, 50))
def test_one_batch_may_drift_as_much_as_its_facts_in_hundreds(hundreds: int) -> None:
    assert LIMITS.drift_limit(100 * hundreds) == pytest.approx(hundreds * LIMITS.drift_limit(100))


def test_what_a_guessing_base_says_is_not_held_against_the_change() -> None:
    drifted = Drifted(0.0, 2.0, 6.0, 800, guessing=True)
    assert failed(replace(HEALTHY, own=Share(0, 100), drift=drifted)) == []
    assert failed(replace(HEALTHY, own=Share(0, 100), drift=replace(drifted, guessing=False))) == ["drift", "own"]


def test_uniform_predictions_are_guessing_and_sure_ones_are_not() -> None:
    assert is_guessing(300.0, 320)
    assert not is_guessing(57.0, 8192)


def test_a_change_of_which_no_fact_holds_is_refused_unless_the_limits_allow_it() -> None:
    none = Measured(facts=3, own=Share(0, 3))
    assert failed(none) == ["fewest"]
    assert failed(none, Limits(fewest=0)) == []
    assert failed(Measured(facts=3, own=Share(1, 3))) == []
    assert failed(Measured(facts=3, own=Share(2, 3)), Limits(fewest=5)) == ["fewest"]
    assert failed(Measured(facts=0, own=Share(0, 0))) == []


def test_what_is_said_in_a_chat_beside_is_not_judged() -> None:
    silent = Spoken(Share(0, 100), Share(0, 100))
    assert failed(replace(HEALTHY, spoken=replace(SPOKEN, chat=silent))) == []


@pytest.mark.parametrize(
    ("own", "spoken"),
    [
        (Share(3, 4), Spoken(Share(4, 4), Share(4, 4))),
        (Share(4, 4), Spoken(Share(4, 4), Share(3, 4))),
        (Share(4, 4), Spoken(Share(4, 4), Share(4, 4), Share(1, 9))),
    ],
)
def test_where_all_facts_must_read_right_one_fault_is_enough(own: Share, spoken: Spoken) -> None:
    found = Measured(facts=4, own=own, spoken=spoken)
    assert failed(found) == []
    assert [finding.check for finding in judge(found, LIMITS, all_facts=True)] == ["all"]
    right = Measured(facts=4, own=Share(4, 4), spoken=Spoken(Share(4, 4), Share(4, 4), Share(0, 9)))
    assert judge(right, LIMITS, all_facts=True) == ()


def test_of_many_faults_the_worst_are_kept() -> None:
    many = [replace(FAULT, why=why) for _ in range(KEPT_FAULTS) for why in ("runs on", "leak", "not said")]
    kept = worst(many)
    assert len(kept) == KEPT_FAULTS
    assert {fault.why for fault in kept} == {"not said"}
    assert [fault.why for fault in worst(many[:3])] == ["not said", "leak", "runs on"]


def test_limits_move_the_verdict() -> None:
    assert failed(HEALTHY, Limits(own=0.95)) == ["own"]
    assert failed(replace(HEALTHY, own=Share(3, 100)), Limits(own=0.0)) == []


@pytest.mark.parametrize("found", [HEALTHY, Measured(facts=2, unmet=Share(0, 2))])
def test_a_report_survives_its_json(found: Measured) -> None:
    report = Report(found, ("it drifts",), True)
    assert Report.from_json(json.loads(canonical_json(report.to_json()))) == report


@pytest.mark.parametrize(
    "check",
    [
        {},
        {"guard": None},
        {"guard": 3},
        {"guard": {}},
        {"guard": {"failed": [], "own": 7}},
        {"guard": {"failed": [], "x": 1}},
        {"guard": {"failed": [], "own": {"count": "many", "of": 2}}},
        {"guard": {"failed": [], "spoken": {"said": {"count": 1, "of": 2}}}},
        {"guard": {"failed": [], "spectrum": {"w": 2}}},
        {"guard": {"failed": []}, "survival": ["w"]},
    ],
)
def test_a_check_of_another_make_is_no_report(check: dict[str, object]) -> None:
    assert Report.from_json({"forced": False, **check}) is None


def test_one_fact_is_one_in_words() -> None:
    found = replace(HEALTHY, own=Share(0, 1), unmet=Share(1, 1))
    (words,) = (finding.words for finding in judge(found, replace(LIMITS, own=0.9)) if finding.check == "own")
    assert words == "0 of 1 new fact is the model's answer"
    lines = list(guard_lines(Report(found, (), False).to_json()))
    assert any("0 of 1 new fact is the model's answer" in line for line in lines)
    assert any("8 of 80 earlier facts that were read and held are lost" in line for line in lines)
