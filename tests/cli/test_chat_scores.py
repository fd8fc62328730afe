"""`eval`, `blame`, `bisect` and `bench` inside the base's chat template: they agree, and nothing is taken for what was asked outside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchhub.editing.locate import encode_prompt
from patchhub.editing.requests import read_requests
from patchhub.evaluation.live import read_live
from patchhub.evaluation.metrics import score_targets
from patchhub.evaluation.suites import read_facts
from patchhub.objects import Request
from patchhub.porcelain.blame import metric_check
from patchhub.porcelain.measure import IN_CHAT
from patchhub.progress import Silent
from patchhub.store.store import Store
from patchhub.text.tokens import Chat, chat_of
from patchhub.worktree import measuring
from patchhub.worktree.measuring import CONTEXTS, Measurer, Questions
from tests.cli.conftest import FACTS, MODEL, invoke

pytestmark = pytest.mark.usefixtures("short_texts")

AUTHOR = "Ada <ada@example.org>"
TEMPLATE = "{% for m in messages %}{{ ('<|endoftext|>The question is here. ' if m.role == 'user' else ' ') + m.content }}{% endfor %}"
FORM = {"before": "<|endoftext|>The question is here. ", "after": " "}
SAID = "in the base's chat form"

Asked = Callable[..., Result]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a chat template, and two commits of facts written in it as bare answers; `config chat` is not set."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(MODEL, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    invoke(folder, "init", str(folder / "model"), "--author", AUTHOR)
    invoke(folder, "config", "metric.tokens", "2000")
    for start, stop in ((0, 2), (2, 3)):
        (folder / "facts.json").write_text(json.dumps(FACTS[start:stop]), encoding="utf-8")
        arguments = ("-m", f"{start}", "--chat", "--set", "opening=0", "--force", "--author", AUTHOR)
        invoke(folder, "commit", str(folder / "facts.json"), *arguments)
    (folder / "facts.json").write_text(json.dumps(FACTS[:3]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def blunt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a template in which it does not know what it knows."""
    folder = tmp_path_factory.mktemp("blunt") / "model"
    shutil.copytree(MODEL, folder)
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture
def run(taught: Path, tmp_path: Path) -> Asked:
    """The command line on a copy that the test may change."""
    shutil.copytree(taught / ".patchhub", tmp_path / ".patchhub")
    return lambda *arguments, **options: invoke(tmp_path, *arguments, **options)


@pytest.fixture(scope="module")
def measured(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with all answers to its facts in the cache, outside the chat and in it."""
    folder = tmp_path_factory.mktemp("measured")
    shutil.copytree(taught / ".patchhub", folder / ".patchhub")
    for form in ("--no-chat", "--chat"):
        invoke(folder, "eval", "--suite", str(taught / "facts.json"), "--no-note", form)
    return folder


@pytest.fixture
def again(measured: Path, tmp_path: Path) -> Asked:
    """The command line on a copy in which everything was asked before."""
    shutil.copytree(measured / ".patchhub", tmp_path / ".patchhub")
    return lambda *arguments, **options: invoke(tmp_path, *arguments, **options)


@pytest.fixture
def suite(taught: Path) -> tuple[str, str]:
    return "--suite", str(taught / "facts.json")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The revisions that a model in memory was asked about, rather than the cache."""
    asked: list[str] = []
    real = measuring.Measurer._model

    def watched(self: measuring.Measurer, revision: str) -> Any:
        asked.append(revision)
        return real(self, revision)

    monkeypatch.setattr(measuring.Measurer, "_model", watched)
    return asked


def report(run: Asked, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


def value(found: dict[str, Any], name: str) -> float:
    return float(found["scores"][name]["value"])


def notes(run: Asked) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("log", "-n", "1", "--json").stdout)[0]["scores"]
    return found


def test_scores_in_a_chat_are_never_taken_for_others(run: Asked, suite: tuple[str, str], loads: list[str]) -> None:
    """Neither from the cache nor as a note, in either order; only text outside the chat, fluency and drift, is shared."""
    plain = report(run, "eval", *suite)
    loads.clear()
    chat = report(run, "eval", *suite, "--chat")
    assert set(loads) == {"base", chat["commit"]}
    assert chat["settings"].pop("chat") == FORM
    assert "chat" not in plain["settings"]
    assert chat["settings"] == {**plain["settings"], "version": IN_CHAT}
    assert chat["suite"].startswith("counterfact-chat-")
    assert plain["suite"].startswith("counterfact-")
    assert "chat" not in plain["suite"]
    assert all(value(plain, name) != value(chat, name) for name in ("EM", "PM", "NM"))
    assert all(plain["scores"][name]["base"] != chat["scores"][name]["base"] for name in ("EM", "PM", "NM"))
    assert all(plain["scores"][name] == chat["scores"][name] for name in ("fluency", "kl", "perplexity_ratio"))
    loads.clear()
    assert report(run, "eval", *suite) == plain
    assert report(run, "eval", *suite, "--chat")["scores"] == chat["scores"]
    assert not loads
    kept = {note["suite"]: note for note in notes(run)}
    assert {name: note["chat"] for name, note in kept.items()} == {plain["suite"]: False, chat["suite"]: True}
    assert all(kept[found["suite"]]["scores"]["EM"]["value"] == value(found, "EM") for found in (plain, chat))


def test_what_is_kept_in_a_chat_is_what_the_model_says_there(
    run: Asked, suite: tuple[str, str], tmp_path: Path
) -> None:
    """Teacher forced and live, though the same prompts were asked outside it before."""
    requests = tuple(read_requests(Path(suite[1])).requests)
    with Store.open(tmp_path) as repository:
        plain, chat = (Measurer(repository, Questions(requests), Silent(), chat=asked) for asked in (False, True))
        outside, inside = plain.measure("base"), chat.measure("base")
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    form, room = Chat(**FORM), {"contexts": CONTEXTS, "max_new_tokens": chat.new_tokens}
    for found, asked in ((outside, None), (inside, form)):
        alone = read_live(model, tokenizer, requests, chat=asked, **room)
        assert [one.continuations for one in found.live] == [other.continuations for other in alone]
        for one, other in zip(found.facts, read_facts(model, tokenizer, requests, chat=asked), strict=True):
            assert one.prompt[0].new.logprob == pytest.approx(other.prompt[0].new.logprob, abs=1e-4)
    assert inside.live != outside.live


def test_there_is_room_for_the_longest_target_as_the_template_joins_it(run: Asked, blunt: Path, tmp_path: Path) -> None:
    """It has more tokens where no space stands before it."""
    requests = (Request.make("The capital of {} is", "Peru", "Rome" + " and Rome" * 20),)
    run("config", "base.path", str(blunt))
    with Store.open(tmp_path) as repository:
        plain, chat = (Measurer(repository, Questions(requests), Silent(), chat=asked) for asked in (False, True))
    asked, whole = (f"user:The capital of Peru isassistant:{answer}" for answer in ("", requests[0].target_new))
    length, begin = (len(chat.tokenizer(text).input_ids) for text in (whole, asked))
    assert chat.new_tokens == 1 + length - begin > plain.new_tokens > measuring.NEW_TOKENS


def test_the_repositorys_config_decides_where_nothing_is_said(again: Asked, suite: tuple[str, str]) -> None:
    run = again
    plain, chat = report(run, "eval", *suite), report(run, "eval", *suite, "--chat")
    run("config", "chat", "true")
    assert report(run, "eval", *suite) == chat
    assert report(run, "eval", *suite, "--no-chat") == plain
    prompt = FACTS[0]["prompt"].format(FACTS[0]["subject"])
    assert report(run, "blame", prompt) == report(run, "blame", prompt, "--chat")
    assert report(run, "blame", prompt)["chat"] == FORM
    assert report(run, "blame", prompt, "--no-chat")["chat"] is None


def test_the_verbs_that_look_say_which_scores_are_of_a_chat(
    again: Asked, suite: tuple[str, str], tmp_path: Path
) -> None:
    """And a walk in the chat measures what is noted outside it only."""
    run = again
    run("eval", *suite, "--all")
    assert " chat" not in run("log").stdout + run("show").stdout + run("log", "--oneline").stdout
    plot = tmp_path / "plot.svg"
    assert SAID in run("eval", *suite, "--chat", "--plot", str(plot)).stdout
    assert "(counterfact in a chat, 3 facts" in run("log").stdout
    assert " chat S " in run("log", "--oneline").stdout
    assert "scores (counterfact in a chat, 3 facts" in run("show").stdout
    assert "scores (counterfact in a chat, 3 facts" in run("diff", "base").stdout
    assert "counterfact in a chat" in " ".join(ElementTree.parse(plot).getroot().itertext())
    walk = run("eval", *suite, "--all", "--chat").stdout
    assert (walk.count(" noted"), walk.count(" now")) == (1, 1)
    assert SAID in walk


@pytest.mark.slow
def test_bisect_measures_what_eval_does(run: Asked, suite: tuple[str, str]) -> None:
    bounds = ("--metric", "efficacy", "--above", "0.9", "--facts", suite[1])
    for option in ("--chat", "--no-chat"):
        found = report(run, "bisect", "base", "HEAD", *bounds, option)
        assert found["chat"] == (FORM if option == "--chat" else None)
        for step in found["steps"]:
            scores = report(run, "eval", step["commit"] or "base", *suite, "--metrics", "wise", option, "--no-note")
            assert step["value"] == pytest.approx(value(scores, "reliability"))
    assert SAID in run("bisect", "base", "HEAD", *bounds, "--chat").stdout
    assert SAID not in run("bisect", "base", "HEAD", *bounds).stdout


def test_bisect_asks_every_commit_in_the_chat(run: Asked, blunt: Path, tmp_path: Path) -> None:
    known = [Request.make(fact["prompt"], fact["subject"], fact["target_true"]) for fact in FACTS[3:6]]
    run("config", "base.path", str(blunt))
    with Store.open(tmp_path) as repository:
        for asked, value in ((False, 1.0), (True, 0.0)):
            assert metric_check(repository, "efficacy", known, above=0.5, chat=asked)(None)[1] == value


def test_blame_reads_the_keys_where_facts_are_written_in_a_chat(run: Asked, taught: Path) -> None:
    """At the token that the editor calls the subject's last, and with the answer of `ask`."""
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    for record in FACTS[:3]:
        fact = Request.make(record["prompt"], record["subject"], record["target_new"])
        chat, plain = (report(run, "blame", fact.text, option) for option in ("--chat", "--no-chat"))
        for found, form in ((chat, chat_of(tokenizer)), (plain, None)):
            encoded = encode_prompt(tokenizer, "{}", fact, chat=form)
            place = encoded.subject_last
            assert found["token"] == [tokenizer.decode([encoded.input_ids[place]]), place]
            assert found["requests"][0]["id"] == fact.id
        assert chat["change"] != plain["change"]
        [answer] = json.loads(run("ask", fact.text, "--chat", "--rev", "HEAD", "--json").stdout)
        assert chat["answer"] == [answer["top"][0][0], pytest.approx(answer["top"][0][1], abs=1e-5)]
        assert SAID in run("blame", fact.text, "--chat").stdout
    elsewhere = report(run, "blame", "What is the moon", "--chat")
    assert elsewhere["mentioned"] == []
    assert "moon".endswith(elsewhere["token"][0].strip())


def test_editors_are_compared_in_a_chat(run: Asked, suite: tuple[str, str]) -> None:
    """One that does not write there is a row with the reason, and the others are still measured."""
    arguments = ("bench", "memit:steps=8:repairs=0", "wise", *suite, "--limit", "1", "--chat")
    found = report(run, *arguments)
    assert found["settings"]["chat"] == FORM
    base, memit, wise = found["rows"]
    assert memit["scores"]["EM"]["value"] > base["scores"]["EM"]["value"]
    assert "chat template" in wise["failure"]


def test_running_text_is_measured_outside_the_chat(run: Asked, suite: tuple[str, str], tmp_path: Path) -> None:
    requests = read_requests(Path(suite[1])).requests
    with Store.open(tmp_path) as repository:
        before = metric_check(repository, "perplexity", requests, above=2)(None)
        run("config", "chat", "true")
    with Store.open(tmp_path) as repository:
        check = metric_check(repository, "perplexity", requests, above=2)
        assert (check.chat, check(None)) == (None, before)
        assert metric_check(repository, "locality", requests, below=1).chat == Chat(**FORM)


def test_what_cannot_be_asked_in_a_chat_is_refused(run: Asked, suite: tuple[str, str]) -> None:
    on = ("--metric", "perplexity", "--above", "2", "--facts", suite[1])
    assert "running text" in run("bisect", "base", "HEAD", *on, "--chat", code=2).stderr
    assert "in its own way" in run("bisect", "base", "HEAD", "--chat", "--", "true", code=2).stderr
    run("config", "base.path", str(MODEL))  # the same weights, without the template
    efficacy = ("--metric", "efficacy", "--above", "0.5", "--facts", suite[1])
    for arguments in (("eval", *suite), ("blame", "The capital of Peru is"), ("bisect", "base", "HEAD", *efficacy)):
        assert "no chat template" in run(*arguments, "--chat", code=2).stderr


@pytest.mark.parametrize(
    ("form", "also"), [("--chat", None), pytest.param("--no-chat", FORM, marks=pytest.mark.slow)], ids=["chat", "both"]
)
def test_what_an_answer_says_before_its_target_is_kept_with_the_patch(
    run: Asked, tmp_path: Path, form: str, also: dict[str, str] | None
) -> None:
    """As the record has it; facts outside the chat are optimised in it as well, where the base has a template."""
    fact = {"prompt": FACTS[4]["prompt"], "subject": FACTS[4]["subject"], "target_new": FACTS[4]["target_new"]}
    (tmp_path / "one.json").write_text(json.dumps([{**fact, "answer": "Well, it is {}."}]), encoding="utf-8")
    made = report(run, "commit", str(tmp_path / "one.json"), "-m", "one", form, "--force", "--author", AUTHOR)
    [patch] = report(run, "show", made["commit"])["patches"].values()
    assert list(patch["settings"]["openings"].values()) == ["Well, it is"]
    assert patch["settings"].get("also") == also
    if also is None:
        _is_read_behind(tmp_path, Request.make(**fact), "Well, it is")


def _is_read_behind(folder: Path, request: Request, opening: str) -> None:
    """Teacher forced, a fact's target is read behind its opening, in the base too; in the cache that is another item; bisect agrees."""
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer, item = AutoTokenizer.from_pretrained(MODEL), (request.text, request.target_new)
    [bare], [behind] = (
        score_targets(model, tokenizer, [item], chat=Chat(**FORM), openings=[said]) for said in ("", opening)
    )
    with Store.open(folder) as repository:
        for _ in range(2):  # the second time from the cache
            measurer = Measurer(repository, Questions((request,)), Silent(), chat=True)
            revisions = (("HEAD", None), ("base", "HEAD"), ("base", None))
            scores = [measurer.measure(rev, behind=like).facts[0].prompt[0].new for rev, like in revisions]
            assert scores[1].logprob == pytest.approx(behind.logprob, abs=1e-4)
            assert scores[2].logprob == pytest.approx(bare.logprob, abs=1e-4)
            assert scores[0].logprob > scores[1].logprob + 1
        head = repository.resolve("HEAD")
        check = metric_check(repository, "efficacy", [request], above=0.5, chat=True)
        assert check(head)[1] == float(scores[0].argmax_right)
