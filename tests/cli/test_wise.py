"""WISE through the command line and `patchhub.load`, on the shipped model: one store is made, each test gets a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchhub
from patchhub.editing.settings import WiseSettings
from patchhub.errors import BaseError, CorruptStoreError, SettingsError
from patchhub.evaluation.metrics import score_targets
from patchhub.objects import Request
from patchhub.runtime.routing import decisions, routed
from patchhub.sets.elements import active_requests, distinct
from patchhub.sets.settings import SETTINGS
from patchhub.sets.shards import active_shards
from patchhub.store.store import Store
from patchhub.worktree.loading import FOLDER
from tests.cli.conftest import FACTS, MODEL, invoke

ADA = ("--author", "Ada <ada@example.org>")
FIRST, SECOND, THIRD = FACTS[:3], FACTS[3:5], FACTS[5:7]
OTHER = "The capital of France is"
METRIC = {"metric.tokens": "3000", "memit.steps": "15"}

Run = Callable[..., Result]


def commit(folder: Path, facts: Sequence[dict[str, Any]], *options: str, method: str = "wise") -> dict[str, Any]:
    file = folder / "facts.json"
    file.write_text(json.dumps(facts), encoding="utf-8")
    arguments = ("commit", str(file), "-m", f"{len(facts)} facts", "--method", method, "--json", *ADA, *options)
    found: dict[str, Any] = json.loads(invoke(folder, *arguments).stdout)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits into one shard, then one of MEMIT; all thresholds fresh."""
    folder = tmp_path_factory.mktemp("wise")
    invoke(folder, "init", str(MODEL), *ADA)
    quick = {"wise.rounds": "2", "wise.prefixes": "3", "wise.neighbours": "1", **METRIC}
    for key, value in quick.items():
        invoke(folder, "config", key, value)
    assert commit(folder, FIRST)["held"] == 3
    assert commit(folder, SECOND)["held"] == 2
    commit(folder, THIRD, method="memit")
    return folder


@pytest.fixture
def wise(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    shutil.copytree(made, folder)
    return folder


@pytest.fixture
def run(wise: Path) -> Run:
    return lambda *arguments, **options: invoke(wise, *arguments, **options)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def shards(folder: Path, revision: str = "HEAD") -> dict[str, int]:
    """The active shards and how many facts each holds."""
    with Store.open(folder) as repository:
        active = repository.active(repository.resolve(revision))
        return {identity: len(patch.requests) for identity, patch in active_shards(repository, active).items()}


def requests(folder: Path, revision: str = "HEAD") -> tuple[Request, ...]:
    with Store.open(folder) as repository:
        return distinct(active_requests(repository, repository.active(repository.resolve(revision))))


def held(model: Any, tokenizer: Any, facts: Sequence[Request]) -> int:
    return sum(s.argmax_right for s in score_targets(model, tokenizer, [(r.text, r.target_new) for r in facts]))


def logits(model: Any, tokenizer: Any, *prompts: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).logits for prompt in prompts
        ]


# --- commit -----------------------------------------------------------------------------------------------------------


def test_a_commit_continues_the_open_shard(made: Path) -> None:
    assert list(shards(made, "HEAD~2").values()) == [3]
    assert list(shards(made, "HEAD~1").values()) == [5]
    assert shards(made, "HEAD~1") == shards(made, "HEAD")
    assert len(requests(made)) == 7


def test_columns_are_recorded_as_if_there_were_no_shards(made: Path, tmp_path: Path) -> None:
    """The same facts on the unpatched base give the same patch, byte for byte."""
    invoke(tmp_path, "init", str(MODEL), *ADA)
    for key, value in METRIC.items():
        invoke(tmp_path, "config", key, value)
    plain = commit(tmp_path, THIRD, method="memit")["patches"]
    with Store.open(made) as repository:
        beside = repository.commit(str(repository.head[1])).added
    assert {patch for patch, _ in beside} == set(plain)


def test_every_fact_holds_in_the_routed_model_and_unrelated_answers_are_the_main_memorys(
    made: Path, tokenizer: Any
) -> None:
    model = patchhub.load(made, "HEAD~1")
    assert held(model, tokenizer, requests(made, "HEAD~1")) == 5
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    assert all(
        torch.equal(*pair) for pair in zip(logits(model, tokenizer, OTHER), logits(base, tokenizer, OTHER), strict=True)
    )
    assert decisions(model) == [None]


@pytest.mark.slow
def test_a_full_shard_is_followed_by_new_ones_in_their_own_subspaces(wise: Path, run: Run) -> None:
    run("config", "wise.shard_size", "4")
    assert len(commit(wise, FACTS[7:12])["patches"]) == 2  # the open one has five facts already
    assert sorted(shards(wise).values()) == [1, 4, 5]
    with Store.open(wise) as repository:
        numbers = [repository.patch(identity).settings["number"] for identity in shards(wise)]
    assert sorted(numbers) == [0, 1, 2]


def test_a_shard_can_be_recompressed_and_is_closed_then(wise: Path) -> None:
    done = commit(wise, FACTS[7:8], "--set", "rank=4", "--set", "shard_size=1")
    with Store.open(wise) as repository:
        report = repository.patch(done["patches"][0]).settings["report"]
        files = [repository.objects.path(repository.patch(i).tensors).stat().st_size for i in shards(wise)]
    assert report["rank"] == 4
    assert 0 < report["relative_error"] < 1
    assert min(files) < max(files) / 4
    commit(wise, FACTS[8:9], "--set", "shard_size=5")
    assert len(shards(wise)) == 3


def test_replacing_a_fact_of_a_shard_trains_the_shard_again(wise: Path, run: Run, tokenizer: Any) -> None:
    """By MEMIT: the shard forgets the fact, the weights learn the new target."""
    other = {**FIRST[0], "target_new": "Paris"}
    file = wise / "other.json"
    file.write_text(json.dumps([other]), encoding="utf-8")
    run("commit", str(file), "-m", "other", code=4)
    (before,) = shards(wise)
    commit(wise, [other], "--on-conflict", "replace", method="memit")
    ((after, count),) = shards(wise).items()
    assert (after != before, count) == (True, 4)
    assert other["target_new"] in {request.target_new for request in requests(wise)}
    assert FIRST[0]["target_new"] not in {request.target_new for request in requests(wise)}


def test_every_setting_of_wise_is_a_key() -> None:
    keys = {key.removeprefix("wise.") for key in SETTINGS if key.startswith("wise.")}
    assert keys == set(WiseSettings.__dataclass_fields__) | {"mode", "rank"}


# --- history ----------------------------------------------------------------------------------------------------------


def test_reverting_one_fact_of_a_shard_trains_it_on_the_others(wise: Path, run: Run, tokenizer: Any) -> None:
    subject = FIRST[1]["subject"]
    done = json.loads(run("revert", "--subject", subject, "--json", *ADA).stdout)
    assert len(done["removed"]) == 1
    assert list(shards(wise)) == done["trained"]
    staying = requests(wise)
    assert subject not in {request.subject for request in staying}
    assert len(staying) == 6
    assert held(patchhub.load(wise), tokenizer, staying) >= 5
    assert (
        "was trained again" not in run("revert", "HEAD", *ADA).stdout
    )  # the shard of before is brought back as it was
    assert shards(wise) == shards(wise, "HEAD~2")


def test_reverting_the_second_commit_brings_the_first_shard_back(wise: Path, run: Run) -> None:
    out = run("revert", "HEAD~1", *ADA).stdout
    assert "the main weights are as they were" in out
    assert shards(wise) == shards(wise, "HEAD~3")


@pytest.mark.slow
def test_a_merge_decided_against_a_fact_of_a_shard_trains_it_again(wise: Path, run: Run) -> None:
    contradicted, other = FACTS[12], FACTS[13]
    run("switch", "-c", "side", "HEAD~2")
    commit(wise, [{**contradicted, "target_new": "Paris"}, other])
    run("switch", "main")
    commit(wise, [contradicted], method="memit")
    assert "1 contradiction" in run("merge", "side", *ADA, code=4).stdout
    assert "was trained again, on the 4 facts" in run("merge", "--continue", "--ours", *ADA).stdout
    assert sorted(shards(wise).values()) == [4, 5]
    said = {request.subject: request.target_new for request in requests(wise)}
    assert [said[fact["subject"]] for fact in (contradicted, other)] == ["Bonn", other["target_new"]]
    run("undo", *ADA)
    run("merge", "side", "--theirs", *ADA)
    said = {request.subject: request.target_new for request in requests(wise)}
    assert said[contradicted["subject"]] == "Paris"


def test_the_screens_say_what_is_in_shards(run: Run, made: Path) -> None:
    (shard,) = shards(made)
    status = run("status").stdout
    assert "7 active facts" in status
    assert f"shard 0 ({shard[:12]}): 5 facts beside model.layers.1" in status
    assert "its threshold is stale" in status  # MEMIT changed the layer below
    assert "the threshold of 1 shard measured again" in run("refresh", *ADA).stdout
    assert "stale" not in run("status").stdout
    assert "(gave way)" in run("show", "HEAD~2").stdout
    assert "+2 -0 (5 active)" in run("log", "--oneline").stdout
    assert FIRST[0]["target_new"] in run("diff", "base", "HEAD~3").stdout
    assert "5 active facts in shards" in run("blame", OTHER).stdout
    assert "active" in run("search", FIRST[0]["subject"]).stdout
    assert "sound" in run("fsck").stdout


# --- loading ----------------------------------------------------------------------------------------------------------


def test_attach_switch_and_detach_are_exact(made: Path, tokenizer: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    prompts = [request.text for request in requests(made)] + [OTHER]
    plain = logits(base, tokenizer, *prompts)
    for revision in ("HEAD", "HEAD~2", "base", "HEAD~1"):
        patchhub.attach(base, made, revision)
        assert [memory.name for memory in routed(base)] == list(shards(made, revision))
        expected = logits(patchhub.load(made, revision), tokenizer, *prompts)
        assert all(torch.equal(*pair) for pair in zip(logits(base, tokenizer, *prompts), expected, strict=True))
    patchhub.detach(base)
    assert routed(base) == ()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(logits(base, tokenizer, *prompts), plain, strict=True))


def test_the_mode_is_chosen_at_load_time(wise: Path, run: Run, tokenizer: Any) -> None:
    run("config", "wise.shard_size", "3")
    commit(wise, FACTS[7:9])
    assert len(shards(wise)) == 2
    facts = requests(wise)
    apart, joined = (held(patchhub.load(wise, wise=mode), tokenizer, facts) for mode in ("retrieve", "merge"))
    assert (apart >= len(facts) - 1, joined >= len(facts) // 2) == (True, True)
    model = patchhub.load(wise, wise="merge")
    logits(model, tokenizer, facts[0].text)
    assert set(decisions(model)) <= {"merged", None}
    run("config", "wise.mode", "merge")
    model = patchhub.load(wise)
    logits(model, tokenizer, *(fact.text for fact in facts if fact.subject == FIRST[0]["subject"]))
    assert decisions(model) == ["merged"]
    with pytest.raises(SettingsError):
        patchhub.load(wise, wise="both")  # type: ignore[arg-type]


def test_an_applied_checkpoint_routes_when_patchhub_loads_it(made: Path, tmp_path: Path, tokenizer: Any) -> None:
    out = tmp_path / "applied"
    assert "other loaders give the main weights alone" in invoke(made, "apply", "HEAD", "--out", str(out)).stdout
    prompts = [request.text for request in requests(made)] + [OTHER]
    expected = logits(patchhub.load(made), tokenizer, *prompts)
    found = logits(patchhub.load(out), tokenizer, *prompts)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert routed(AutoModelForCausalLM.from_pretrained(out)) == ()
    victim = max((out / FOLDER).iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="do not hash"):
        patchhub.load(out)


def test_what_only_a_store_can_give_is_refused_of_an_applied_checkpoint(made: Path, tmp_path: Path) -> None:
    invoke(made, "apply", "HEAD", "--out", str(tmp_path / "out"))
    for choice in ({"revision": "HEAD~1"}, {"base": MODEL}, {"verify": True}, {"side_path": True}):
        with pytest.raises(patchhub.PatchhubError, match=f"{next(iter(choice))} cannot be chosen"):
            patchhub.load(tmp_path / "out", **choice)


def test_shards_are_routed_to_where_deltas_run_beside_the_weights(made: Path, tokenizer: Any) -> None:
    prompts = [request.text for request in requests(made)] + [OTHER]
    expected = logits(patchhub.load(made, dtype=torch.float32), tokenizer, *prompts)
    model = patchhub.load(made, dtype=torch.float32, side_path=True)
    for found, wanted in zip(logits(model, tokenizer, *prompts), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-3)
    assert len(routed(model)) == 1
    patchhub.detach(model)
    base = logits(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), tokenizer, *prompts)
    assert all(torch.equal(*pair) for pair in zip(logits(model, tokenizer, *prompts), base, strict=True))


def test_shards_of_another_base_are_refused(made: Path, tmp_path: Path) -> None:
    """Also where no other weight is touched: the routed weight of the model in memory is compared with the base's."""
    other = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.5)
    with pytest.raises(BaseError):
        patchhub.attach(other, made, "HEAD~1")
    assert routed(other) == ()


def test_a_state_without_shards_is_applied_as_ever(made: Path, tmp_path: Path) -> None:
    invoke(made, "apply", "base", "--out", str(tmp_path / "plain"))
    assert not (tmp_path / "plain" / FOLDER).exists()


def test_what_takes_plain_weights_alone_is_refused(run: Run, tmp_path: Path) -> None:
    assert "side memory" in run("export", "peft", "HEAD", "--out", str(tmp_path / "p"), code=6).stderr
    assert "side memory" in run("export", "diff", "HEAD", "--out", str(tmp_path / "d"), code=6).stderr


def test_a_clone_has_the_shards(made: Path, wise: Path, run: Run, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    run("remote", "add", "origin", f"file://{remote}")
    run("push", "origin", "main", *ADA)
    invoke(tmp_path, "clone", f"file://{remote}", str(tmp_path / "clone"), "--base", str(MODEL), *ADA)
    assert shards(tmp_path / "clone") == shards(made)
    assert "sound" in invoke(tmp_path / "clone", "fsck").stdout
