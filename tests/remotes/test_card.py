"""The card: what is written here stands between markers, what its owner wrote stays, and scores are evaluation results."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from patchhub.remotes.hub import BEGIN, END, AdapterNote, Card, ScoreLine, kept, write_card

CARD = Card(
    repo="ada/facts",
    commit="c" * 64,
    message="why",
    author="Ada <ada@example.org>",
    time="2026-11-21T09:30:00Z",
    base="b" * 64,
    base_model="org/model",
    base_revision=None,
    requests=(),
    active=2,
    methods=("memit",),
    adapter=AdapterNote(8, 0.0),
    changes={},
    scores=[
        ScoreLine("counterfact, 2 facts", "S", 0.5, None, 0.1, "score"),
        ScoreLine("counterfact, 2 facts", "ES", 0.75, (0.5, 1.0), None, "efficacy"),
    ],
    license="apache-2.0",
)


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(write_card(CARD).decode()).data
    assert (data.base_model, data.license, data.library_name) == ("org/model", "apache-2.0", "peft")
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [("S", 0.5), ("ES", 0.75)]
    assert {result.dataset_name for result in data.eval_results} == {"counterfact, 2 facts"}


def test_a_card_replaces_itself() -> None:
    new = write_card(replace(CARD, message="other"))
    assert kept(write_card(CARD), new) == new
    assert kept(new, new) == new


@pytest.mark.parametrize(
    "before",
    [
        "# My model\n\nText.\n",
        "---\nlicense: mit\ntags: [a]\n---\n# My model\n\nText.\n",
        f"---\nlanguage: fr\n---\n# My model\n\nText.\n\n{BEGIN}\nold\n{END}\n\nMore.\n",
        "---\n: not: yaml: [\n---\n# My model\n\nText.\n",
    ],
)
def test_the_owners_words_stay(before: str) -> None:
    once = kept(before.encode(), write_card(replace(CARD, license=None)))
    text = once.decode()
    assert "# My model\n\nText." in text
    assert "\nold\n" not in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert ("More." in text) == ("More." in before)
    data = ModelCard(text).data
    assert data.base_model == "org/model"
    assert data.get("license") == ("mit" if "mit" in before else None)
    assert kept(once, write_card(replace(CARD, license=None))) == once


@pytest.mark.parametrize("before", [b"", b"---\nlicense: mit\n---\n", b"\xff\xfe"])
def test_an_empty_card_is_filled(before: bytes) -> None:
    assert BEGIN in kept(before, write_card(CARD)).decode()


@pytest.mark.parametrize(
    ("note", "said", "unsaid"),
    [
        (AdapterNote(8, 0.0), ("vllm serve", "llama-server"), ("TGI", "patchhub apply")),
        (AdapterNote(8, 0.0, every_layer=False), ("vllm serve", "TGI, LoRAX"), ("patchhub apply",)),
        (
            AdapterNote(8, 0.0, vllm=False),
            ("vLLM serves no adapters of this family", "patchhub apply"),
            ("vllm serve",),
        ),
        (AdapterNote(8, 0.0, llama_cpp=False), ("vllm serve",), ("llama-server",)),
        ("the state has rank 900", ("no PEFT adapter here: the state has rank 900", "patchhub apply"), ("vllm serve",)),
    ],
)
def test_the_card_gives_the_commands_that_are_true(
    note: AdapterNote | str, said: tuple[str, ...], unsaid: tuple[str, ...]
) -> None:
    text = write_card(replace(CARD, adapter=note)).decode()
    assert all(words in text for words in said)
    assert not any(words in text for words in unsaid)
