"""Tiny models in folders, and stores about them with random columns: what exports and imports are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from patchhub.porcelain.model import init
from patchhub.progress import Silent
from patchhub.store.store import Store
from patchhub.who import Who
from tests.remotes.stores import AUTHOR, TIME, add_batch
from tests.tiny_models import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 17, 200, 31, 9, 120, 44]])


def model_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A random model of a family, with its tokenizer."""
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def model_store(folder: Path, base: Path, *batches: range) -> Store:
    """A store about the model in ``base`` with one commit per batch of random columns."""
    init(folder, str(base), Silent(), who=Who(AUTHOR, TIME))
    repository = Store.open(folder)
    for numbers in batches:
        add_batch(repository, numbers)
    return repository


def load_base(folder: Path) -> Any:
    factory: Any = AutoModelForCausalLM
    return factory.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """|| one - other || / || other ||."""
    return float((one - other).norm() / other.norm())
