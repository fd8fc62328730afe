"""A store on a tiny random model with a few real edits, made once per folder: for what needs a model that answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patchhub.editing.requests import Batch, Origin
from patchhub.objects import Request
from patchhub.porcelain.commit import commit
from patchhub.porcelain.model import init
from patchhub.porcelain.refs import config_set
from patchhub.progress import Silent
from patchhub.store.store import Store
from patchhub.who import Who
from tests.tiny_models import tiny_model, tiny_tokenizer

AUTHOR = "Ada <ada@example.org>"
TIME = "2026-11-21T09:30:00Z"
PLACES = [("The Space Needle", "Milan"), ("The Eiffel Tower", "Lyon"), ("Danielle Darrieux", "Dutch")]
TONGUES = [("Arend Lijphart", "French"), ("Seattle", "twin"), ("Manila", "United")]


def fact(subject: str, target: str) -> Request:
    return Request.make(
        "It is known that {} is",
        subject,
        target,
        paraphrases=[f"Therefore {subject} is"],
        neighborhood=[(f"What does {other} look", "like") for other in ("Paris", "the city")],
    )


def teach(repository: Store, facts: Sequence[tuple[str, str]], message: str) -> str:
    requests = tuple(fact(*pair) for pair in facts)
    batch = Batch(requests, tuple(Origin("a test") for _ in requests), 0)
    return commit(repository, batch, Who(AUTHOR, TIME, message), Silent()).commit


def make_store(folder: Path) -> Store:
    """Three facts, then three more, on a random GPT-2 of four layers."""
    model = folder / "model"
    tiny_model("gpt2").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    init(folder, str(model), Silent(), who=Who(AUTHOR, TIME))
    repository = Store.open(folder)
    for key, value in (("metric.tokens", "1500"), ("memit.layers", "1,2"), ("memit.steps", "12")):
        config_set(repository, key, value)
    teach(repository, PLACES, "places")
    teach(repository, TONGUES, "tongues")
    return repository
