"""Suites are pure functions of readings; each definition is checked on readings whose scores are worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from patchhub.errors import SettingsError
from patchhub.evaluation.metrics import TargetScore, score_targets
from patchhub.evaluation.suites import (
    Answers,
    FactReading,
    counterfact_items,
    counterfact_scores,
    read_facts,
    wise_scores,
    zsre_scores,
)
from patchhub.objects import Request


def said(probability: float, argmax: str, tokens: str = "AB") -> TargetScore:
    """A score of a target whose tokens are letters, where argmax says other letters."""
    return TargetScore(tuple(map(ord, tokens)), math.log(probability), tuple(map(ord, argmax)))


# Two facts. The first has one paraphrase and two neighbours, the second two paraphrases and no neighbour.
FIRST = FactReading(
    "first",
    prompt=(Answers(said(0.6, "AB"), said(0.2, "AX")),),
    paraphrases=(Answers(said(0.1, "AX"), said(0.3, "AB")),),
    neighborhood=(
        Answers(said(0.2, "XX"), said(0.5, "AB")),
        Answers(said(0.4, "XX"), said(0.1, "XB")),
    ),
)
SECOND = FactReading(
    "second",
    prompt=(Answers(said(0.3, "AX"), said(0.4, "AB")),),
    paraphrases=(
        Answers(said(0.5, "AB"), said(0.1, "AX")),
        Answers(said(0.2, "XX"), said(0.3, "AX")),
    ),
    neighborhood=(),
)
FACTS = [FIRST, SECOND]


def values(scores):
    return {name: estimate.value for name, estimate in scores.estimates.items()}


def test_counterfact_scores_by_hand():
    es, ps, ns = 0.5, (0 + 1 / 2) / 2, 0.5
    assert values(counterfact_scores(FACTS)) == pytest.approx(
        {
            "ES": es,
            "PS": ps,  # by record: pooling the three paraphrases would give 1/3
            "NS": ns,
            "EA": 0.5,
            "PA": 0.25,
            "NA": 0.5,
            "EM": (0.4 - 0.1) / 2,
            "PM": (-0.2 + (0.4 - 0.1) / 2) / 2,
            "NM": (0.3 - 0.3) / 2,
            "S": 3 / (1 / es + 1 / ps + 1 / ns),
        }
    )


def test_records_are_counted_per_score():
    estimates = counterfact_scores(FACTS).estimates
    assert {name: estimates[name].records for name in ("ES", "PS", "NS", "S")} == {"ES": 2, "PS": 2, "NS": 1, "S": 1}


def test_total_and_per_token_comparison_differ_where_lengths_do():
    long, short = said(0.09, "AB", "AB"), said(0.2, "A", "A")
    fact = [FactReading("x", (Answers(long, short),), (), ())]
    assert values(counterfact_scores(fact))["ES"] == 0
    per_token = counterfact_scores(fact, compare="per token")
    assert values(per_token)["ES"] == 1
    assert values(per_token)["EM"] == pytest.approx(0.3 - 0.2)
    assert per_token.settings["compare"] == "per token"


def test_a_tie_is_no_win():
    tie = (Answers(said(0.2, "AB"), said(0.2, "AB")),)
    scores = values(counterfact_scores([FactReading("x", tie, (), tie)]))
    assert scores["ES"] == scores["NS"] == 0


def test_without_a_true_target_comparisons_are_left_out_and_accuracies_stay():
    facts = [replace(fact, prompt=(Answers(fact.prompt[0].new, None),)) for fact in FACTS]
    scores = values(counterfact_scores(facts))
    assert not {"ES", "EM", "S"} & scores.keys()
    assert scores["EA"] == 0.5


def test_zsre_scores_by_hand():
    expected = {"efficacy": (1 + 1 / 2) / 2, "paraphrase": (1 / 2 + 1 / 2) / 2, "specificity": (1 + 1 / 2) / 2}
    expected["S"] = 3 / sum(1 / value for value in expected.values())
    assert values(zsre_scores(FACTS)) == pytest.approx(expected)


def test_locality_compares_with_before_not_with_the_truth():
    before = [
        replace(FIRST, neighborhood=(FIRST.neighborhood[1], Answers(said(0.4, "XX"), said(0.1, "XB")))),
        SECOND,
    ]
    # argmax along the two neighbours: AB and XB after, XB and XB before
    assert values(counterfact_scores(FACTS, before))["unchanged"] == 0.5
    assert values(zsre_scores(FACTS, before))["unchanged"] == 0.75
    exact = {"reliability": 0.5, "generalisation": 0.25, "locality": 0.5, "average": 1.25 / 3}
    levels = [fact.prompt[0].new for fact in FACTS]
    mean = sum(math.exp(-new.logprob / new.n_tokens) for new in levels) / len(levels)
    perplexity = {"target_perplexity": mean}
    assert values(wise_scores(FACTS, before)) == pytest.approx(exact | perplexity)
    tokens = {"reliability": 0.75, "generalisation": 0.5, "locality": 0.75, "average": 2 / 3}
    assert values(wise_scores(FACTS, before, match="share of tokens")) == pytest.approx(tokens | perplexity)
    assert values(counterfact_scores(FACTS, FACTS))["unchanged"] == 1


def test_readings_of_other_requests_and_unknown_choices_are_refused():
    with pytest.raises(SettingsError, match="same requests"):
        wise_scores(FACTS, FACTS[:1])
    with pytest.raises(SettingsError, match="compare is 'mean'"):
        counterfact_scores(FACTS, compare="mean")
    with pytest.raises(SettingsError, match="match is 'some'"):
        wise_scores(FACTS, FACTS, match="some")


def test_no_facts_have_no_scores():
    assert values(counterfact_scores([])) == values(wise_scores([], [])) == {}


REQUESTS = [
    Request.make(
        prompt="The capital of {} is",
        subject="France",
        target_new="Madrid",
        target_true="Paris",
        paraphrases=["France and its capital", "Paris is"],
        neighborhood=[("The capital of Spain is", "Madrid"), ("Zoë speaks", "English")],
    ),
    Request.make(prompt="{} speaks", subject="Zoë Kravitz", target_new="日本 language"),
]


def test_readings_are_the_scores_of_each_prompt(model_and_tokenizer):
    first, second = read_facts(*model_and_tokenizer, REQUESTS, batch_tokens=64)

    def one(prompt, target):
        [score] = score_targets(*model_and_tokenizer, [(prompt, target)])
        return pytest.approx(score.logprob, abs=1e-9)

    assert first.request_id == REQUESTS[0].id
    assert first.prompt[0].new.logprob == one("The capital of France is", "Madrid")
    assert first.prompt[0].true.logprob == one("The capital of France is", "Paris")
    assert first.paraphrases[1].new.logprob == one("Paris is", "Madrid")
    assert first.paraphrases[1].true.logprob == one("Paris is", "Paris")
    assert first.neighborhood[1].new.logprob == one("Zoë speaks", "Madrid")
    assert first.neighborhood[1].true.logprob == one("Zoë speaks", "English")
    assert second.prompt[0] == Answers(second.prompt[0].new, None)
    assert second.prompt[0].new.logprob == one("Zoë Kravitz speaks", "日本 language")
    assert (second.paraphrases, second.neighborhood) == ((), ())
    assert len(counterfact_items(REQUESTS[0])) == 10
