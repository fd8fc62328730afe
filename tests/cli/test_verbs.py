"""The verbs end to end, on real edits of the shipped model: what a user sees, and that the weights are what is promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchhub
from patchhub.evaluation.metrics import score_targets
from patchhub.models.checkpoint import open_checkpoint
from patchhub.models.fingerprint import fingerprint
from patchhub.store.store import Store
from tests.cli.conftest import FACTS, MODEL, Run, invoke, snapshot_of


def tensors(folder: Path) -> dict[str, object]:
    return dict(fingerprint(open_checkpoint(folder)).tensors)


def held(model: object, facts: list[dict[str, str]]) -> int:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pairs = [(fact["prompt"].replace("{}", fact["subject"]), fact["target_new"]) for fact in facts]
    return sum(score.argmax_right for score in score_targets(model, tokenizer, pairs))  # type: ignore[arg-type]


def commit(run: Run, facts: list[dict[str, object]], message: str, *options: str) -> dict[str, object]:
    lines = "\n".join(json.dumps(fact) for fact in facts)
    result = run("commit", "-", "-m", message, "--json", *options, stdin=lines)
    document: dict[str, object] = json.loads(result.stdout)
    return document


def test_a_store_is_made_once(run: Run, store: Path) -> None:
    assert "exists already" in run("init", str(MODEL), code=6).stderr
    assert json.loads(run("status", "--json").stdout)["branch"] == "main"


def test_an_empty_history_is_no_error(tmp_path: Path) -> None:
    invoke(tmp_path, "init", str(MODEL))
    assert invoke(tmp_path, "log").stdout == ""
    assert json.loads(invoke(tmp_path, "log", "--json").stdout) == []
    assert "No commits yet" in invoke(tmp_path, "status").stdout
    assert "unpatched model" in invoke(tmp_path, "show", code=5).stderr


def test_a_fact_that_the_base_answers_already_is_no_loss(tmp_path: Path) -> None:
    invoke(tmp_path, "init", str(MODEL))
    known = ("--prompt", "The author of {} is", "--subject", "Emma", "--target", "Jane Austen", "-m", "known")
    done = invoke(tmp_path, "commit", *known)
    assert "1 of them is now the model's answer" in done.stdout
    assert "warning" not in done.stderr


def test_a_commit_of_which_nothing_holds_says_what_to_do(tmp_path: Path) -> None:
    invoke(tmp_path, "init", str(MODEL))
    hard = ("--prompt", "The capital of {} is", "--subject", "Norway", "--target", "Lyon", "-m", "hard")
    weak = ("--set", "steps=1", "--set", "learning_rate=0.0001", "--force")
    done = invoke(tmp_path, "commit", *hard, *weak)
    assert "0 of them are now the model's answer" in done.stdout
    assert "patchhub tune" in done.stderr


def test_the_facts_hold_and_can_be_seen(run: Run, store: Path) -> None:
    shown = json.loads(run("show", "--json").stdout)
    assert shown["active"] == len(shown["facts_added"]) == 10
    assert max(shown["check"]["proof"].values()) < 1e-4
    assert {fact["target_new"] for fact in shown["facts_added"]} == {fact["target_new"] for fact in FACTS[:10]}
    assert "ten facts" in run("log").stdout
    difference = json.loads(run("diff", "--json").stdout)
    assert len(difference["added"]) == 10
    assert all(norms["change"] is None or norms["change"] > 0 for norms in difference["norms"].values())
    assert held(patchhub.load(store), FACTS[:10]) >= 9
    assert held(patchhub.load(store, "base"), FACTS[:10]) == 0


def test_ask_puts_two_revisions_side_by_side(run: Run) -> None:
    fact = FACTS[0]
    prompt = fact["prompt"].replace("{}", fact["subject"])
    head, base = json.loads(run("ask", prompt, "--json").stdout)
    assert head["revision"] == "HEAD"
    assert fact["target_new"].startswith(head["top"][0][0].strip())
    assert fact["target_true"].startswith(base["top"][0][0].strip())
    assert fact["target_new"] in run("ask", prompt).stdout


def test_the_applied_checkpoint_is_the_loaded_model(run: Run, store: Path, tmp_path: Path) -> None:
    run("apply", "HEAD", "--out", str(tmp_path / "out"))
    applied = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded = patchhub.load(store)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, applied.state_dict()[name]), name
    base, out = tensors(MODEL), tensors(tmp_path / "out")
    changed = {name for name in base if base[name] != out[name]}
    assert out.keys() == base.keys()
    assert changed == set(json.loads(run("diff", "--json").stdout)["norms"])
    assert "--overwrite" in run("apply", "HEAD", "--out", str(tmp_path / "out"), code=2).stderr


@pytest.mark.parametrize("place", [".", "..", ".patchhub", ".patchhub/objects", "link"])
@pytest.mark.parametrize(
    "verb",
    [["apply"], ["export", "checkpoint"], ["export", "diff"], ["export", "peft"], ["metric", "export"], ["report"]],
)
def test_no_export_harms_a_store(run: Run, store: Path, verb: list[str], place: str) -> None:
    before = snapshot_of(store)
    (store / "link").symlink_to(store / ".patchhub" / "HEAD.json")
    target = [str(store / place)] if verb[0] == "metric" else ["--out", str(store / place)]
    revision = [] if verb[0] in ("metric", "report") else ["HEAD"]
    if verb[-1] == "peft" and place in (".", ".."):
        return  # it writes a new folder inside, which harms nothing
    assert run(*verb, *revision, *target, "--overwrite", code=2).stderr
    assert snapshot_of(store) == before


def test_revert_gives_the_base_bit_for_bit_and_revert_of_revert_the_patch(run: Run, tmp_path: Path) -> None:
    run("apply", "HEAD", "--out", str(tmp_path / "patched"))
    assert "bit for bit" in run("revert", "HEAD").stdout
    run("apply", "HEAD", "--out", str(tmp_path / "reverted"))
    assert tensors(tmp_path / "reverted") == tensors(MODEL)
    run("revert", "HEAD")
    run("apply", "HEAD", "--out", str(tmp_path / "again"))
    assert tensors(tmp_path / "again") == tensors(tmp_path / "patched")


def test_a_second_commit_keeps_the_first_and_the_first_can_go(run: Run, store: Path, tmp_path: Path) -> None:
    commit(run, FACTS[10:], "the rest")
    model = patchhub.load(store)
    assert held(model, FACTS[:10]) >= 9
    assert held(model, FACTS[10:]) >= len(FACTS[10:]) - 1
    result = json.loads(run("revert", "HEAD~1", "--json").stdout)
    assert len(result["removed"]) == 10
    assert result["stale"] == len(FACTS[10:])
    assert result["proof"] < 1e-4
    left = patchhub.load(store)
    assert held(left, FACTS[:10]) == 0
    assert held(left, FACTS[10:]) >= len(FACTS[10:]) - 2
    assert "10" in run("log", "--oneline").stdout
    assert "sound" in run("fsck").stdout


def test_undo_and_redo_move_the_branch(run: Run, store: Path) -> None:
    before = json.loads(run("status", "--json").stdout)["head"]["id"]
    run("revert", "HEAD")
    after = json.loads(run("status", "--json").stdout)["head"]["id"]
    run("undo")
    assert json.loads(run("status", "--json").stdout)["head"]["id"] == before
    run("redo")
    assert json.loads(run("status", "--json").stdout)["head"]["id"] == after


def test_attach_switch_and_detach_are_exact(run: Run, store: Path) -> None:
    run("revert", "HEAD")
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patched = patchhub.load(store, "HEAD~1").state_dict()
    for revision, expected in (("HEAD~1", patched), ("HEAD", base), ("HEAD~1", patched)):
        patchhub.attach(model, store, revision)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()), revision
    patchhub.detach(model)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_a_fact_is_retargeted_in_one_commit(run: Run, store: Path) -> None:
    changed = {**FACTS[0], "target_new": FACTS[1]["target_new"], "paraphrases": [], "neighborhood": []}
    assert "contradiction" in run("commit", "-", "-m", "x", stdin=json.dumps(changed), code=4).stderr
    done = commit(run, [changed], "another answer", "--on-conflict", "replace")
    assert len(done["replaced"]) == 1  # type: ignore[arg-type]
    difference = json.loads(run("diff", "HEAD~1", "HEAD", "--json").stdout)
    assert [pair["after"]["target_new"] for pair in difference["retargeted"]] == [changed["target_new"]]
    assert json.loads(run("status", "--json").stdout)["active"] == 10
    assert held(patchhub.load(store), [changed]) == 1


def test_one_fact_from_the_command_line(run: Run) -> None:
    fact = FACTS[10]
    arguments = ("--prompt", fact["prompt"], "--subject", fact["subject"], "--target", fact["target_new"])
    assert "1 fact written" in run("commit", "-m", "one", *arguments).stdout
    assert "already" in run("commit", "-m", "one", *arguments, code=3).stderr


def test_the_option_that_a_fact_lacks_is_named(run: Run) -> None:
    for target in ([], ["--target", ""]):
        error = run("commit", "-m", "x", "--prompt", "{} is", "--subject", "Ada", *target, code=3).stderr
        assert "target is missing or empty" in error
    assert "there are no facts" in run("commit", "-m", "x", code=3).stderr


def test_what_to_do_about_contradictions_depends_on_where_they_are(run: Run) -> None:
    fact, other = ({**FACTS[0], "target_new": target} for target in ("Nowhere", "Elsewhere"))
    assert "--on-conflict replace" in run("commit", "-", "-m", "x", stdin=json.dumps([fact]), code=4).stderr
    inner = run("commit", "-", "-m", "x", stdin=json.dumps([fact, other]), code=4).stderr
    assert "Keep one of them" in inner


def test_a_patch_is_not_shown_but_named_as_one(run: Run) -> None:
    document = json.loads(run("show", "--json").stdout)
    (patch,) = document["patches"]
    error = run("show", patch[:8], code=5).stderr
    assert "is a patch" in error
    assert f"patchhub show {document['id'][:12]}" in error


def test_the_place_of_the_base_is_a_folder_with_a_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "facts").mkdir()
    before = run("config", "base.path").stdout
    assert "no config.json" in run("config", "base.path", str(tmp_path / "facts"), code=2).stderr
    assert "has no default" in run("config", "base.path", "--unset", code=2).stderr
    assert run("config", "base.path").stdout == before


def test_a_store_without_its_operation_log_is_not_said_to_be_repairable(run: Run, store: Path) -> None:
    (store / ".patchhub" / "patchhub.db").write_bytes(b"")
    error = run("log", code=7).stderr
    assert "clone again" in error
    assert "--reindex" not in error


def test_exact_duplicates_count_once_with_a_warning(run: Run) -> None:
    result = run("commit", "-", "-m", "twice", stdin="\n".join([json.dumps(FACTS[11])] * 3), code=0)
    assert "2 exact duplicates counted once" in result.stderr
    assert "1 fact written" in result.stdout


def test_settings_are_typed_and_named(run: Run) -> None:
    run("config", "memit.layers", "1-2")
    assert json.loads(run("config", "memit.layers", "--json").stdout) == {"memit.layers": [1, 2]}
    assert "Did you mean memit.layers" in run("config", "memit.layer", "1", code=2).stderr
    assert "above 0" in run("config", "memit.ridge", "-3", code=2).stderr
    assert "one metric" in run("config", "metric.tokens", "10", code=6).stderr
    run("config", "memit.layers", "--unset")
    assert json.loads(run("config", "memit.layers", "--json").stdout) == {"memit.layers": None}


def test_the_metric_is_computed_once(run: Run, store: Path) -> None:
    commit(run, FACTS[12:13], "one more")
    with Store.open(store) as repository:
        metrics = {commit.metric for _, commit in repository.log(str(repository.head[1]))}
    assert len(metrics) == 1
    text = store / "text.txt"
    text.write_text("Some other text than before.\n" * 10)
    arguments = ("commit", "-", "-m", "x", "--text", str(text))
    assert "one metric" in run(*arguments, stdin=json.dumps(FACTS[13]), code=6).stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_passes_arguments_through(store: Path, dtype: torch.dtype) -> None:
    model = patchhub.load(store, dtype=dtype, attn_implementation="eager")
    assert model.dtype == dtype
    assert model.config._attn_implementation == "eager"


def test_attaching_closes_the_store_and_hashes_the_base_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Path] = []
    close = Store.close
    monkeypatch.setattr(Store, "close", lambda self: (closed.append(self.root), close(self))[1])
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    for revision in ("HEAD", "base", "HEAD"):
        patchhub.attach(model, store, revision)
    assert len(closed) == 3
    assert list((store / ".patchhub" / "cache" / "digests").rglob("*.json"))


def test_the_package_names_what_it_offers() -> None:
    assert set(patchhub.__all__) <= set(dir(patchhub))
    assert all(getattr(patchhub, name) is not None for name in patchhub.__all__)
