"""Read the facts to write: a file, a stream, or one fact from the command line; and find contradictions among them.

Formats: JSONL, JSON, CSV (with commas, semicolons or tabs), YAML, Parquet, and data sets of the Hub; the record shapes are those of
`shapes`. Everything that is wrong with the input is a `RequestError` that names the file, the line or record, the field and the remedy."""

from __future__ import annotations

import ast
import codecs
import contextlib
import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import IO, Any, Literal, get_args

from patchhub.editing.shapes import (
    KNOWN_FIELDS,
    REQUIRED_FIELDS,
    ZSRE_FIELDS,
    Reading,
    is_by_columns,
    is_record,
    json_kind,
    read_record,
    request_from_record,
)
from patchhub.errors import ContradictionError, RequestError
from patchhub.objects import Request

Format = Literal["jsonl", "json", "csv", "tsv", "yaml", "parquet"]

_SUFFIXES: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".parquet": "parquet",
}
_HUB = "hf://datasets/"
_DATA = "install the extra that reads it: pip install 'patchhub[data]'"
_LIST_COLUMNS = ("paraphrases", "neighborhood")
_LISTED_CONTRADICTIONS = 5
_PARQUET = b"PAR1"
_BINARY: Mapping[bytes, tuple[str, str]] = {
    b"PK\x03\x04": (
        "a spreadsheet or an archive",
        "save the sheet as CSV (UTF-8), or unpack the archive and name the file in it",
    ),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet of an old kind", "save the sheet as CSV (UTF-8)"),
    b"\x1f\x8b": ("a compressed file", "unpack it first: gunzip FILE"),
    b"SQLite format 3": ("a database", "write its rows as CSV: sqlite3 FILE -csv -header 'select ...'"),
}
"""What files that are no text begin with, what they are, and what to do."""
_UNSAID = "(as before)"  # stands for the answer of a keep while its record is read


@dataclass(frozen=True)
class Origin:
    """Where something was read: a source and, within it, a line or a record; both count from 1."""

    source: str
    line: int | None = None
    record: int | None = None

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line is not None else ""
        return self.source + line + (f", record {self.record}" if self.record is not None else "")


@dataclass(frozen=True)
class Batch:
    """The unique requests of one source in their order, and their origins beside them.

    `duplicates` counts the records that were dropped because their request id had been read before, `unanswered` the
    neighbourhood prompts that were left out because their record gives no answer to them, `ignored` the fields that were left out, by name,
    and how many records have each, and `kept` those that are metadata of their requests.
    `openings` are what answers in a chat say before their targets, by request id, of the records that give an answer.
    """

    requests: tuple[Request, ...]
    origins: tuple[Origin, ...]
    duplicates: int
    unanswered: int = 0
    ignored: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    openings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Keep:
    """A prompt whose answer must stay: ``prompt`` with ``{}`` for the subject; ``answer`` None is what the model says before the edit."""

    prompt: str
    subject: str
    answer: str | None

    def asked(self, answer: str) -> Request:
        """The request that asks for an answer."""
        return Request.make(self.prompt, self.subject, self.answer or answer)


@dataclass(frozen=True)
class Contradiction:
    """Two requests with the same prompt and subject and different targets."""

    earlier: Request
    later: Request

    def __str__(self) -> str:
        return f"'{self.later.text}' with both '{self.earlier.target_new}' and '{self.later.target_new}'"


def read_requests(
    source: Path | IO[bytes] | IO[str], *, name: str | None = None, format: Format | None = None
) -> Batch:
    """Read all requests of a file or of an open stream.

    Args:
        source: a path, or a stream such as standard input.
        name: what messages and origins call the source; by default the path, or "standard input" for a stream.
        format: how to read it; by default the path's suffix decides and, where that says nothing, the content.

    Raises:
        RequestError: the source cannot be read, holds no record, or one of its records is malformed.
    """
    whole = Origin(name or (str(source) if isinstance(source, Path) else "standard input"))
    if format is not None and format not in get_args(Format):
        raise RequestError(f"unknown format '{format}'", remedy=f"use one of {', '.join(get_args(Format))}")
    return _unique(_readings(_records(source, whole, format)), whole)


def _readings(records: Iterable[tuple[Origin, object]]) -> list[tuple[Reading, Origin]]:
    return [(reading, origin) for origin, record in records for reading in _convert(record, origin)]


def _records(
    source: Path | IO[bytes] | IO[str], whole: Origin, format: Format | None
) -> Iterator[tuple[Origin, object]]:
    """The decoded records of a file or stream, whatever its format."""
    suffix = _SUFFIXES.get(source.suffix.lower()) if isinstance(source, Path) else None
    if (format or suffix) == "parquet":
        return _read_parquet(source, whole)
    text = _read_text(source, whole)
    if not text.strip():
        raise _refuse(whole, "empty", "give at least one fact to write")
    return _READERS[format or suffix or _sniff(text, whole)](text, whole)


def read_facts(
    source: Any = None,
    *,
    format: Format | None = None,
    prompt: str | None = None,
    subject: str | None = None,
    target: str | None = None,
) -> Batch:
    """The facts that are meant: those of a source, or the one that prompt, subject and target spell out.

    Args:
        source: a path; an open stream; a table with ``to_dict("records")``, such as a pandas DataFrame; or records in any iterable, such
            as a list or a datasets.Dataset. A record is a mapping in one of the shapes that files have, or a `Request`.
        format: how to read a path or a stream.

    Raises:
        RequestError: there are no facts, both are given, or a record is malformed.
    """
    given = {"prompt": prompt, "subject": subject, "target": target}
    missing = [name for name, text in given.items() if not text]
    if source is None:
        if prompt and subject and target:
            return Batch((one_request(prompt, subject, target),), (Origin("the arguments"),), 0)
        problem = (
            "there are no facts"
            if len(missing) == len(given)
            else f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing or empty"
        )
        raise RequestError(problem, remedy="Give a file or a list of facts, or prompt, subject and target.")
    if len(missing) < len(given):
        raise RequestError("a source of facts and a prompt are both given", remedy="Give one of them.")
    if isinstance(source, str) and source.startswith(_HUB):
        return _from_hub(source, format)
    if isinstance(source, str | PathLike):
        return read_requests(Path(source), format=format)
    if callable(getattr(source, "read", None)):
        return read_requests(source, format=format)
    return _unique(list(_from_records(source)), Origin("the records"))


def _from_hub(address: str, format: Format | None) -> Batch:
    """A file of a data set on the Hub, ``hf://datasets/user/name/path``, or all of a data set's rows, ``hf://datasets/user/name``.

    Of a data set the split ``train`` is read, or its only one. A revision follows the name: ``user/name@v1``.
    """
    whole = Origin(address)
    user, name, *path = [*address[len(_HUB) :].split("/", 2), ""][:3]
    if not user or not name:
        raise _refuse(
            whole,
            "names no data set of the Hub",
            f"write {_HUB}user/name, or a file of it: {_HUB}user/name/facts.jsonl",
        )
    try:
        if path[0]:
            from huggingface_hub import HfFileSystem

            with HfFileSystem().open(address.removeprefix("hf://"), "rb") as stream:
                suffix = _SUFFIXES.get(Path(path[0]).suffix.lower())
                return read_requests(io.BytesIO(stream.read()), name=address, format=format or suffix)
        import datasets

        name, _, revision = name.partition("@")
        splits = datasets.load_dataset(f"{user}/{name}", revision=revision or None)
    except ImportError:
        raise _refuse(whole, "a whole data set cannot be read here", f"{_DATA}; or name one file of it") from None
    except RequestError:
        raise
    except Exception as error:  # the clients raise errors of several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _refuse(
            whole, f"cannot be read ({reason})", "check the address, the connection and `hf auth login`"
        ) from error
    split = "train" if "train" in splits else next(iter(splits))
    return _unique(list(_from_records(splits[split])), whole)


def _from_records(source: Any) -> Iterator[tuple[Reading, Origin]]:
    table = getattr(source, "to_dict", None)
    records = table("records") if callable(table) and not isinstance(source, Mapping) else source
    if isinstance(records, Mapping) or not isinstance(records, Iterable):
        raise RequestError(
            f"facts cannot be read from a {type(source).__name__}",
            remedy='Give a path, a table, or a list of records such as {"prompt": ..., "subject": ..., "target_new": ...}.',
        )
    for number, record in enumerate(records, start=1):
        origin = Origin("the records", record=number)
        if isinstance(record, Request):
            yield Reading(record, 0), origin
        elif isinstance(record, Mapping):
            present = {str(name): _cell(value) for name, value in record.items()}
            filled = {name: value for name, value in present.items() if value is not None}
            yield from ((reading, origin) for reading in _convert(filled, origin))
        else:
            raise _refuse(origin, f"a {type(record).__name__} stands where a fact belongs", "write it as a mapping")


def _cell(value: Any) -> Any:
    """A value of a table: an array as a list, and None for what is missing, which is no number in pandas."""
    value = value.tolist() if callable(getattr(value, "tolist", None)) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _unique(records: Sequence[tuple[Reading, Origin]], whole: Origin) -> Batch:
    if not records:
        raise _refuse(whole, "no records", "give at least one fact to write")
    first: dict[str, tuple[Request, Origin]] = {}
    openings: dict[str, str] = {}
    for reading, origin in records:
        first.setdefault(reading.request.id, (reading.request, origin))
        if reading.opening is not None:
            openings.setdefault(reading.request.id, reading.opening)
    requests, origins = zip(*first.values(), strict=True)
    unanswered = sum(reading.unanswered for reading, _ in records)
    ignored = Counter(name for reading, _ in records for name in sorted(reading.ignored))
    kept = Counter(name for reading, _ in records for name in sorted(reading.request.metadata))
    return Batch(requests, origins, len(records) - len(first), unanswered, ignored, kept, openings)


def read_keeps(source: Any) -> tuple[Keep, ...]:
    """Read prompts whose answers must stay: records as facts are written, in which ``target_new`` may be left out.

    Args:
        source: a path, or mappings in any iterable; None: none.

    Raises:
        RequestError: as in `read_requests`.
    """
    if source is None:
        return ()
    if isinstance(source, str | PathLike):
        records = _records(Path(source), Origin(str(source)), None)
    else:
        records = ((Origin("the keeps", record=number), record) for number, record in enumerate(source, start=1))
    found: dict[tuple[str, str], Keep] = {}
    for origin, record in records:
        keep = _keep(record, origin)
        found.setdefault((keep.prompt, keep.subject), keep)
    return tuple(found.values())


def _keep(record: object, origin: Origin) -> Keep:
    answered = not isinstance(record, dict) or any(
        record.get(name) for name in ("target_new", "alt", "requested_rewrite")
    )
    filled = record if answered or not isinstance(record, dict) else {**record, "target_new": _UNSAID}
    request = _convert(filled, origin)[0].request
    return Keep(request.prompt, request.subject, request.target_new if answered else None)


def one_request(
    prompt: str,
    subject: str,
    target_new: str,
    *,
    target_true: str | None = None,
    paraphrases: Sequence[str] = (),
    neighborhood: Sequence[str] = (),
) -> Request:
    """The request that the arguments spell out, under the same rules as a record of our own shape."""
    record = {"prompt": prompt, "subject": subject, "target_new": target_new, "target_true": target_true}
    return request_from_record({**record, "paraphrases": list(paraphrases), "neighborhood": list(neighborhood)})


def find_contradictions(requests: Iterable[Request], active: Iterable[Request] = ()) -> list[Contradiction]:
    """The requests that ask for another target than an earlier one at the same prompt and subject.

    Earlier are the active requests, then those before it in the batch; without `active` the batch is compared with
    itself alone. Each request is paired with the first one at its prompt and subject.
    """
    first: dict[tuple[str, str], Request] = {}
    for request in active:
        first.setdefault((request.prompt, request.subject), request)
    pairs = []
    for request in requests:
        earlier = first.setdefault((request.prompt, request.subject), request)
        if earlier.target_new != request.target_new:
            pairs.append(Contradiction(earlier, request))
    return pairs


def contradiction_error(contradictions: Sequence[Contradiction], *, active: bool) -> ContradictionError:
    """The error that says the first five contradictions in words and gives the request ids of all as facts.

    Args:
        active: the earlier request of each is an active fact; otherwise both are new.
    """
    listed = "; ".join(str(pair) for pair in contradictions[:_LISTED_CONTRADICTIONS])
    more = len(contradictions) - _LISTED_CONTRADICTIONS
    count = "1 contradiction" if len(contradictions) == 1 else f"{len(contradictions)} contradictions"
    return ContradictionError(
        f"{count}: {listed}" + (f"; and {more} more" if more > 0 else ""),
        remedy="replace the active fact (`--on-conflict replace` of commit and cherry-pick), or leave the other out"
        if active
        else "keep one of them: each prompt and subject has one target",
        contradictions=[[pair.earlier.id, pair.later.id] for pair in contradictions],
    )


def _read_text(source: Path | IO[bytes] | IO[str], whole: Origin) -> str:
    try:
        content = source.read_bytes() if isinstance(source, Path) else source.read()
        if isinstance(content, bytes) and content.startswith(_PARQUET):
            raise _refuse(whole, "a Parquet file", "say so: --format parquet, or name it .parquet")
        text = content if isinstance(content, str) else content.decode(_encoding(content))
    except OSError as error:
        remedy = "name a file that can be read"
        if " " in whole.source:  # a sentence, most likely
            remedy = "name a file; one fact is given by --prompt, --subject and --target"
        raise _refuse(whole, f"cannot be read ({error.strerror})", remedy) from None
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        kind, remedy = next((told for mark, told in _BINARY.items() if error.object.startswith(mark)), ("", ""))
        message = f"{kind}, not text" if kind else f"not UTF-8 text ({byte})"
        raise _refuse(
            whole, message, remedy or "save the file as UTF-8; where a spreadsheet saves it, as “CSV UTF-8”"
        ) from None
    if "\0" in text:
        raise _refuse(whole, f"not text (NUL at offset {text.index(chr(0))})", "name a file of facts")
    return text


def _encoding(content: bytes) -> str:
    """UTF-8, or UTF-16 where the file begins as spreadsheets mark that."""
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _sniff(text: str, whole: Origin) -> Format:
    """The format that the content shows: `[` is JSON, a first line that is a whole record JSONL, a header CSV."""
    first_line = text.lstrip().split("\n", 1)[0].strip()
    if first_line.startswith("["):
        return "json"
    if first_line.startswith("{"):
        try:
            return "json" if "requests" in json.loads(first_line) else "jsonl"
        except (ValueError, RecursionError):
            spread = text.lstrip().startswith("{\n") or first_line.endswith(("{", "[", ",", ":"))
            return "json" if spread else "jsonl"
    header = {cell.strip().strip('"') for cell in first_line.split(_delimiter(first_line))}
    if header >= REQUIRED_FIELDS or header >= ZSRE_FIELDS:
        return "csv"
    if first_line.startswith("- ") or first_line in ("---", "requests:"):
        return "yaml"
    known = ", ".join(get_args(Format))
    raise _refuse(
        whole,
        "neither the name nor the content tells the format",
        f"say the format ({known}); a CSV's first line names the columns prompt, subject and target_new",
    )


def _delimiter(line: str) -> str:
    """What parts the cells of a table's first line: the one of comma, semicolon and tab that it has most of."""
    return max(",;\t", key=line.count)


def _read_jsonl(text: str, whole: Origin) -> Iterator[tuple[Origin, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            origin = Origin(whole.source, line=number)
            yield origin, _parse_json(line, origin)


def _read_json(text: str, whole: Origin) -> Iterator[tuple[Origin, object]]:
    try:
        content = _parse_json(text, whole)
    except RequestError:
        if not _is_jsonl(text):
            raise
        return _read_jsonl(text, whole)
    return _listed(content, whole)


def _is_jsonl(text: str) -> bool:
    """Whether each of several lines looks like a whole record: many call such a file .json."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines)


def _listed(content: object, whole: Origin) -> Iterator[tuple[Origin, object]]:
    """The records of a document: a list, its only list of records (``{"requests": [...]}``), or one record alone."""
    records = content
    if content is None or content == {}:
        raise _refuse(whole, "no records", "give at least one fact to write")
    if isinstance(content, dict) and is_by_columns(content):
        raise _refuse(
            whole,
            "a table column by column, where a record for each fact belongs",
            'write [{"prompt": ..., "subject": ..., "target_new": ...}]; pandas does with to_json(orient="records")',
        )
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and (not value or isinstance(value[0], dict))
        ]
        alone = len(lists) == 1 and not is_record(content)
        records = lists[0] if alone else [content] if is_record(content) else content
    if not isinstance(records, list):
        message = f"{json_kind(records)} stands where a list of records belongs"
        raise _refuse(whole, message, 'write [{...}, {...}] or {"requests": [...]}')
    for number, record in enumerate(records, start=1):
        yield Origin(whole.source, record=number), record


def _read_yaml(text: str, whole: Origin) -> Iterator[tuple[Origin, object]]:
    import yaml  # huggingface_hub brings it

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise _refuse(
            whole, f"malformed YAML{where} ({getattr(error, 'problem', None) or error})", "correct it there"
        ) from None
    return _listed(content, whole)


def _read_parquet(source: Path | IO[bytes] | IO[str], whole: Origin) -> Iterator[tuple[Origin, object]]:
    """One record per row; a null is an absent field."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise _refuse(whole, "a Parquet file cannot be read here", _DATA) from None
    try:
        rows = parquet.read_table(source).to_pylist()
    except Exception as error:  # the library raises errors of its own and of the system
        raise _refuse(whole, f"cannot be read as Parquet ({error})", "name a Parquet file") from None
    for number, row in enumerate(rows, start=1):
        yield Origin(whole.source, record=number), {name: value for name, value in row.items() if value is not None}


def _read_csv(text: str, whole: Origin) -> Iterator[tuple[Origin, object]]:
    """One record per row; an empty cell is an absent field; list columns hold JSON or texts separated by `|`."""
    delimiter = _delimiter(text.lstrip("\n").partition("\n")[0])
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = [_column(cell) for cell in next(rows)]
        if len(set(header)) < len(header):
            raise _refuse(whole, "names a column twice", "rename or remove one of the columns")
        if KNOWN_FIELDS.isdisjoint(header):
            named = ", ".join(f"'{name}'" for name in header[:8])
            remedy = "name them there: prompt,subject,target_new, or those of a published file (docs/data.md)"
            raise _refuse(Origin(whole.source, line=1), f"no column of facts is among {named}", remedy)
        line = rows.line_num + 1
        for row in rows:
            origin, line = Origin(whole.source, line=line), rows.line_num + 1
            if len(row) > len(header):
                message = f"{len(row)} cells under {len(header)} columns"
                between = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
                raise _refuse(origin, message, f'put quotes ("...") around cells that contain {between}')
            record: dict[str, Any] = {name: cell for name, cell in zip(header, row, strict=False) if cell.strip()}
            for name in _LIST_COLUMNS:
                if name in record:
                    record[name] = _parse_list_cell(record[name], origin)
            if record:
                yield origin, record
    except csv.Error as error:
        remedy = "shorten that cell, or write JSONL" if "field limit" in str(error) else "correct the line"
        raise _refuse(Origin(whole.source, line=line), f"malformed CSV ({error})", remedy) from None


def _column(cell: str) -> str:
    """The name of a column; one that people wrote as a title (``Target New``) as the field that it is."""
    name = cell.strip()
    field_name = name.casefold().replace(" ", "_")
    return field_name if field_name in KNOWN_FIELDS else name


def _parse_list_cell(cell: str, origin: Origin) -> Any:
    if cell.lstrip().startswith("["):
        try:
            return _parse_json(cell, origin)
        except RequestError:
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                written = ast.literal_eval(cell.strip())  # as pandas writes a list into a cell
                if isinstance(written, list):
                    return written
            raise
    return [text for text in cell.split("|") if text.strip()]


def _parse_json(text: str, origin: Origin) -> Any:
    """Strict JSON: a key that occurs twice in one object is refused, since one of its values would be lost."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if origin.line else f"line {error.lineno}, column {error.colno}"
        remedy = _json_remedy(text, error.pos)
        if error.msg == "Extra data" and origin.line is None:
            remedy = "if the file holds one record per line, say that its format is jsonl"
        raise _refuse(origin, f"malformed JSON at {place} ({error.msg})", remedy) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _refuse(origin, f"malformed JSON ({reason})", "correct the JSON") from None


def _json_remedy(text: str, place: int) -> str:
    """What is wrong with JSON that people write by hand."""
    there, before = text[place : place + 2], text[:place].rstrip()[-1:]
    if there[:1] == "#" or there in ("//", "/*"):
        return "JSON has no comments: take them out"
    if there[:1] in ("]", "}") and before == ",":
        return "take out the comma before it"
    if there[:1] == "'":
        return "names and texts stand in double quotes: json.dumps in Python writes them so"
    return "correct the JSON there"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"the key '{key}' occurs twice")
        unique[key] = value
    return unique


def _convert(record: object, origin: Origin) -> list[Reading]:
    try:
        return read_record(record)
    except RequestError as error:
        raise _refuse(origin, error.message, error.remedy, **error.facts) from None


def _refuse(origin: Origin, message: str, remedy: str | None, **facts: Any) -> RequestError:
    where = {"file": origin.source, "line": origin.line, "record": origin.record}
    place = {key: value for key, value in where.items() if value is not None}
    return RequestError(f"{origin}: {message}", remedy=remedy, **facts, **place)


_READERS: Mapping[Format, Callable[[str, Origin], Iterator[tuple[Origin, object]]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "yaml": _read_yaml,
}
