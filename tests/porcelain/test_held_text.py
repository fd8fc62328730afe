"""Held text: a tenth of the documents that no second moment is of, kept or sampled, the same every time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from patchhub.editing.requests import Batch, Origin
from patchhub.objects import Metric, Text
from patchhub.porcelain.commit import Writing, commit
from patchhub.porcelain.model import init
from patchhub.porcelain.refs import config_set
from patchhub.progress import Silent
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree.metric import held_documents, measured_part, sampled_documents, set_aside
from patchhub.worktree.metric import kept_held_documents as kept_documents
from patchhub.worktree.opening import Worktree, open_worktree
from tests.porcelain.taught import AUTHOR, TIME, fact
from tests.tiny_models import tiny_model, tiny_tokenizer

LINES = [f"The Space Needle number {number} is located in Seattle, I think." for number in range(40)]


def make(folder: Path, *text: Path) -> Store:
    tiny_model("gpt2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    init(folder, str(folder / "model"), Silent(), who=Who(AUTHOR, TIME))
    repository = Store.open(folder)
    for key, value in (("metric.tokens", "1500"), ("memit.layers", "1"), ("memit.steps", "1")):
        config_set(repository, key, value)
    batch = Batch((fact("Seattle", "twin"),), (Origin("a test"),), 0)
    commit(repository, batch, Who(AUTHOR, TIME, "one"), Silent(), Writing(text=text))
    return repository


def metric_of(repository: Store) -> Metric:
    assert repository.config.recording is not None
    return Metric.from_json(repository.objects.get(repository.config.recording.metric))


def opened(repository: Store) -> Worktree:
    return open_worktree(repository, Silent(), edits=())


@pytest.mark.parametrize("count", [0, 1, 9, 10, 25, 40])
def test_documents_are_set_aside_or_measured_never_both(count: int) -> None:
    documents = [[number, number] for number in range(count)]
    measured, held = set_aside(documents)
    assert sorted(measured + held) == documents
    assert len(held) == count // 10


def test_of_sampled_text_a_tenth_is_no_part_of_the_metric(tmp_path: Path) -> None:
    repository = make(tmp_path)
    metric = metric_of(repository)
    documents = Text.from_json(repository.objects.get(str(metric.text))).token_ids
    held = kept_documents(repository, metric)
    assert held is not None
    assert len(held) == metric.source["held"] == len(documents) // 10 > 0
    measured = measured_part(documents, metric)
    assert sum(map(len, measured)) == metric.tokens
    assert sorted([*map(tuple, measured), *held]) == sorted(documents)


def test_of_the_users_text_the_held_part_is_in_the_cache_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    repository = make(tmp_path, text)
    metric = metric_of(repository)
    tokens = [tuple(ids) for ids in tiny_tokenizer()(LINES)["input_ids"]]
    assert metric.source["held"] == 4
    assert metric.tokens == sum(map(len, tokens)) - sum(map(len, tokens[9::10]))
    assert kept_documents(repository, metric) == tokens[9::10]
    assert metric.text not in repository.objects


def test_text_that_is_not_at_hand_is_sampled_once(tmp_path: Path) -> None:
    """A store that lost its cache and was made from the user's text: other text than the metric's, and the same ever after."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(LINES), encoding="utf-8")
    repository = make(tmp_path, text)
    metric, base = metric_of(repository), opened(repository)
    shutil.rmtree(repository.cache.folder)
    assert kept_documents(repository, metric) is None
    sampled = held_documents(repository, metric, base.stack, base.tokenizer)
    assert kept_documents(repository, metric) == sampled
    shutil.rmtree(repository.cache.folder)
    assert held_documents(repository, metric, base.stack, base.tokenizer) == sampled


def test_a_store_without_a_metric_has_held_text_too(tmp_path: Path) -> None:
    repository = make(tmp_path)
    base = opened(repository)
    sampled = held_documents(repository, None, base.stack, base.tokenizer)
    assert kept_documents(repository, None) == sampled
    assert sampled != kept_documents(repository, metric_of(repository))


class Heard(Silent):
    """Keeps what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.steps: list[int] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def advance(self, amount: int) -> None:
        self.steps.append(amount)


def test_another_repository_of_the_base_finds_the_text_and_it_is_said_what_it_is_for(tmp_path: Path) -> None:
    first = make(tmp_path)
    text = metric_of(first).text
    assert text is not None
    base, heard, sampled = opened(first), Heard(), Text.from_json(first.objects.get(text)).token_ids
    found, _ = sampled_documents(first, base.stack, base.tokenizer, heard)
    assert tuple(map(tuple, found)) == sampled
    assert heard.steps == [sum(map(len, sampled))], "it was all there"
    assert ["1,500 tokens" in message for message in heard.said] == [True]
    shutil.rmtree(first.shared.folder / "text")
    found, _ = sampled_documents(first, base.stack, base.tokenizer, heard)
    assert tuple(map(tuple, found)) == sampled
    assert len(heard.steps) > 64, "it moves at every step"
