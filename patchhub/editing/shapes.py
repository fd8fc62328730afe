"""The shapes in which people publish facts, each turned into a `Request`.

Recognised: our own, CounterFact (Meng et al. 2022) with what builds on it (MQuAKE, AKEW), EasyEdit's flat form with KnowEdit's sets,
zsRE as MEND publishes it, RippleEdits, UnKE, HalluEditBench, and the columns of known_1000 and counterfact-tracing. What differs
between shapes is a row of `_SHAPES`: its name, the fields that give it away and the function that reads it. What a record says besides is
kept as the metadata of its requests: of our own shape every field that is not nearly the name of a known one (that is refused, as most
likely a typing error), of a foreign shape the texts, numbers and truth values that the published files do not have."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any, NamedTuple

from patchhub.canonical import DEEPEST, canonical_json, nfc
from patchhub.errors import RequestError
from patchhub.objects import METADATA_BYTES, SLOT, Request

Record = Mapping[str, Any]

REQUIRED_FIELDS = frozenset({"prompt", "subject", "target_new"})
OPTIONAL_FIELDS = frozenset({"target_true", "paraphrases", "neighborhood"})
ZSRE_FIELDS = frozenset({"src", "alt"})
_TELLING = REQUIRED_FIELDS | OPTIONAL_FIELDS
_METADATA = "metadata"
_OWN_FIELDS = _TELLING | {"answer"}  # which other shapes may have as well
_EASYEDIT_FIELDS = frozenset(
    {
        "ground_truth",
        "rephrase_prompt",
        "rephrase",
        "ood_rephrase",
        "locality_prompt",
        "locality_ground_truth",
        "locality",
    }
)
_OWN_SHAPE = "{prompt, subject, target_new[, target_true, paraphrases, neighborhood, answer]}"
_NO_TRUTH = "<|endoftext|>"  # what ROME's form of zsRE has where nothing is known to have been true
_TYPING_ERROR = 0.7  # how like a known field's name an unknown one must be


class Reading(NamedTuple):
    """A request of a record.

    Attributes:
        request: the fact.
        unanswered: how many neighbourhood prompts were left out because the record gives no answer to them.
        ignored: fields that no metadata can hold: they are too long, or are nothing that JSON has.
        opening: what the record's answer says before the target, where it gives one.
    """

    request: Request
    unanswered: int
    ignored: frozenset[str] = frozenset()
    opening: str | None = None

    def beside(self, metadata: Mapping[str, Any], ignored: frozenset[str]) -> Reading:
        """The same, with what the record says besides."""
        return self._replace(request=replace(self.request, metadata=metadata), ignored=ignored)


def request_from_record(record: object) -> Request:
    """Turn one decoded record of any known shape that holds one fact into a request; raises as `read_record`."""
    return read_record(record)[0].request


def read_record(record: object) -> list[Reading]:
    """Turn one decoded record of any known shape into its requests: one, or as many as MQuAKE has in one record.

    A neighbourhood prompt only says what to evaluate. Where a published file gives no answer to it (KnowEdit has empty lists), it is left
    out; in our own shape that is refused, since whoever wrote it can say the answer.

    Raises:
        RequestError: without file and line, which the caller knows.
    """
    if not isinstance(record, dict):
        raise RequestError(
            f"the record is {json_kind(record)}, not an object with fields", remedy=f"write {_OWN_SHAPE}"
        )
    shape = next((shape for shape in _SHAPES if shape.fits(record)), None)
    if shape is None:
        fields = ", ".join(f"'{key}'" for key in list(record)[:8]) or "none"
        raise RequestError(f"unknown record shape (fields: {fields})", remedy=_nearest(record))
    ours = (OPTIONAL_FIELDS - {"target_true"} if shape.has_true else OPTIONAL_FIELDS) & record.keys()
    if shape.convert is not _from_own and ours:
        foreign = min(shape.telling & record.keys())
        remedy = f"write {_OWN_SHAPE}, or {shape.name} {{{', '.join(shape.fields)}}} alone"
        raise RequestError(f"the record mixes shapes: '{min(ours)}' beside '{foreign}'", remedy=remedy, field=min(ours))
    found = shape.convert(record)
    kept, ignored = _metadata(shape, record)
    return [reading.beside(kept, ignored) for reading in (found if isinstance(found, list) else [found])]


def is_record(content: Record) -> bool:
    """Whether an object is one record of a known shape."""
    return any(shape.fits(content) for shape in _SHAPES)


def _nearest(record: Record) -> str:
    """The shape that has most of a record's fields, and what it lacks of it; our own where none is like it."""
    alike = {shape: len(set(shape.fields) & record.keys()) for shape in _SHAPES}
    shape = max(_SHAPES, key=lambda shape: (alike[shape], shape.convert is _from_own))
    known = f"{shape.name} {{{', '.join(shape.fields)}}}"
    if not alike[shape]:
        return f"write {_OWN_SHAPE}; docs/data.md lists the shapes of published files"
    lacking = ", ".join(f"'{name}'" for name in shape.fields if name not in record)
    return f"the nearest shape is {known}, of which {lacking} is not there; docs/data.md lists all"


def json_kind(value: object) -> str:
    """What JSON calls `value`, with its article."""
    kinds = {bool: "a boolean", str: "a text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    kinds |= {date: "a date", datetime: "a date"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


# --- metadata


def _metadata(shape: Shape, record: Record) -> tuple[dict[str, Any], frozenset[str]]:
    """What a record says besides what is read of it, as metadata, and the names of fields that metadata cannot hold.

    A field `metadata` of our own shape is metadata already. Fields are taken in their order, as long as there is room.
    """
    own = shape.convert is _from_own
    read = _OWN_FIELDS if own else shape.telling | shape.needed | shape.besides | {*shape.fields}
    besides = {nfc(str(name)): value for name, value in record.items() if name not in read}
    if not own:
        besides = {name: value for name, value in besides.items() if isinstance(value, str | int | float | date)}
    elif isinstance(inner := besides.get(_METADATA), dict):
        del besides[_METADATA]
        besides = {**{nfc(str(name)): value for name, value in inner.items()}, **besides}
    kept: dict[str, Any] = {}
    # A table's column without a name numbers its rows, and nothing is said by null.
    besides = {name: value for name, value in besides.items() if name.strip() and value is not None}
    for name, value in besides.items():
        try:
            more = {**kept, name: _plain(value)}
            kept = more if len(canonical_json(more)) <= METADATA_BYTES else kept
        except (TypeError, ValueError):  # half a surrogate pair, a number that JSON does not have, another type
            continue
    return kept, frozenset(besides.keys() - kept.keys())


def _plain(value: Any, level: int = 1) -> Any:  # noqa: PLR0911  # one way out for each type
    """A value as canonical JSON has it: text in NFC, dates as ISO 8601 writes them.

    Raises:
        TypeError, ValueError: it has no such form.
    """
    if isinstance(value, str):
        return nfc(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, date):  # and times: YAML, Parquet and tables have them
        return value.isoformat()
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple) and level < DEEPEST:
        return [_plain(entry, level + 1) for entry in value]
    if isinstance(value, Mapping) and level < DEEPEST and all(isinstance(name, str) for name in value):
        return {nfc(name): _plain(entry, level + 1) for name, entry in value.items()}
    raise TypeError(type(value).__name__)


# --- shapes


def _from_own(record: Record) -> Reading:
    for name in (str(name) for name in record if name not in _OWN_FIELDS | {_METADATA}):
        meant = sorted(OPTIONAL_FIELDS | _OWN_FIELDS - record.keys())
        close = difflib.get_close_matches(name, meant, n=1, cutoff=_TYPING_ERROR)
        if close:
            raise RequestError(f"unknown field '{name}'", remedy=f"did you mean '{close[0]}'?", field=name)
    lacking = [f"'{name}'" for name in ("prompt", "subject", "target_new") if record.get(name) is None]
    if len(lacking) > 1:
        raise RequestError(
            f"{' and '.join(lacking)} are missing", remedy=f"write {_OWN_SHAPE}", field=lacking[0].strip("'")
        )
    subject, target_new = _text(record, "subject"), _text(record, "target_new")
    target_true = _optional_text(record, "target_true")
    if target_new == target_true:
        raise RequestError(
            f"target_new and target_true are both '{target_new}'",
            remedy="leave target_true out, or say what the answer was before",
            field="target_true",
        )
    neighborhood = record.get("neighborhood")
    entries = neighborhood if isinstance(neighborhood, list) else [] if neighborhood is None else [neighborhood]
    answer = _optional_text(record, "answer")
    opening = None if answer is None else _opening(answer, target_new)
    reading = _request(
        _text(record, "prompt"),
        subject,
        target_new,
        target_true=target_true,
        paraphrases=[text.replace(SLOT, subject) for text in _texts(record, "paraphrases")],
        neighborhood=[_own_neighbor(entry, target_true) for entry in entries],
    )
    return reading._replace(opening=opening)


def _opening(answer: str, target: str) -> str:
    """What an answer in a chat says before the target, which stands in it, once, or has ``{}`` in its place."""
    sought = SLOT if SLOT in answer else target
    if answer.count(sought) != 1:
        raise RequestError(
            f"the answer '{answer}' does not have the target '{target}' once",
            remedy=f"write the sentence with the target in it, or with {SLOT} in its place",
            field="answer",
        )
    return answer.partition(sought)[0].rstrip(" ")


def _own_neighbor(entry: object, target_true: str | None) -> tuple[str, str]:
    """A prompt and the answer to keep there; without an answer of its own, `target_true` as in CounterFact."""
    fields = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, dict) or fields.keys() - {"prompt", "target"}:
        raise RequestError(
            "a neighborhood entry is neither a text nor {prompt, target}",
            remedy='write "The capital of Spain is" or {"prompt": ..., "target": ...}',
            field="neighborhood",
        )
    prompt = _text(fields, "prompt", "neighborhood.")
    if SLOT in prompt:
        raise RequestError(
            f"the neighborhood prompt '{prompt}' contains {SLOT}",
            remedy="write its subject out: a neighborhood prompt is about another subject",
            field="neighborhood",
        )
    return prompt, _optional_text(fields, "target", "neighborhood.") or _given(target_true, prompt)


def _from_mquake(record: Record) -> list[Reading]:
    """`requested_rewrite` is a list of facts; a question in a fact asks it in other words. The questions of several hops are left out."""
    rewrites = record["requested_rewrite"]
    if not rewrites:
        raise RequestError("'requested_rewrite' is empty", remedy="give a fact in it, or leave the record out")
    readings = []
    for number, rewrite in enumerate(rewrites, start=1):
        if not isinstance(rewrite, dict):
            raise _wrong_type(f"requested_rewrite {number}", "an object", rewrite)
        question = _texts(rewrite, "question")
        readings.append(_from_counterfact({"requested_rewrite": rewrite, "paraphrase_prompts": question}))
    return readings


def _from_counterfact(record: Record) -> Reading:
    """Every neighbourhood prompt's right answer is the request's `target_true`, unless it has its own, as in ROME's form of zsRE.

    Of AKEW's records the short target is what is written.
    """
    rewrite = _object(record, "requested_rewrite")
    new = _text(_object(rewrite, "target_new"), "str", "target_new.")
    true = _optional_text(_object(rewrite, "target_true"), "str", "target_true.")
    true = None if true == _NO_TRUTH else true
    beside = record.get("neighborhood_prompts")
    answered = isinstance(beside, list) and bool(beside) and all(isinstance(entry, dict) for entry in beside)
    return _request(
        _text(rewrite, "prompt"),
        _text(rewrite, "subject"),
        new,
        target_true=true,
        paraphrases=_texts(record, "paraphrase_prompts"),
        neighborhood=[_own_neighbor(entry, true) for entry in beside or ()]
        if answered
        else [(prompt, true) for prompt in _texts(record, "neighborhood_prompts")],
    )


def _from_zsre(record: Record) -> Reading:
    """`alt` is what to write, as in MEND and EasyEdit; the first answer that differs from it is what was true."""
    new = _text(record, "alt")
    return _request(
        _text(record, "src"),
        _text(record, "subject"),
        new,
        target_true=next((answer for answer in _texts(record, "answers") if answer != new), None),
        paraphrases=_texts(record, "rephrase"),
        neighborhood=_parallel_neighbors(record, "loc", "loc_ans"),
    )


def _from_easyedit(record: Record) -> Reading:
    """A list under `ground_truth` holds names for one answer, of which the first is taken. WISE's sets Temporal (whose other phrasing,
    `ood_rephrase`, is written by people: out of distribution) and SelfCheckGPT have this form too."""
    neighbors = _parallel_neighbors(record, "locality_prompt", "locality_ground_truth")
    for name, group in _object(record, "locality").items():
        for entry in group if isinstance(group, list) else [group]:
            if not isinstance(entry, dict):
                raise _wrong_type(f"locality.{name}", "an object with prompt and ground_truth", entry)
            neighbors += _parallel_neighbors(entry, "prompt", "ground_truth")
    return _request(
        _text(record, "prompt"),
        _text(record, "subject"),
        _text(record, "target_new"),
        target_true=next(iter(_texts(record, "ground_truth")), None),
        paraphrases=_texts(record, "rephrase_prompt") + _texts(record, "rephrase") + _texts(record, "ood_rephrase"),
        neighborhood=neighbors,
    )


def _from_wikibio(record: Record) -> Reading:
    """KnowEdit's WikiBio: `text` is a biography so far, `labels` the sentence that shall follow, `concept` whose it is."""
    neighbors = []
    for group in _object(record, "locality").values():
        for entry in group if isinstance(group, list) else [group]:
            neighbors += _parallel_neighbors(entry, "prompt", "ground_truth") if isinstance(entry, dict) else []
    return _request(
        _text(record, "text"),
        _text(record, "concept"),
        _texts(record, "labels")[0] if _texts(record, "labels") else _text(record, "labels"),
        target_true=None,
        paraphrases=(),
        neighborhood=neighbors,
    )


def _from_ripple(record: Record) -> Reading:
    """RippleEdits: the edit is a sentence, "The name of the father of Ada is Bob.", beside the one that was true and its relation."""
    edit = _object(record, "edit")
    sentence, relation = _text(edit, "prompt", "edit."), _text(edit, "relation", "edit.")
    name = relation.replace("_", " ").lower()
    found = re.fullmatch(rf"(The (?:.*? )?{re.escape(name)} of )(.+?) (is|are) (.+?)\.?", sentence)
    if found is None:
        raise RequestError(
            f"the edit '{sentence}' does not tell its subject from its target",
            remedy=f"write {_OWN_SHAPE}: what the sentence is about, and what follows",
            field="edit.prompt",
        )
    before, subject, verb, target = found.groups()
    original = _optional_text(_object(edit, "original_fact"), "prompt", "edit.original_fact.")
    head = f"{before}{subject} {verb} "
    true = original[len(head) :].rstrip(".") if original and original.startswith(head) else None
    return _request(f"{before}{SLOT} {verb}", subject, target, target_true=true, paraphrases=(), neighborhood=())


def _from_unke(record: Record) -> Reading:
    """UnKE and what is published like it: a question and a long answer. No subject is marked, so the whole question is the subject."""
    question = _text(record, "question")
    subject = _optional_text(record, "subject")
    marked = subject is not None and subject in question
    return _request(
        question if marked else SLOT,
        subject if marked and subject else question,
        _text(record, "answer"),
        target_true=None,
        paraphrases=_texts(record, "para_question"),
        neighborhood=(),
    )


def _from_halluedit(record: Record) -> Reading:
    """HalluEditBench: `object` is the right answer to `question`, which the model gets wrong."""
    question, subject = _text(record, "question"), _text(record, "subject")
    return _request(
        question if subject in question else SLOT,
        subject if subject in question else question,
        _text(record, "object"),
        target_true=None,
        paraphrases=_texts(record, "paraphrased_question"),
        neighborhood=[(text, None) for text in _texts(record, "locality_question")],
    )


def _from_known(record: Record) -> Reading:
    """known_1000 (Meng et al. 2022): what a model knows, `attribute` being the answer: to be kept, or to be measured."""
    return _request(
        _text(record, "prompt"),
        _text(record, "subject"),
        _text(record, "attribute"),
        target_true=None,
        paraphrases=(),
        neighborhood=(),
    )


def _from_tracing(record: Record) -> Reading:
    """counterfact-tracing: CounterFact in columns, `target_false` being what is to be written."""
    return _request(
        _text(record, "prompt"),
        _text(record, "subject"),
        _text(record, "target_false"),
        target_true=_optional_text(record, "target_true"),
        paraphrases=(),
        neighborhood=(),
    )


def _from_convsent(record: Record) -> Reading:
    """KnowEdit's ConvSent holds no facts."""
    raise RequestError(
        "the record asks for a sentiment about a topic (KnowEdit's ConvSent), not for a fact",
        remedy="give facts: a prompt, its subject and what shall follow",
    )


def _parallel_neighbors(record: Record, prompts: str, targets: str) -> list[tuple[str, str | None]]:
    """Prompts and answers from two parallel fields, each a text or a list; an answer may be a list of its names.

    Of a prompt without an answer (null, or a list or text with nothing in it), the answer is None.
    """
    texts, answers = _texts(record, prompts), record.get(targets)
    if not texts:
        return []
    if answers is None or answers == []:
        answers = [None] * len(texts)
    elif not isinstance(record.get(prompts), list) or not isinstance(answers, list):
        answers = [answers]
    if len(answers) != len(texts):
        raise RequestError(
            f"'{prompts}' has {len(texts)} entries and '{targets}' has {len(answers)}",
            remedy="give one answer for each prompt",
            field=targets,
        )
    return [(text, _first_answer(answer, targets)) for text, answer in zip(texts, answers, strict=True)]


def _first_answer(answer: object, name: str) -> str | None:
    """The first name of an answer that is not empty."""
    if isinstance(answer, list):
        return next((found for entry in answer if (found := _first_answer(entry, name)) is not None), None)
    empty = answer is None or (isinstance(answer, str) and not answer.strip())
    return None if empty else _clean(answer, name)


def _given(target: str | None, prompt: str) -> str:
    if target is None:
        raise RequestError(
            f"the neighborhood prompt '{prompt}' has no answer",
            remedy="say what must stay true there",
            field="neighborhood",
        )
    return target


@dataclass(frozen=True)
class Shape:
    """One form of records.

    Attributes:
        name: who publishes it.
        fields: the fields that are read, as they are told to people.
        convert: reads a record.
        telling: any of these fields gives it away.
        needed: and these must be there beside it.
        besides: fields that are read as well, or that the published files have and that say nothing of the fact.
        has_true: whether ``target_true`` is a field of it.
    """

    name: str
    fields: tuple[str, ...]
    convert: Callable[[Record], Reading | list[Reading]]
    telling: frozenset[str]
    needed: frozenset[str] = frozenset()
    besides: frozenset[str] = frozenset()
    has_true: bool = False

    def fits(self, record: Record) -> bool:
        several = self.convert is _from_mquake
        return (
            not self.telling.isdisjoint(record)
            and self.needed <= record.keys()
            and (not several or isinstance(record["requested_rewrite"], list))
        )


_COUNTERFACT = ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")
_SHAPES: tuple[Shape, ...] = (
    Shape(
        "MQuAKE",
        ("requested_rewrite",),
        _from_mquake,
        frozenset({"requested_rewrite"}),
        besides=frozenset({"case_id", "answer", "new_answer"}),  # to the questions of several hops
    ),
    Shape(
        "CounterFact",
        _COUNTERFACT,
        _from_counterfact,
        frozenset({"requested_rewrite"}),
        besides=frozenset({"case_id", "pararel_idx"}),
    ),
    Shape(
        "RippleEdits",
        ("edit",),
        _from_ripple,
        frozenset({"edit"}),
        frozenset({"edit"}),
        frozenset({"example_type"}),
    ),
    Shape(
        "zsRE",
        ("subject", "src", "alt", "answers", "rephrase", "loc", "loc_ans"),
        _from_zsre,
        ZSRE_FIELDS,
        besides=frozenset({"pred", "cond"}),
    ),
    Shape(
        "WikiBio",
        ("text", "concept", "labels", "locality"),
        _from_wikibio,
        frozenset({"concept"}),
        frozenset({"text", "labels"}),
    ),
    Shape("ConvSent", ("topic", "pos", "neg"), _from_convsent, frozenset({"topic"}), frozenset({"pos", "neg"})),
    Shape(
        "UnKE",
        ("question", "answer", "para_question"),
        _from_unke,
        frozenset({"para_question", "sub_question"}),
        besides=frozenset({"id", "subject", "sub_answer"}),
    ),
    Shape(
        "HalluEdit",
        ("subject", "object", "question", "paraphrased_question"),
        _from_halluedit,
        frozenset({"object"}),
        frozenset({"subject", "question"}),
        frozenset({"relation", "locality_question"}),
    ),
    Shape(
        "known_1000",
        ("subject", "attribute", "prompt"),
        _from_known,
        frozenset({"attribute"}),
        frozenset({"prompt"}),
        frozenset({"known_id", "template", "prediction", "relation_id"}),
    ),
    Shape(
        "counterfact-tracing",
        ("subject", "prompt", "target_false", "target_true"),
        _from_tracing,
        frozenset({"target_false"}),
        besides=frozenset(
            {"relation", "relation_prefix", "relation_suffix", "relation_id", "target_true_id", "target_false_id"}
        ),
        has_true=True,
    ),
    Shape(
        "EasyEdit",
        (
            "prompt",
            "subject",
            "target_new",
            "ground_truth",
            "rephrase_prompt",
            "locality_prompt",
            "locality_ground_truth",
        ),
        _from_easyedit,
        _EASYEDIT_FIELDS,
        besides=frozenset({"case_id"}),
    ),
    Shape("facts", ("prompt", "subject", "target_new"), _from_own, _TELLING),
)
"""Every shape; the first that fits is meant."""


# --- fields


def _request(
    prompt: str,
    subject: str,
    target_new: str,
    *,
    target_true: str | None,
    paraphrases: Iterable[str],
    neighborhood: Iterable[tuple[str, str | None]],
) -> Reading:
    """The request without what compares nothing: unanswered prompts, and a true target that equals the new one (2 % of zsRE)."""
    neighborhood = list(neighborhood)
    answered = [(text, answer) for text, answer in neighborhood if answer is not None]
    request = Request.make(
        prompt=_template(prompt, subject),
        subject=subject,
        target_new=target_new,
        target_true=None if target_true == target_new else target_true,
        paraphrases=tuple(paraphrases),
        neighborhood=answered,
    )
    return Reading(request, len(neighborhood) - len(answered))


def _template(prompt: str, subject: str) -> str:
    """The prompt with `{}` where the subject goes: as written, else in place of the subject's last occurrence."""
    slots = prompt.count(SLOT)
    if slots > 1:
        raise RequestError(
            f"the prompt '{prompt}' contains {SLOT} {slots} times", remedy="mark the subject once", field="prompt"
        )
    if slots == 1:
        return prompt
    before, found, after = prompt.rpartition(subject)
    if not found:
        raise RequestError(
            f"the subject '{subject}' is not in the prompt '{prompt}'",
            remedy=f"write the subject as the prompt does, or {SLOT} in its place",
            field="prompt",
        )
    return f"{before}{SLOT}{after}"


def _text(record: Record, name: str, prefix: str = "") -> str:
    value = _optional_text(record, name, prefix)
    if value is None:
        raise RequestError(f"'{prefix}{name}' is missing", remedy=f"add the field '{name}'", field=prefix + name)
    return value


def _optional_text(record: Record, name: str, prefix: str = "") -> str | None:
    value = record.get(name)
    return None if value is None else _clean(value, prefix + name)


def _texts(record: Record, name: str) -> list[str]:
    """The texts of a field that holds one text, a list of them (nested or not), null, or is absent."""
    value = record.get(name)
    if value is None:
        return []
    if isinstance(value, list):
        return [text for entry in value for text in _texts({name: entry}, name)]
    return [_clean(value, name)]


def _object(record: Record, name: str) -> Record:
    value = record.get(name)
    if value is not None and not isinstance(value, dict):
        raise _wrong_type(name, "an object", value)
    return value or {}


def _clean(value: object, name: str) -> str:
    """`value` as text in Unicode NFC without outer white space."""
    if not isinstance(value, str):
        raise _wrong_type(name, "a text", value)
    text = nfc(value).strip()
    if not text:
        raise RequestError(f"'{name}' is empty", remedy=_filled(name), field=name)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(
            f"'{name}' contains a character that no text has (NUL or half a surrogate pair)",
            remedy="correct the escape sequence",
            field=name,
        )
    return text


def _filled(name: str) -> str:
    """What to do about a field that is empty: some must be there."""
    return f"say it: every fact needs '{name}'" if name in REQUIRED_FIELDS else f"fill in '{name}', or leave it out"


def _wrong_type(name: str, expected: str, value: object) -> RequestError:
    remedy = f"write {expected} for '{name}'"
    if expected == "a text" and isinstance(value, bool | int | float | date):
        remedy += ", in quotes where the file is JSON or YAML"
    return RequestError(f"'{name}' is {json_kind(value)}, not {expected}", remedy=remedy, field=name)


def is_by_columns(content: Record) -> bool:
    """Whether an object is a table column by column: several fields of facts that hold lists, or objects by row, of one length."""
    columns = [value for name, value in content.items() if str(name).rstrip("s") in REQUIRED_FIELDS]
    return len(columns) > 1 and all(
        isinstance(column, list | dict) and len(column) == len(columns[0]) for column in columns
    )


KNOWN_FIELDS = frozenset().union(*(shape.telling | {*shape.fields} for shape in _SHAPES)) | OPTIONAL_FIELDS
"""Every field by which a record is known."""
