"""Every kind of entry in the cache: damaged or lost in any way, it is found, said, and made again, with the same result bit for bit."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import pkgutil
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import patchhub
from patchhub.cache import Cache, Kind
from patchhub.editing.metric import SPILLED, streamed_moments
from patchhub.editing.requests import Batch, Origin
from patchhub.errors import RepositoryError
from patchhub.models.architectures import describe, read_config
from patchhub.models.fingerprint import fingerprint
from patchhub.objects import Metric
from patchhub.porcelain.commit import commit
from patchhub.porcelain.measure import Evaluator, Facts
from patchhub.porcelain.refs import collect, undo
from patchhub.progress import Silent
from patchhub.sets import guard
from patchhub.sets import sums as kept_sums
from patchhub.store.fsck import check
from patchhub.store.store import Store
from patchhub.text.sampling import sample_documents
from patchhub.who import Who
from patchhub.worktree.metric import held_documents, kept_text, open_recorder
from patchhub.worktree.opening import Worktree, open_base, open_worktree
from patchhub.worktree.shards import open_wise_text
from tests.porcelain.taught import AUTHOR, PLACES, TIME, fact, make_store

pytestmark = pytest.mark.usefixtures("short_texts")

FACTS = Facts(tuple(fact(*pair) for pair in PLACES[:2]), contexts=("So. {}",))
NEW = tuple(fact(*pair) for pair in [("Paris", "Lyon"), ("Rome is where the city", "Milan")])


def kinds() -> dict[str, Kind]:
    """All that the package defines, so that a new one cannot be forgotten."""
    names = [module.name for module in pkgutil.walk_packages(patchhub.__path__, "patchhub.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Kind)]
    return {kind.name: kind for kind in found}


def opened(repository: Store) -> Worktree:
    return open_worktree(repository, Silent(), edits=())


def weights(repository: Store) -> Any:
    digest = hashlib.sha256()
    for _, tensor in sorted(patchhub.load(repository.root.parent).state_dict().items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def values(repository: Store) -> Any:
    """The stored bytes of a commit, which is undone again."""
    batch = Batch(NEW, tuple(Origin("a test") for _ in NEW), 0)
    done = commit(repository, batch, Who(AUTHOR, TIME, "new"), Silent(), force=True)
    tensors = sorted({repository.patch(element[0]).tensors for element in repository.commit(done.commit).added})
    repository.undo(author=AUTHOR, time=TIME)
    return tensors


def metric(repository: Store) -> Any:
    base = opened(repository)
    recorder = open_recorder(repository, base.stack, base.tokenizer, [1, 2], (), Silent())
    keys = torch.linspace(-1, 1, 3 * base.architecture.shapes[1][1]).reshape(3, -1)
    names = [base.architecture.ffn_weight(layer) for layer in (1, 2)]
    return [recorder.cache.preimages(name, keys).numpy().tobytes() for name in names]


def held(repository: Store) -> Any:
    base = opened(repository)
    return held_documents(repository, None, base.stack, base.tokenizer)


def text(repository: Store) -> Any:
    base = opened(repository)
    return sample_documents(base.stack, base.tokenizer, 640, length=64, seed=5, kept=kept_text(repository))


def scores(repository: Store) -> Any:
    return Evaluator(repository, FACTS, Silent()).evaluate("HEAD").scores


def digests(repository: Store) -> Any:
    return fingerprint(open_base(repository), cache=repository.cache).id


def wise(repository: Store) -> Any:
    return open_wise_text(repository, opened(repository), 0, Silent())


def spectrum(repository: Store) -> Any:
    names = [describe(read_config(open_base(repository).folder)).ffn_weight(layer) for layer in (1, 2)]
    return guard.largest_singular_values(repository, names)


def norms(repository: Store) -> Any:
    """Of weights that no fact is written into."""
    return guard.base_norms(repository, [f"transformer.h.{layer}.attn.c_proj.weight" for layer in (1, 2)])


def sums(repository: Store) -> Any:
    """Of the set of a commit, whatever it costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_sums, "WORTH", 0)
        found = kept_sums.sums_at(repository, str(repository.resolve("HEAD")))
    return {weight: (part.X.tobytes(), part.Y.tobytes()) for weight, part in found.items()}


def base_text(repository: Store) -> Any:
    """What the base says on held text, which the guard reads when facts are committed."""
    who = Who(AUTHOR, TIME, "new")
    made = commit(repository, Batch(NEW, tuple(Origin("a test") for _ in NEW), 0), who, Silent(), force=True)
    found = repository.commit(made.commit).check["guard"]["drift"]
    undo(repository, who=who)
    return found


def states(repository: Store) -> Any:
    """Second moments block by block, of which the caller takes the last layer's and asks for no more, as if it were interrupted there."""
    stack, documents = opened(repository).stack, [[5, 6, 7], [8, 9]]
    passing = streamed_moments(stack, [2], documents, lambda block: repository.cache.slot(SPILLED, block=block))
    return next(passing)[1].numpy().tobytes()


MAKERS: Mapping[str, Callable[[Store], Any]] = {
    made.__name__: made
    for made in (weights, values, metric, held, text, scores, digests, wise, spectrum, norms, sums, base_text, states)
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store whose cache has entries of every kind, and what each maker made."""
    folder = tmp_path_factory.mktemp("store")
    with make_store(folder) as repository:
        for file in (folder / "model").iterdir():
            os.utime(file, (1_000_000_000, 1_000_000_000))
        return folder, {name: make(repository) for name, make in MAKERS.items()}


@pytest.fixture
def repository(original: tuple[Path, dict[str, Any]], tmp_path: Path) -> Iterator[Store]:
    """A copy that the test may change; the base is the original's."""
    shutil.copytree(original[0] / ".patchhub", tmp_path / ".patchhub")
    with Store.open(tmp_path) as found:
        yield found


def files_of(cache: Cache, kind: str) -> list[Path]:
    return [path for path in cache.files() if path.relative_to(cache.folder).parts[0] == kind]


def flipped(data: bytes, seed: int) -> bytes:
    place = random.Random(seed).randrange(8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


DAMAGES: Mapping[str, Callable[[bytes], bytes]] = {
    "a bit in the first bytes": lambda data: bytes([data[0] ^ 4]) + data[1:],
    "a bit anywhere": lambda data: flipped(data, 1),
    "a bit anywhere else": lambda data: flipped(data, 2),
    "a bit in the last byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "foreign": lambda data: b"[1, 2]",
}


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    status = path.stat()
    path.write_bytes(how(path.read_bytes()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_every_kind_has_a_maker_here() -> None:
    assert kinds().keys() == MAKERS.keys()


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_kept_is_used(kind: str, original: tuple[Path, dict[str, Any]], repository: Store) -> None:
    def files() -> list[tuple[Path, int]]:
        return [(path, path.stat().st_ino) for path in files_of(repository.cache, kind)]

    before = files()
    assert before
    assert MAKERS[kind](repository) == original[1][kind]
    assert files() == before, "none was written again"


COSTLY = ("values", "scores", "base_text", "text")  # to make again; two kinds of damage show that damage is found there
LONG = (pytest.mark.slow, pytest.mark.long)
CASES = [
    pytest.param(kind, how, marks=LONG if kind in COSTLY and how not in ("a bit anywhere", "empty") else ())
    for kind in MAKERS
    for how in DAMAGES
]


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_damage_is_found_and_what_was_lost_is_made_again(
    kind: str, how: str, original: tuple[Path, dict[str, Any]], repository: Store, caplog: pytest.LogCaptureFixture
) -> None:
    before = files_of(repository.cache, kind)
    for path in before:
        damage(path, DAMAGES[how])
    assert MAKERS[kind](repository) == original[1][kind]
    used = [path for path in before if not path.exists() or repository.cache.damage(path) is None]
    assert len([record for record in caplog.records if "made again" in record.message]) >= len(used) > 0
    assert MAKERS[kind](repository) == original[1][kind]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_cache_that_cannot_be_written_costs_time_only(
    kind: str, original: tuple[Path, dict[str, Any]], repository: Store
) -> None:
    """But for what has to be read from a file: that is refused in words."""
    shutil.rmtree(repository.cache.folder)
    repository.cache.folder.write_bytes(b"in the way")
    if kind in ("metric", "values", "base_text", "states"):
        with pytest.raises(RepositoryError, match="cannot write"):
            MAKERS[kind](repository)
    else:
        assert MAKERS[kind](repository) == original[1][kind]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_check_finds_damage_that_costs_time_only_and_takes_it_away(kind: str, repository: Store) -> None:
    damaged = files_of(repository.cache, kind)
    for path in damaged:
        damage(path, DAMAGES["a bit anywhere"])
    report = check(repository)
    assert report.sound
    assert {finding.facts["path"] for finding in report.findings} == set(map(str, damaged))
    assert check(repository).findings == ()


def test_collecting_knows_all_kinds_in_one_way(repository: Store) -> None:
    """What is of an object stays while that is needed, everything else while it is used."""
    needed = {repository.config.base_id, repository.config.recording.metric if repository.config.recording else None}
    needed.add(repository.resolve("HEAD"))
    everything = list(repository.cache.files())
    for path in everything:
        os.utime(path, (0, 0))
    gone = {item.path for item in collect(repository, now=TIME).items}
    assert gone == {path for path in everything if repository.cache.owner(path) not in needed}
    assert {path.relative_to(repository.cache.folder).parts[0] for path in gone} == {
        "text",
        "weights",
        "values",
        "scores",
        "digests",
        "states",
    }


def test_a_damaged_factor_that_cannot_be_made_again_is_refused(
    repository: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The metric's text is gone too, as of an imported metric: nothing is written with the factor."""
    assert repository.config.recording is not None
    text = Metric.from_json(repository.objects.get(repository.config.recording.metric)).text
    repository.objects.path(str(text)).unlink()
    for path in files_of(repository.cache, "metric"):
        damage(path, DAMAGES["a bit anywhere"])
    head = repository.resolve("HEAD")
    with caplog.at_level(logging.WARNING), pytest.raises(RepositoryError):
        values(repository)
    assert repository.resolve("HEAD") == head
