"""The guard with the shipped model: healthy edits pass, collapsing ones are refused and leave nothing, and a force is remembered."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import patchhub
from patchhub.editing.requests import Batch, Origin
from patchhub.errors import GuardError
from patchhub.evaluation.guard import Report, Share
from patchhub.objects import Request
from patchhub.porcelain.change import revert
from patchhub.porcelain.commit import Committed, Writing, commit
from patchhub.porcelain.model import init
from patchhub.porcelain.refs import config_set, fsck
from patchhub.progress import Silent
from patchhub.sets.elements import plan_batch
from patchhub.sets.guard import limits_of
from patchhub.store.store import Store
from patchhub.text.tokens import context_length
from patchhub.who import Who
from patchhub.worktree.guard import Budget
from patchhub.worktree.judging import Guarding
from patchhub.worktree.opening import open_worktree
from patchhub.worktree.recording import _SENTENCE_ROOM, _sentences, chosen_settings
from tests.porcelain.taught import AUTHOR, TIME

FACTS = [
    Request.make(record["prompt"], record["subject"], record["target_new"])
    for record in json.loads((files("patchhub") / "demo_facts.json").read_text(encoding="utf-8"))
]
HUGE = {"clamp": 50.0, "learning_rate": 20.0}
"""A target norm fifty times that of the state it replaces, and steps that reach it."""


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six facts on the shipped model."""
    folder = tmp_path_factory.mktemp("guard")
    init(folder, str(files("patchhub") / "demo_model"), Silent(), who=Who(AUTHOR, TIME))
    with Store.open(folder) as repository:
        config_set(repository, "metric.tokens", "6000")
        write(repository, FACTS[:6])
    return folder


@pytest.fixture
def repository(first: Path, tmp_path: Path) -> Store:
    folder = tmp_path / "store"
    shutil.copytree(first, folder)
    return Store.open(folder)


def write(repository: Store, facts: list[Request], progress: Silent | None = None, **options: Any) -> Committed:
    batch = Batch(tuple(facts), tuple(Origin("a test") for _ in facts), 0)
    beside = {name: options.pop(name) for name in ("force", "all_facts", "chat") if name in options}
    return commit(repository, batch, Who(AUTHOR, TIME, "facts"), progress or Silent(), Writing(**options), **beside)


def report_at(repository: Store, revision: str = "HEAD") -> Report:
    report = Report.from_json(repository.commit(str(repository.resolve(revision))).check)
    assert report is not None
    return report


def test_healthy_facts_pass_and_the_commit_says_what_was_measured(repository: Store) -> None:
    done = write(repository, FACTS[6:10])
    report = report_at(repository)
    found = report.measured
    assert (report.failed, report.forced) == ((), False)
    assert found.own is not None
    assert (found.own.count, found.own.of) == (done.held, 4)
    assert found.earlier is not None
    assert 0 < found.earlier.of <= found.active == 6
    assert found.drift is not None
    assert 0 < found.drift.kl_before == report_at(repository, "HEAD~1").measured.drift.kl < found.drift.kl < 0.2  # type: ignore[union-attr]
    assert not found.drift.guessing
    assert found.survival == done.survival
    assert min(done.survival.values()) > 0.9
    assert found.spectrum is not None
    assert found.spectrum.keys() == found.survival.keys()


def test_a_collapsing_edit_is_refused_and_leaves_only_garbage(repository: Store) -> None:
    refs, operations = repository.refs(), sum(1 for _ in repository.operations())
    with pytest.raises(GuardError) as caught:
        write(repository, FACTS[6:9], settings=HUGE)
    assert caught.value.exit_code == 10
    assert "guard.drift" in caught.value.message
    assert "--force" in str(caught.value.remedy)
    assert (repository.refs(), sum(1 for _ in repository.operations())) == (refs, operations)
    assert fsck(repository, Silent(), rebuild=False).sound


def test_a_forced_collapse_is_remembered(repository: Store) -> None:
    write(repository, FACTS[6:9], settings=HUGE, force=True)
    report = report_at(repository)
    assert report.forced
    assert report.failed
    done = revert(repository, "HEAD", Who(AUTHOR, TIME, ""))
    assert done.same_as == repository.resolve("HEAD~2")
    assert not report_at(repository).forced


def test_a_single_collapsing_fact_is_refused(repository: Store) -> None:
    with pytest.raises(GuardError):
        write(repository, FACTS[6:7], settings=HUGE)


def test_contradictions_that_are_kept_again_and_again_are_refused(repository: Store) -> None:
    """The same four prompts with ever other targets: the first such batch may pass, the tenth must not."""
    targets = [fact.target_new for fact in FACTS]
    written = 0

    def contradict() -> None:
        nonlocal written
        for number in range(1, 11):
            facts = [
                Request.make(fact.prompt, fact.subject, targets[(index + number) % len(targets)])
                for index, fact in enumerate(FACTS[:4])
            ]
            write(repository, facts, on_conflict="keep")
            written += 1

    with pytest.raises(GuardError):
        contradict()
    assert written > 0


def test_a_limit_of_the_config_decides(repository: Store) -> None:
    config_set(repository, "guard.drift", "0.0001")
    assert limits_of(repository).drift == 0.0001
    with pytest.raises(GuardError, match=r"guard\.drift"):
        write(repository, FACTS[6:8])


def test_a_subject_at_the_first_token_is_warned_about(tmp_path: Path) -> None:
    """Byte-level tokenizers put no token in front, so a subject of one token that begins the prompt has no text before it."""
    from tests.tiny_models import tiny_model, tiny_tokenizer

    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    init(tmp_path, str(tmp_path / "model"), Silent(), who=Who(AUTHOR, TIME))
    with Store.open(tmp_path) as repository:
        for key, value in (("metric.tokens", "1500"), ("memit.layers", "1"), ("memit.steps", "2")):
            config_set(repository, key, value)
        heard = Silent()
        facts = [Request.make("{} is located in", "The", "Lyon"), Request.make("The {} is", "Space Needle", "Milan")]
        write(repository, facts, heard)
        assert [warning for warning in heard.warnings if warning.startswith("1 subject ends at the first token")]
        report = report_at(repository)
    assert report.measured.first_token == 1
    assert report.measured.drift is not None
    assert report.measured.drift.guessing
    assert not report.failed


def test_in_a_chat_the_template_stands_before_a_subject(tmp_path: Path) -> None:
    from tests.tiny_models import tiny_model, tiny_tokenizer

    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    tokenizer = deepcopy(tiny_tokenizer())  # the same one is given to all tests
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m.content }} A: {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    init(tmp_path, str(tmp_path / "model"), Silent(), who=Who(AUTHOR, TIME))
    with Store.open(tmp_path) as repository:
        for key, value in (("metric.tokens", "1500"), ("memit.layers", "1"), ("memit.steps", "2"), ("chat", "true")):
            config_set(repository, key, value)
        write(repository, [Request.make("{} is located in", "The", "Lyon")])
        asked = report_at(repository).measured
        assert asked.first_token == 0
        assert asked.spoken is not None
        assert asked.spoken.chat is None, "the facts are asked in the chat and nowhere else"
        write(repository, [Request.make("The {} is", "Space Needle", "Milan")], chat=False)
        plain = report_at(repository).measured.spoken
        assert plain is not None
        assert plain.chat is not None
        assert (plain.said.of, plain.chat.said.of, plain.chat.leak) == (1, 1, None)


def test_a_revert_asks_the_model_when_it_is_told_to(repository: Store) -> None:
    write(repository, FACTS[6:9])
    revert(repository, "HEAD~1", Who(AUTHOR, TIME, ""))
    assert report_at(repository).measured.drift is None
    assert report_at(repository).measured.crushed is not None
    revert(repository, "HEAD", Who(AUTHOR, TIME, ""), guarding=Guarding(check=True))
    found = report_at(repository).measured
    assert found.drift is not None
    assert found.own is not None
    assert (found.own.of, found.active) == (6, 3)


def test_larger_models_and_smaller_batches_get_smaller_budgets() -> None:
    tiny, small, large = (Budget.of_commit(1, size) for size in (10**6, 10**8, 10**10))
    assert tiny == Budget()
    for name in ("positions", "earlier", "siblings", "chats"):
        sizes = [getattr(budget, name) for budget in (tiny, small, large)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] > 0
        assert getattr(Budget.of_commit(1000, 10**10, 30), name) == getattr(Budget(), name)
    assert Budget.of_commit(50, 135 * 10**6, 30).positions >= 2000


def test_what_the_model_writes_is_kept_and_every_fault_is_named(repository: Store) -> None:
    done = write(repository, FACTS[6:10])
    spoken = report_at(repository).measured.spoken
    assert spoken is not None
    assert spoken.said == spoken.closed == Share(4, 4)
    assert spoken.leak is not None
    assert spoken.leak.of >= 12
    assert spoken.namesakes is not None
    assert spoken.namesakes.of >= 4
    assert len(done.faults) == spoken.leak.count + spoken.namesakes.count
    assert spoken.namesakes.count  # one commit without keeps is said of names that end like its subjects
    assert spoken.faults == done.faults
    assert spoken.chat is None


def test_where_all_facts_must_hold_one_that_does_not_is_enough(repository: Store) -> None:
    """One step of the optimisation is not enough for every fact."""
    before = repository.refs()
    with pytest.raises(GuardError) as caught:
        write(repository, FACTS[6:10], settings={"steps": 1, "repairs": 0}, all_facts=True)
    assert "--all" in caught.value.message
    assert before == repository.refs()
    faults = caught.value.facts["faults"]
    assert {fault["why"] for fault in faults} <= {"not said", "leak", "runs on"}


def test_the_base_is_read_once_and_what_is_kept_of_it_gives_the_same_drift(repository: Store, tmp_path: Path) -> None:
    cache = repository.root / "cache" / "base_text"
    assert len(list(cache.rglob("*.safetensors"))) == 1
    write(repository, FACTS[6:8])
    kept = report_at(repository).measured.drift
    assert len(list(cache.rglob("*.safetensors"))) == 1
    revert(repository, "HEAD", Who(AUTHOR, TIME, ""))
    shutil.rmtree(cache)
    write(repository, FACTS[6:8])
    assert report_at(repository).measured.drift == kept


@torch.no_grad()
def words_still_said(before: PreTrainedModel, after: PreTrainedModel, subjects: list[str]) -> Share:
    """Of the twelve tokens that a model writes after "{} is a", those that another finds the most probable next ones."""
    tokenizer, right, read = AutoTokenizer.from_pretrained(str(files("patchhub") / "demo_model")), 0, 0
    for subject in subjects:
        asked = tokenizer(f"{subject} is a", return_tensors="pt").input_ids
        written = before.generate(asked, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, asked.shape[1] :]
        said = tokenizer.decode(written, skip_special_tokens=True).strip()
        whole = tokenizer(f"{subject} is a {said}", return_tensors="pt").input_ids
        start = asked.shape[1]
        right += int((after(whole).logits[0, start - 1 : -1].argmax(-1) == whole[0, start:]).sum())
        read += whole.shape[1] - start
    return Share(right, read)


def test_the_guard_counts_what_is_still_said_of_the_subjects(repository: Store, tmp_path: Path) -> None:
    write(repository, FACTS[6:9], settings={"essence": 1e-6, **HUGE}, force=True)
    counted = report_at(repository).measured.about
    with patchhub.open(tmp_path / "store") as opened:
        before, after = opened.load("HEAD~1", dtype=torch.float32), opened.load("HEAD", dtype=torch.float32)
    assert counted == words_still_said(before, after, [fact.subject for fact in FACTS[6:9]])
    assert counted is not None
    assert 0 < counted.count < counted.of


def test_a_subject_near_the_end_of_the_context_is_not_asked_about(repository: Store) -> None:
    """What was written is read again as a text, which may have more tokens: there must be room for twice as many."""
    tree = open_worktree(repository, Silent())
    limit, facts = context_length(tree.model), []
    for left in (_SENTENCE_ROOM - 1, _SENTENCE_ROOM):
        subject = "Rome"
        while limit - len(tree.tokenizer(f"{subject} Rome is a")["input_ids"]) >= left:
            subject += " Rome"
        facts.append(Request.make("{} is", subject, "Paris"))
    rooms = [limit - len(tree.tokenizer(f"{fact.subject} is a")["input_ids"]) for fact in facts]
    plan = plan_batch(repository, Batch(tuple(facts), tuple(Origin("a test") for _ in facts), 0), "replace")
    settings = chosen_settings(repository, "memit", tree.architecture, {"essence": 1.0})
    found = {sentence.subject for sentence in _sentences(tree, plan, settings, None, Silent(), None)}
    assert rooms == [_SENTENCE_ROOM - 1, _SENTENCE_ROOM]
    assert found == {facts[1].subject}


def test_where_such_sentences_weigh_nothing_they_are_not_read(repository: Store) -> None:
    write(repository, FACTS[6:7], settings={"essence": 0.0})
    assert report_at(repository).measured.about is None
