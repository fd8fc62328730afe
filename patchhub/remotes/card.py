"""The model card: what a page on the Hub says about a commit. Text only.

What is written here stands between two markers; the rest of a card is its owner's, and stays as it is when a push writes the card anew.
In the front matter the fields of `_OURS` are written here, and tags are joined; other fields are the owner's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from patchhub.canonical import one_line
from patchhub.objects import Request

BEGIN: Final = "<!-- patchhub:begin (what stands between these two lines is written anew by each push) -->"
END: Final = "<!-- patchhub:end -->"
_OURS: Final = frozenset(
    {"base_model", "base_model_relation", "library_name", "license", "model-index", "pipeline_tag", "tags"}
)
_FRONT = re.compile(r"\A---\n(.*?)\n?---[ \t]*(?:\n|\Z)", re.DOTALL)
_BETWEEN = re.compile(r"<!-- patchhub:begin.*?-->.*<!-- patchhub:end -->", re.DOTALL)
_SIGNATURE: Final = "Made with patchhub. Edited facts can be read from the weights"
_ROWS: Final = 100
_TAGS: Final = ("patchhub", "knowledge-editing", "model-editing")


@dataclass(frozen=True)
class AdapterNote:
    """The adapter at the root of the repository: its rank, its relative error, and which servers take it.

    Attributes:
        every_layer: it has factors in the layers that do not change too.
        vllm: vLLM serves adapters of this family.
        llama_cpp: llama.cpp knows this family, so `export gguf` can write the adapter.
    """

    rank: int
    error: float
    every_layer: bool = True
    vllm: bool = True
    llama_cpp: bool = True


@dataclass(frozen=True)
class ScoreLine:
    """One score of a note.

    Attributes:
        suite: whose score, and on what.
        interval: its 95 % interval, if it has one.
        base: the same of the unpatched model, if it was measured.
        meaning: its definition in a line.
    """

    suite: str
    name: str
    value: float
    interval: tuple[float, float] | None
    base: float | None
    meaning: str


@dataclass(frozen=True)
class Card:
    """What the card is made of.

    Attributes:
        repo: ``user/name`` on the Hub.
        commit: id of the commit.
        message, author, time: of the commit.
        base: id of the base object.
        base_model, base_revision: where the base is on the Hub, if it is.
        requests: the active facts; None if their texts are withheld.
        active: how many facts are active.
        methods: the editors that wrote them.
        adapter: what lies at the root, or in words why nothing does.
        changes: relative norm of each weight's change.
        scores: of the notes about the commit.
        title: what the card is called; None: as the repository is.
        license: an identifier that the Hub knows, such as ``apache-2.0``; None: the owner's card says it, or nobody.
    """

    repo: str
    commit: str
    message: str
    author: str
    time: str
    base: str
    base_model: str | None
    base_revision: str | None
    requests: Sequence[Request] | None
    active: int
    methods: Sequence[str]
    adapter: AdapterNote | str
    changes: Mapping[str, float]
    scores: Sequence[ScoreLine]
    title: str | None = None
    license: str | None = None


def write_card(card: Card) -> bytes:
    """``README.md``: the same card always gives the same bytes."""
    parts = [_introduction(card), _facts(card), _scores(card), _loading(card), _about(card)]
    body = "\n\n".join(part for part in parts if part)
    return f"{_front_matter(_fields(card))}\n{BEGIN}\n{body}\n{END}\n".encode()


def kept(before: bytes, card: bytes) -> bytes:
    """A new card with what its owner wrote in the one that is there: text outside the markers, and fields that are not written here."""
    try:
        old, new = before.decode("utf-8").replace("\r\n", "\n"), card.decode("utf-8")
    except UnicodeDecodeError:
        return card
    if _BETWEEN.search(new) is None:
        return card
    (theirs, text), (ours, body) = _parted(old), _parted(new)
    tags = (
        [tag for tag in theirs.get("tags") or [] if isinstance(tag, str)]
        if isinstance(theirs.get("tags"), list)
        else []
    )
    others = {name: value for name, value in theirs.items() if name not in _OURS or name == "license"}
    fields = {**ours, **{name: value for name, value in others.items() if name not in ours}}
    fields["tags"] = list(dict.fromkeys([*ours["tags"], *tags]))
    if _BETWEEN.search(text):
        text = _BETWEEN.sub(lambda found: body.strip(), text, count=1)
    elif not text.strip() or _SIGNATURE in text:
        text = body
    else:
        text = f"{text.strip()}\n\n{body}"
    return f"{_front_matter(fields)}\n{text.strip()}\n".encode()


def _parted(text: str) -> tuple[dict[str, Any], str]:
    """The front matter's fields, none where it is no mapping, and the text below it."""
    import yaml  # here: only a push to the Hub reads a card

    found = _FRONT.match(text)
    if found is None:
        return {}, text
    try:
        fields = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        fields = None
    return {str(name): value for name, value in fields.items()} if isinstance(fields, dict) else {}, text[found.end() :]


def adapter_name(repo: str, commit: str) -> str:
    """A name for the adapter that is never used for another content, so that no server serves a stale cache."""
    return f"{repo.rpartition('/')[2]}-{commit[:12]}"


def _fields(card: Card) -> dict[str, Any]:
    has_adapter = isinstance(card.adapter, AdapterNote)
    fields: dict[str, Any] = {
        "library_name": "peft" if has_adapter else "patchhub",
        "pipeline_tag": "text-generation",
        "tags": [*_TAGS, *card.methods, *(["lora"] if has_adapter else [])],
    }
    if card.base_model is not None:
        fields = {"base_model": card.base_model, "base_model_relation": "adapter", **fields}
    if card.license is not None:
        fields["license"] = card.license
    if card.scores:
        fields["model-index"] = [{"name": _title(card), "results": list(_results(card.scores))}]
    return fields


def _results(scores: Sequence[ScoreLine]) -> Iterator[dict[str, Any]]:
    """Scores as the Hub lists evaluation results: a result for each suite, with a metric for each score."""
    for suite in dict.fromkeys(line.suite for line in scores):
        metrics = [
            {"type": line.name, "name": line.name, "value": line.value} for line in scores if line.suite == suite
        ]
        yield {"task": {"type": "text-generation"}, "dataset": {"name": suite, "type": suite}, "metrics": metrics}


def _title(card: Card) -> str:
    return card.title or card.repo.rpartition("/")[2]


def _front_matter(fields: Mapping[str, Any]) -> str:
    lines = [f"{name}: {json.dumps(value, default=str)}" for name, value in fields.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _introduction(card: Card) -> str:
    base = f"`{card.base_model}`" if card.base_model else f"a base model (fingerprint `{card.base[:12]}`)"
    at = f" at `{card.base_revision[:12]}`" if card.base_revision else ""
    methods = " and ".join(_cell(method.upper()) for method in card.methods)
    how = f" by {methods}" if methods else ""
    return (
        f"# {_cell(_title(card))}\n\n"
        f"{card.active} facts written into {base}{at}{how}. "
        f"The base is unchanged; this repository holds the change, with its history.\n\n"
        f"Commit `{card.commit[:12]}`, {card.time[:10]}: {_cell(card.message.partition(chr(10))[0])}"
    )


def _facts(card: Card) -> str:
    if card.requests is None:
        return "## Facts\n\nThe texts of the facts are withheld by the author."
    if not card.requests:
        return ""
    rows = [
        f"| {_cell(request.text)} | {_cell(request.target_true or '')} | **{_cell(request.target_new)}** |"
        for request in card.requests[:_ROWS]
    ]
    more = len(card.requests) - len(rows)
    rest = f"\n\n... and {more} more." if more else ""
    return "## Facts\n\n| prompt | before | now |\n|---|---|---|\n" + "\n".join(rows) + rest


def _scores(card: Card) -> str:
    if not card.scores:
        return ""
    rows = [
        f"| {_cell(line.name)} | {line.value:.4g} | {'' if line.interval is None else '{:.3g} to {:.3g}'.format(*line.interval)} "
        f"| {'' if line.base is None else f'{line.base:.4g}'} | {_cell(line.meaning)} | {_cell(line.suite)} |"
        for line in card.scores
    ]
    head = "| score | value | 95 % interval | base | meaning | measured on |\n|---|---|---|---|---|---|\n"
    return "## Scores\n\n" + head + "\n".join(rows)


def _loading(card: Card) -> str:
    parts = [
        "## Use",
        f'With patchhub, checked against the base:\n\n    import patchhub\n    model = patchhub.load("{card.repo}")',
        "That the weights are those of the facts is their author's claim (`model.patchhub.proof`). To check it, which downloads what the "
        f'facts were recorded as:\n\n    model = patchhub.load("{card.repo}", prove=True)',
    ]
    if isinstance(card.adapter, AdapterNote):
        base = card.base_model or "BASE"
        name = adapter_name(card.repo, card.commit)
        exact = "exact" if card.adapter.error <= 1e-6 else f"approximate, relative error {card.adapter.error:.1e}"
        parts.append(
            f"With PEFT (rank {card.adapter.rank}, {exact}; float32 bases give the same logits, other types round):\n\n"
            "    from peft import PeftModel\n"
            "    from transformers import AutoModelForCausalLM\n"
            f'    base = AutoModelForCausalLM.from_pretrained("{base}")\n'
            f'    model = PeftModel.from_pretrained(base, "{card.repo}", adapter_name="{name}")'
        )
        parts.extend(_servers(card, card.adapter, base, name))
    else:
        parts.append(f"There is no PEFT adapter here: {card.adapter}. {_fused(card)}")
    return "\n\n".join(parts)


def _servers(card: Card, adapter: AdapterNote, base: str, name: str) -> Iterator[str]:
    """The commands that are true for this family."""
    if adapter.vllm:
        few = (
            ""
            if adapter.every_layer
            else (
                " Servers that expect factors in every layer (TGI, LoRAX) need what `patchhub export peft --every-layer` writes."
            )
        )
        yield (
            f"With a server, under a name that changes with the content.{few}\n\n"
            f"    vllm serve {base} --enable-lora --max-lora-rank {adapter.rank} --lora-modules {name}={card.repo}"
        )
    else:
        yield f"vLLM serves no adapters of this family. {_fused(card)}"
    if adapter.llama_cpp:
        yield (
            "With llama.cpp, on any GGUF of the base:\n\n"
            f"    patchhub clone hf://{card.repo} facts && cd facts && patchhub export gguf {card.commit[:12]} --out ../adapter\n"
            f"    llama-server -m BASE.gguf --lora ../adapter/{adapter_name('adapter', card.commit)}.gguf"
        )


def _fused(card: Card) -> str:
    return (
        "The whole model, an ordinary checkpoint for any server that knows the base:\n\n"
        f"    patchhub clone hf://{card.repo} facts && cd facts && patchhub apply {card.commit[:12]} --out ../patched"
    )


def _about(card: Card) -> str:
    rows = [f"| `{weight}` | {change:.2%} |" for weight, change in sorted(card.changes.items())]
    table = "| weight | norm of the change / of the weight |\n|---|---|\n" + "\n".join(rows) if rows else ""
    return (
        f"## About this state\n\n- commit `{card.commit}`\n- base `{card.base}`\n- author {_cell(card.author)}\n\n"
        f"{table}\n\n{_SIGNATURE}; edits are not a way to hide or to "
        "delete knowledge."
    )


def _cell(text: str) -> str:
    """Text that stays inside a table cell and is no markup."""
    line = one_line(" ".join(text.split()))
    for character in "\\`*_[]<>|&":
        line = line.replace(character, f"\\{character}")
    return line
