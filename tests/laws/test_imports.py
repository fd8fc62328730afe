"""What is imported, and when: the package costs nothing, cheap checks come before torch, and the public names are what `dir` shows."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import patchhub
from tests.pins.history import commit_facts, init

PACKAGE = Path(str(patchhub.__file__)).parent
HEAVY = "sorted({'torch', 'numpy', 'transformers', 'tqdm', 'pandas'} & sys.modules.keys())"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one commit, whose base is not there."""
    made = tmp_path_factory.mktemp("store")
    init(made)
    commit_facts(made, "three facts", {"Ann": "French", "Bob": "German", "Cleo": "Dutch"})
    return made


def test_the_package_imports_in_less_than_30_ms_over_click() -> None:
    code = "import click, time; t = time.perf_counter(); import patchhub; print(time.perf_counter() - t)"
    assert min(float(python(code).stdout) for _ in range(7)) < 0.030


def test_dir_shows_the_public_names_and_each_is_there() -> None:
    assert dir(patchhub) == sorted(patchhub.__all__)
    for name in dir(patchhub):
        assert getattr(patchhub, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = patchhub.lode


@pytest.mark.parametrize(
    "looked",
    [
        "repo.log()",
        "repo.status()",
        "repo.diff()",
        "repo.show()",
        "repo['HEAD']",
        "repo.branch()",
        "repo.search('Ann')",
        "repo.log(signatures=True)",
        "repo.verify()",
        "repo.audit()",
    ],
)
def test_looking_imports_no_torch_and_no_numpy(looked: str, folder: Path) -> None:
    code = f"import sys, patchhub; repo = patchhub.Repository(sys.argv[1]); len(repr({looked})); print({HEAVY})"
    done = python(code, str(folder))
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        (["commit", "nope.jsonl", "-m", "why"], 3, "nope.jsonl: cannot be read"),
        (["commit", "-m", "why"], 3, "there are no facts"),
        (
            ["commit", "-m", "why", "--prompt", "{} is", "--subject", "Ann", "--target", "x", "--set", "steps"],
            2,
            "KEY=VALUE",
        ),
        (["ask", "Ann speaks", "--rev", "nope"], 5, "nope"),
        (["apply", "nope", "--out", "x"], 5, "nope"),
        (["eval", "nope", "--suite", "nope.json"], 5, "nope"),
        (["eval", "--suite", "nope.json"], 3, "nope.json: cannot be read"),
        (["bench", "mimit", "--suite", "nope.json"], 2, "there is no editor 'mimit'"),
        (["tune", "nope.json"], 3, "nope.json: cannot be read"),
        (["blame", "Ann speaks", "--rev", "nope"], 5, "nope"),
        (["bisect", "nope", "HEAD", "--metric", "efficacy"], 5, "nope"),
        (["export", "peft", "nope", "--out", "x"], 5, "nope"),
        (["diff", "nope", "--weights"], 5, "nope"),
        (["commit", "FACTS", "-m", "why", "--text", "nope.txt"], 3, "the text nope.txt cannot be read"),
        (["apply", "HEAD", "--out", "x", "--base", "/nowhere"], 8, "there is no model folder /nowhere"),
        (["eval", "--suite", "FACTS", "--judge", "ftp://judge"], 2, "is no address of a server"),
        (["eval", "--suite", "FACTS", "--metrics", "nope"], 2, "'nope' is not one of"),
        (["tune", "FACTS", "--text", "nope.txt"], 3, "the text nope.txt cannot be read"),
        (["bisect", "base", "HEAD", "--metric", "nope"], 2, "nope"),
        (["bisect", "base", "HEAD", "--metric", "locality"], 2, "locality has no bound"),
        (["metric", "compute", "--text", "nope.txt"], 3, "the text nope.txt cannot be read"),
        (["commit", "KNOWN", "-m", "why"], 3, "active already"),
        (["commit", "AGAINST", "-m", "why"], 4, "1 contradiction"),
        (["commit", "FACTS", "-m", "why", "--device", "gpu"], 2, "device cannot be 'gpu'"),
        (["eval", "--suite", "FACTS", "--device", "gpu"], 2, "device cannot be 'gpu'"),
        (["commit", "FACTS", "-m", "why", "--device", "cuda:77"], 2, "there is no device 'cuda:77'"),
        (["ask", "Ann speaks", "--device", "cuda:77"], 2, "there is no device 'cuda:77'"),
        (["update", "--subject", "Nobody", "--target", "x"], 3, "no active fact is about 'Nobody'"),
        (["eval"], 2, "eval needs facts"),
        (["blame", ""], 3, "the prompt is empty"),
        (["bisect", "base", "HEAD"], 2, "a command or a metric"),
        (["refresh"], 5, "nothing of HEAD is due"),
    ],
)
def test_cheap_checks_come_before_torch(typed: list[str], code: int, words: str, folder: Path, tmp_path: Path) -> None:
    if "cuda:77" in typed and not version("torch").endswith("+cpu") and Path("/dev/nvidiactl").exists():
        pytest.skip("which GPUs there are torch alone knows")
    ran = (
        "import sys\nfrom patchhub.cli.main import main\n"
        "try:\n    main(['--repo', *sys.argv[1:]])\nexcept SystemExit as end:\n"
        f"    print(end.code, {HEAVY})"
    )
    full = tmp_path / "full"
    full.mkdir()
    (full / "facts.json").write_text('{"prompt": "{} speaks", "subject": "Dora", "target_new": "Danish"}')
    known = '{"prompt": "The mother tongue of {} is", "subject": "Ann", "target_new": "French"}'
    (full / "known.json").write_text(known)
    (full / "against.json").write_text(known.replace("French", "Welsh"))
    places = {word: str(full / f"{word.lower()}.json") for word in ("FACTS", "KNOWN", "AGAINST")}
    done = python(ran, str(folder), *(places.get(word, word) for word in typed))
    assert done.stdout.strip() == f"{code} []", done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        (["apply", "HEAD", "--out", "FULL"], 2, "is not empty"),
        (["apply", "HEAD", "--out", "FULL/facts.json"], 2, "is a file"),
        (["export", "checkpoint", "HEAD", "--out", "FULL"], 2, "is not empty"),
        (["export", "diff", "HEAD", "--out", "FULL/facts.json"], 2, "is there already"),
        (["import", "FULL"], 3, "holds neither an adapter"),
        (["ask", "Ann speaks", "--base", "FULL"], 8, "it is no transformers model folder"),
        (["metric", "import", "nope.npz"], 2, "there is no nope.npz"),
        (["verify-served", "nonsense://x"], 2, "is no address of a server"),
    ],
)
def test_these_need_numpy_but_not_torch(typed: list[str], code: int, words: str, folder: Path, tmp_path: Path) -> None:
    ran = (
        "import sys\nfrom patchhub.cli.main import main\n"
        "try:\n    main(['--repo', *sys.argv[1:]])\nexcept SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)"
    )
    (tmp_path / "facts.json").write_text("[]")
    places = {"FULL": str(tmp_path), "FULL/facts.json": str(tmp_path / "facts.json")}
    done = python(ran, str(folder), *(places.get(word, word) for word in typed))
    assert done.stdout.strip() == f"{code} False", done.stderr
    assert words in done.stderr


OPENERS = {
    "models/architectures.py",
    "models/placement.py",
    "runtime/patched_model.py",
    "text/tokens.py",
    "worktree/loading.py",
}
"""Where transformers is asked for a config, a model or a tokenizer; everything else goes through `worktree.opening`."""


def test_models_are_opened_in_few_places() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found <= OPENERS, found - OPENERS


def test_only_the_front_floors_know_the_environment_and_the_terminal() -> None:
    words = ("os.environ.get", "os.environ[", "os.getenv", "sys.stdin", "sys.stdout")
    for path in PACKAGE.rglob("*.py"):
        floor = path.relative_to(PACKAGE).parts[0]
        if floor not in ("cli", "repository"):
            code = ast.unparse(_without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
            assert not [word for word in words if word in code], path


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return tree
