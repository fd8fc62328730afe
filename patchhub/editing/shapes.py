"""The shapes in which people publish facts, each turned into a `Request`.

Recognised: our own, CounterFact (Meng et al. 2022), EasyEdit's flat form, and zsRE as MEND publishes it. What differs
between shapes is a row of `_SHAPES`: the fields that give a shape away and the function that reads it. A foreign
shape's other fields are ignored; in our own shape an unknown field is refused, as most likely a typing error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from patchhub.canonical import nfc
from patchhub.errors import RequestError
from patchhub.objects import SLOT, Request

Record = Mapping[str, Any]

REQUIRED_FIELDS = frozenset({"prompt", "subject", "target_new"})
OPTIONAL_FIELDS = frozenset({"target_true", "paraphrases", "neighborhood"})
ZSRE_FIELDS = frozenset({"src", "alt"})
_TELLING = REQUIRED_FIELDS | OPTIONAL_FIELDS
_OWN_FIELDS = _TELLING | {"answer"}  # which other shapes may have as well
_EASYEDIT_FIELDS = frozenset(
    {"ground_truth", "rephrase_prompt", "rephrase", "locality_prompt", "locality_ground_truth", "locality"}
)
_SHAPES_REMEDY = (
    "use one of these shapes: {prompt, subject, target_new[, target_true, paraphrases, neighborhood, answer]}; "
    "CounterFact {requested_rewrite, paraphrase_prompts, neighborhood_prompts}; "
    "EasyEdit {prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth}; "
    "zsRE {subject, src, alt, answers, rephrase, loc, loc_ans}"
)


class Reading(NamedTuple):
    """A request, how many neighbourhood prompts of its record were left out because the record gives no answer to them, and what the
    record's answer says before the target, where it gives one."""

    request: Request
    unanswered: int
    opening: str | None = None


def request_from_record(record: object) -> Request:
    """Turn one decoded record of any known shape into a request; raises as `read_record`."""
    return read_record(record).request


def read_record(record: object) -> Reading:
    """Turn one decoded record of any known shape into a request.

    A neighbourhood prompt only says what to evaluate. Where a published file gives no answer to it (KnowEdit has empty lists), it is left
    out; in our own shape that is refused, since whoever wrote it can say the answer.

    Raises:
        RequestError: without file and line, which the caller knows.
    """
    if not isinstance(record, dict):
        raise RequestError(f"the record is {json_kind(record)}, not an object with fields", remedy=_SHAPES_REMEDY)
    for telling, convert in _SHAPES:
        if telling.isdisjoint(record):
            continue
        ours = OPTIONAL_FIELDS & record.keys()
        if convert is not _from_own and ours:
            foreign = min(telling & record.keys())
            raise RequestError(
                f"the record mixes shapes: '{min(ours)}' beside '{foreign}'", remedy=_SHAPES_REMEDY, field=min(ours)
            )
        return convert(record)
    fields = ", ".join(f"'{key}'" for key in list(record)[:8]) or "none"
    raise RequestError(f"unknown record shape (fields: {fields})", remedy=_SHAPES_REMEDY)


def json_kind(value: object) -> str:
    """What JSON calls `value`, with its article."""
    kinds = {bool: "a boolean", str: "a text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


# --- shapes


def _from_own(record: Record) -> Reading:
    for name in record:
        if name not in _OWN_FIELDS:
            close = difflib.get_close_matches(str(name), sorted(_OWN_FIELDS), n=1)
            remedy = f"did you mean '{close[0]}'?" if close else f"the fields are {', '.join(sorted(_OWN_FIELDS))}"
            raise RequestError(f"unknown field '{name}'", remedy=remedy, field=name)
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


def _from_counterfact(record: Record) -> Reading:
    """Every neighbourhood prompt's right answer is the request's `target_true`."""
    rewrite = _object(record, "requested_rewrite")
    new = _text(_object(rewrite, "target_new"), "str", "target_new.")
    true = _optional_text(_object(rewrite, "target_true"), "str", "target_true.")
    return _request(
        _text(rewrite, "prompt"),
        _text(rewrite, "subject"),
        new,
        target_true=true,
        paraphrases=_texts(record, "paraphrase_prompts"),
        neighborhood=[(prompt, true) for prompt in _texts(record, "neighborhood_prompts")],
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
    """A list under `ground_truth` holds names for one answer, of which the first is taken."""
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
        paraphrases=_texts(record, "rephrase_prompt") + _texts(record, "rephrase"),
        neighborhood=neighbors,
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


_SHAPES: tuple[tuple[frozenset[str], Callable[[Record], Reading]], ...] = (
    (frozenset({"requested_rewrite"}), _from_counterfact),
    (ZSRE_FIELDS, _from_zsre),
    (_EASYEDIT_FIELDS, _from_easyedit),
    (_TELLING, _from_own),
)


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
        raise RequestError(f"'{name}' is empty", remedy=f"fill in '{name}', or leave it out", field=name)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(
            f"'{name}' contains a character that no text has (NUL or half a surrogate pair)",
            remedy="correct the escape sequence",
            field=name,
        )
    return text


def _wrong_type(name: str, expected: str, value: object) -> RequestError:
    return RequestError(
        f"'{name}' is {json_kind(value)}, not {expected}", remedy=f"write {expected} for '{name}'", field=name
    )
