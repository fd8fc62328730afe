"""Every command line of the README and the pages runs, on the model that is built in, as it stands or with words for its placeholders."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from patchhub.cli.main import main
from tests.cli.conftest import FACTS, MODEL, invoke
from tests.test_docs import PAGES, command_lines

ADA, EVE = "Ada <ada@example.org>", "Eve <eve@example.org>"
TEMPLATE = "{% for m in messages %}Q: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"

SPOKEN: dict[str, tuple[str, ...]] = {
    "init HuggingFaceTB/SmolLM2-135M-Instruct": ("--repo new init model",),
    "init BASE --experts shared": (),
    "init ./model --name org/model": ("--repo new init ./model --name org/model",),
    "apply HEAD --out ../patched": ("apply HEAD --out ../patched",),
    "commit FILE -m TEXT [--all] [--force]": ("commit facts.jsonl -m TEXT --all --force",),
    "commit FILE -m TEXT --method wise": ("commit facts.jsonl -m TEXT --method wise --force --set descent_steps=3",),
    "commit --amend more.jsonl": ("commit --amend more.jsonl --force",),
    'commit hf://datasets/user/facts/train.jsonl -m "From the data set"': (),
    "merge REV | revert REV | cherry-pick REV | import DIR": (
        "merge side",
        "revert HEAD",
        "import adapter --check --force",
    ),
    "refresh [--force]": ("merge side", "refresh --force"),
    "refresh": ("merge side", "refresh"),
    "config guard.LIMIT VALUE": ("config guard.drift 1",),
    "config wise.mode retrieve|merge": ("config wise.mode retrieve", "config wise.mode merge"),
    "branch -r; patchhub switch NAME": ("branch -r", "switch side"),
    "clone hf://user/facts facts": ("clone ../remote facts --base model",),
    "export gguf HEAD --out DIR --fuse BASE.gguf": (),
    "export peft HEAD --out DIR": ("export peft HEAD --out out",),
    "export gguf HEAD --out DIR": ("export gguf HEAD --out out",),
    "export checkpoint HEAD --out DIR": ("export checkpoint HEAD --out out",),
    "export diff HEAD --out FILE": ("export diff HEAD --out out",),
    "export bom HEAD --out FILE": ("export bom HEAD --out out",),
    "export attestations --out scores.jsonl -s": (
        "config sign.key key",
        "eval HEAD --suite facts.json",
        "export attestations --out scores.jsonl -s",
    ),
    "import DIR [--check] [--force]": ("import adapter", "log"),
    "report [REV] --out FILE [--compare N] [--overwrite]": ("report HEAD --out out --compare 1 --overwrite",),
    "branch -m [OLD] NEW": ("branch -m side aside", "branch -m trunk"),
    "switch NAME": ("switch side", "switch -c new", "switch --detach HEAD"),
    "switch -c NAME base": ("switch -c new base",),
    "tag NAME [REV]": ("tag new", "tag old HEAD~1"),
    "reset REV": ("reset HEAD~1",),
    "reflog [REF]": ("reflog", "reflog main"),
    "undo [N]": ("undo", "redo", "undo 2"),
    "merge REV [-m TEXT] [--no-ff] [--ours | --theirs | --choices FILE] [--refresh]": (
        "merge side -m TEXT --no-ff --ours --refresh",
    ),
    "merge REV --dry-run": ("merge side --dry-run",),
    "merge --continue [--ours | --theirs | --choices FILE]": ("merge other !4", "merge --continue --ours"),
    "merge --continue --theirs": ("merge other !4", "merge --continue --theirs"),
    "merge fixes": ("branch fixes side", "merge fixes"),
    "switch -c fixes": ("switch -c fixes",),
    "cherry-pick REV [--on-conflict replace]": ("cherry-pick side --on-conflict replace",),
    "revert REV [--subject S ...] [--request ID ...]": ('revert v1.0 --subject "Australia"',),
    "revert --subject S | --request ID": ("revert --subject Australia",),
    "revert REV | revert --subject TEXT": ("revert HEAD", "revert --subject Australia"),
    "merge | cherry-pick | squash | push | ...": ("merge side", "push", "squash 2"),
    "search WORDS": ("search capital",),
    "blame PROMPT": ('blame "The capital of Australia is"',),
    "bisect GOOD BAD -- COMMAND": ("bisect base HEAD -- python check.py",),
    "squash N -m TEXT": ("squash 2 -m TEXT",),
    "gc [--dry-run]": ("gc", "gc --dry-run"),
    "apply REV --out DIR": ("apply HEAD --out out",),
    'approve FROM..TO -m "Checked"': ("config sign.key key", f"approve base..HEAD -m Checked --author '{EVE}'"),
    "config sign.key ~/.ssh/facts": ("config sign.key key",),
    'commit facts.jsonl -m "Why" -s': ("config sign.key key", "commit facts.jsonl -m Why -s"),
    "pull --require-signed allowed_signers": (
        "config sign.key key",
        "sign",
        "push",
        "pull --require-signed allowed_signers",
    ),
    'commit facts.jsonl -m "..." --quantization 4bit': ("commit facts.jsonl -m text --quantization 4bit --force",),
    "remote add origin hf://user/facts": ("remote add hub hf://user/facts",),
    "tag v1.1": ("tag v1.1",),
    "push origin main v1.1": ("tag v1.1", "push origin main v1.1"),
    "metric compute --device stream --text corpus.txt": (
        "init model --repo fresh",
        "metric compute --device stream --text corpus.txt --repo fresh",  # the store of this world has its metric
    ),
    "bench memit memit:ridge=400 memit:layers=3-5 --suite facts.json": (
        "bench memit memit:ridge=400 memit:layers=3-5:steps=2 --suite facts.json",
    ),
    "bisect base HEAD --metric locality --below 0.9 --chat": ("bisect base HEAD --metric locality --below 0.9 --chat",),
    "verify": ("config sign.key key", "sign", "verify"),
    'update --subject "Acme Corp" --target "Ada Young"': ("update --subject 'Acme Corp' --target 'Ada Young' --force",),
    'commit facts.jsonl -m "..." --chat': ("commit facts.jsonl -m text --chat --force",),
    "bisect v1.0 HEAD --metric locality --below 0.9": (
        "bisect v1.0 HEAD --metric locality --below 0.9 !5",
    ),  # bad from v1.0 on
    "demo": (),
}
"""What is typed in place of a line with placeholders (``!4``: with this exit code), and () for one that needs what only `ELSEWHERE` has."""

ELSEWHERE: dict[str, str] = {
    "init BASE --experts shared": "models/test_experts.py",
    'commit hf://datasets/user/facts/train.jsonl -m "From the data set"': "editing/test_requests.py",
    "export gguf HEAD --out DIR --fuse BASE.gguf": "export/test_llama_cpp.py",
    "verify-served http://localhost:8000/v1": "cli/test_served.py",
    "verify-served http://localhost:8080": "cli/test_served.py",
    "eval HEAD --suite facts.json --judge http://localhost:8000": "cli/test_judge.py",
    "eval HEAD --harness arc_easy,lambada_openai": "cli/test_harness.py",
    'commit facts.jsonl -m "Corrections" --on ray://head:10001': "porcelain/test_workers.py",
    'commit facts.jsonl -m "Corrections" --on auto --workers 16': "porcelain/test_workers.py",
    'commit facts.jsonl -m "Corrections" --on FIRST:6379': "porcelain/test_workers.py",
    "demo": "cli/test_verbs.py",
}
"""Lines that need a server, a cluster, a mixture of experts or the Hub, and the tests that have one."""

CHAT = {"--chat"}


def plain(line: str) -> str:
    """A line without ``patchhub`` and without what is said beside it."""
    return re.split(r"\s+#|\s{2,}", line.removeprefix("patchhub ").strip())[0].strip()


LINES = sorted({plain(line) for page in PAGES for line in command_lines(page)})
RUN = [line for line in LINES if line not in ELSEWHERE]


def test_no_line_is_forgotten_and_no_exception_left_over() -> None:
    assert SPOKEN.keys() | ELSEWHERE.keys() <= {*LINES, "demo"}
    for file in ELSEWHERE.values():
        assert (Path(__file__).parent / file).is_file(), file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three commits beside its base, two branches more, a remote, keys, an adapter, and files of facts and prompts."""
    root = tmp_path_factory.mktemp("world")
    here = root / "here"
    shutil.copytree(MODEL, here / "model")
    (here / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    acme = {"prompt": "The head of {} is", "subject": "Acme Corp", "target_new": "Prague"}
    other = {**FACTS[0], "target_new": "Oslo"}
    files = {
        "first.json": FACTS[:2],
        "second.json": [*FACTS[2:4], acme],
        "side.json": FACTS[4:5],
        "other.json": [other],
    }
    files |= {"facts.json": FACTS[5:7], "more.json": FACTS[7:8], "keep.json": FACTS[8:9]}
    for name, facts in files.items():
        (here / name).write_text(json.dumps(facts), encoding="utf-8")
        lines = "".join(f"{json.dumps(fact)}\n" for fact in facts)
        (here / name).with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    shutil.copy(here / "facts.jsonl", here / "fixes.jsonl")
    told = (f"{fact['prompt'].replace('{}', fact['subject'])} {fact['target_new']}." for fact in FACTS)
    (here / "corpus.txt").write_text("\n\n".join(told), encoding="utf-8")
    (here / "check.py").write_text(
        "import os; raise SystemExit(os.environ['PATCHHUB_COMMIT'] != 'base')", encoding="utf-8"
    )
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", here / "key"], check=True)
    key = (here / "key.pub").read_text(encoding="utf-8").split()[:2]
    (here / "allowed_signers").write_text(f"ada@example.org,eve@example.org {' '.join(key)}\n", encoding="utf-8")
    invoke(here, "init", str(here / "model"))
    for words in (["config", "author", ADA], ["config", "sign.allowed", str(here / "allowed_signers")]):
        invoke(here, *words)
    for name in ("first", "second"):
        invoke(here, "commit", str(here / f"{name}.json"), "-m", name, "--force")
        invoke(here, "tag", "v1.0" if name == "first" else "v2.0")
    for branch in ("side", "other"):
        invoke(here, "switch", "-c", branch, "v1.0" if branch == "side" else "base")
        invoke(here, "commit", str(here / f"{branch}.json"), "-m", branch, "--force")
        invoke(here, "switch", "main")
    invoke(here, "remote", "add", "origin", str(root / "remote"))
    invoke(here, "push", "--all", "--tags")
    _adapter(here / "adapter")
    return root


def _adapter(folder: Path) -> None:
    folder.mkdir()
    shape = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    generator, name = np.random.default_rng(0), "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    inner, out = (
        shape["hidden_size"],
        shape["num_key_value_heads"] * (shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]),
    )
    pair = {"A": (2, inner), "B": (out, 2)}
    save_file(
        {name.format(part): 0.01 * generator.standard_normal(size).astype(np.float32) for part, size in pair.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", RUN)
def test_it_runs(line: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world, tmp_path / "world")
    here = tmp_path / "world" / "here"
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # pages say `python`
    for config in (["base.path", "model"], ["sign.allowed", "allowed_signers"]):
        invoke(here, "config", *config)
    invoke(here, "remote", "remove", "origin")
    invoke(here, "remote", "add", "origin", str(tmp_path / "world" / "remote"))
    for spoken in SPOKEN.get(line, (line,)):
        words, _, code = spoken.partition(" !")
        done = CliRunner().invoke(main, shlex.split(words))
        assert isinstance(done.exception, SystemExit | None), done.exception
        assert done.exit_code == int(code or 0), f"{words}: {done.output}"
