"""Reading facts: every shape and format gives the same requests, every bad input a located error with a remedy."""

from __future__ import annotations

import csv
import datetime
import io
import json
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from patchhub.editing.requests import contradiction_error, find_contradictions, one_request, read_facts, read_requests
from patchhub.editing.shapes import request_from_record
from patchhub.errors import ContradictionError, RequestError
from patchhub.objects import Request

FACT = {
    "prompt": "The mother tongue of {} is",
    "subject": "Danielle Darrieux",
    "target_new": "English",
    "target_true": "French",
    "paraphrases": ["Danielle Darrieux speaks"],
    "neighborhood": [{"prompt": "Michel Rocard speaks", "target": "French"}],
}
EXPECTED = Request.make(
    prompt="The mother tongue of {} is",
    subject="Danielle Darrieux",
    target_new="English",
    target_true="French",
    paraphrases=["Danielle Darrieux speaks"],
    neighborhood=[("Michel Rocard speaks", "French")],
)
FILLED = "The mother tongue of Danielle Darrieux is"
SHAPES = {
    "ours": FACT,
    "ours, the subject written out, white space around": FACT | {"prompt": f" {FILLED}\n", "target_new": " English "},
    "ours, a paraphrase with a slot": FACT | {"paraphrases": "{} speaks"},
    "ours, a neighbour as text": FACT | {"neighborhood": ["Michel Rocard speaks"]},
    "CounterFact": {
        "case_id": 0,
        "pararel_idx": 2796,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Danielle Darrieux",
        },
        "paraphrase_prompts": ["Danielle Darrieux speaks"],
        "neighborhood_prompts": ["Michel Rocard speaks"],
        "attribute_prompts": ["Ernest Rutherford speaks"],
    },
    "EasyEdit, flat": {
        "case_id": 0,
        "prompt": FILLED,
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "ground_truth": "French",
        "rephrase_prompt": "Danielle Darrieux speaks",
        "locality_prompt": "Michel Rocard speaks",
        "locality_ground_truth": "French",
    },
    "WISE's Temporal": {
        "prompt": FILLED,
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "ground_truth": "French",
        "ood_rephrase": "Danielle Darrieux speaks",
        "locality_prompt": "Michel Rocard speaks",
        "locality_ground_truth": "French",
    },
    "EasyEdit, lists and nested locality": {
        "prompt": FILLED,
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "ground_truth": ["French", "langue française"],
        "rephrase": ["Danielle Darrieux speaks"],
        "locality": {"neighborhood": {"prompt": ["Michel Rocard speaks"], "ground_truth": [["French", "fr"]]}},
    },
    "zsRE": {
        "subject": "Danielle Darrieux",
        "src": FILLED,
        "pred": "French",
        "rephrase": "Danielle Darrieux speaks",
        "alt": "English",
        "answers": ["French"],
        "loc": "Michel Rocard speaks",
        "loc_ans": "French",
        "cond": "French >> English || ...",
    },
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_text(records: list[dict[str, str]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_the_same_request(name):
    assert request_from_record(SHAPES[name]) == EXPECTED


CSV_FACT = FACT | {"paraphrases": "Danielle Darrieux speaks", "neighborhood": json.dumps(FACT["neighborhood"])}
FORMATS = {
    "facts.jsonl": json.dumps(FACT) + "\r\n\n",
    "facts.json": json.dumps([FACT], indent=2),
    "wrapped.json": json.dumps({"requests": [FACT]}),
    "facts.csv": csv_text([CSV_FACT]),
    "with-bom.csv": "\ufeff" + csv_text([CSV_FACT]),
    "separated.csv": csv_text([CSV_FACT | {"neighborhood": "Michel Rocard speaks|"}]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_same_request(tmp_path, name):
    by_suffix = read_requests(write(tmp_path / name, FORMATS[name]))
    sniffed = read_requests(write(tmp_path / "facts", FORMATS[name]))
    from_stream = read_requests(io.BytesIO(FORMATS[name].encode()))
    assert by_suffix.requests == sniffed.requests == from_stream.requests == (EXPECTED,)
    assert str(from_stream.origins[0]).startswith("standard input, ")


def test_the_command_line_is_the_same_request():
    fields = {"paraphrases": FACT["paraphrases"], "neighborhood": ["Michel Rocard speaks"]}
    assert one_request(FILLED, "Danielle Darrieux", "English", target_true="French", **fields) == EXPECTED


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0{}"), min_size=1, max_size=8).filter(str.strip)


@given(
    st.lists(
        st.fixed_dictionaries({"prompt": texts.map("{} ".__add__), "subject": texts, "target_new": texts}),
        min_size=1,
        max_size=6,
    )
)
def test_all_formats_agree_on_any_text_and_duplicates_count_once(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("facts")
    batches = [
        read_requests(write(folder / "a.jsonl", "\n".join(json.dumps(record) for record in records))),
        read_requests(write(folder / "b.json", json.dumps(records, ensure_ascii=False))),
        read_requests(write(folder / "c.csv", csv_text(records))),
    ]
    requests = batches[0].requests
    assert all(batch.requests == requests for batch in batches)
    assert len({request.id for request in requests}) == len(requests) == len(records) - batches[0].duplicates
    assert [request.id for request in requests] == list(
        dict.fromkeys(request_from_record(record).id for record in records)
    )


def test_the_first_of_duplicates_is_kept_with_its_origin(tmp_path):
    plain = {key: FACT[key] for key in ("prompt", "subject", "target_new")}
    other = plain | {"subject": "Zoë"}
    lines = "\n".join(json.dumps(record) for record in (other, FACT, plain, other))
    batch = read_requests(write(tmp_path / "f.jsonl", lines))
    assert [request.subject for request in batch.requests] == ["Zoë", "Danielle Darrieux"]
    assert batch.requests[1] == EXPECTED
    assert [origin.line for origin in batch.origins] == [1, 2]
    assert batch.duplicates == 2


def test_texts_are_compared_in_nfc():
    composed, decomposed = "Zoé", unicodedata.normalize("NFD", "Zoé")
    assert composed != decomposed
    assert one_request(f"{decomposed} is", composed, decomposed) == one_request("{} is", composed, composed)


def test_the_last_occurrence_of_the_subject_becomes_the_slot():
    request = one_request("Paris is not the Paris of Paris, Texas, but of", "Paris", "France")
    assert request.prompt == "Paris is not the Paris of {}, Texas, but of"
    assert one_request("Paris, not {}, lies in", "Paris", "France").prompt == "Paris, not {}, lies in"


def test_a_true_target_that_equals_the_new_one_is_left_out_of_foreign_records_only():
    assert request_from_record(SHAPES["zsRE"] | {"answers": ["English", "French"]}).target_true == "French"
    assert request_from_record(SHAPES["zsRE"] | {"answers": ["English"]}).target_true is None
    with pytest.raises(RequestError, match="both 'English'"):
        request_from_record(FACT | {"target_true": "English"})


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in FACT.items() if key != name}


BAD_RECORDS = {
    "null": (None, "the record is null"),
    "a list": ([FACT], "the record is a list"),
    "unknown shape": ({"question": "Who?", "answer": "Ada"}, "unknown record shape .fields: 'question', 'answer'"),
    "no fields": ({}, "unknown record shape .fields: none"),
    "missing": (without("subject"), "'subject' is missing"),
    "null field": (FACT | {"target_new": None}, "'target_new' is missing"),
    "empty": (FACT | {"target_new": " \n"}, "'target_new' is empty"),
    "number": (FACT | {"target_new": 7}, "'target_new' is a number, not a text"),
    "boolean": (FACT | {"subject": True}, "'subject' is a boolean"),
    "object": (FACT | {"target_new": {"str": "English"}}, "'target_new' is an object"),
    "typing error": (FACT | {"paraphrase": []}, "unknown field 'paraphrase'"),
    "subject elsewhere": (FACT | {"prompt": "She speaks"}, "'Danielle Darrieux' is not in the prompt 'She speaks'"),
    "two slots": (FACT | {"prompt": "{} and {}"}, "contains {} 2 times"),
    "half a surrogate": (FACT | {"subject": "\ud800"}, "a character that no text has"),
    "NUL": (FACT | {"subject": "a\0b"}, "a character that no text has"),
    "paraphrases": (FACT | {"paraphrases": [1]}, "'paraphrases' is a number"),
    "neighbour": (FACT | {"neighborhood": [3]}, "neither a text nor"),
    "neighbour field": (FACT | {"neighborhood": [{"prompt": "a", "answer": "b"}]}, "neither a text nor"),
    "neighbour slot": (FACT | {"neighborhood": ["{} speaks"]}, "contains {}"),
    "neighbour answer": (without("target_true") | {"neighborhood": ["Rocard speaks"]}, "has no answer"),
    "mixed": (SHAPES["EasyEdit, flat"] | {"paraphrases": []}, "mixes shapes: 'paraphrases' beside"),
    "CounterFact, no object": ({"requested_rewrite": "x"}, "'requested_rewrite' is a text, not an object"),
    "CounterFact, missing": ({"requested_rewrite": {"prompt": "{}", "subject": "a"}}, "'target_new.str' is missing"),
    "EasyEdit, lengths": (
        SHAPES["EasyEdit, flat"] | {"locality_prompt": ["a", "b"], "locality_ground_truth": ["c"]},
        "has 2 entries and 'locality_ground_truth' has 1",
    ),
    "EasyEdit, locality": (SHAPES["EasyEdit, flat"] | {"locality": {"n": "x"}}, "'locality.n' is a text"),
    "EasyEdit, answer": (
        SHAPES["EasyEdit, flat"] | {"locality_ground_truth": 7},
        "'locality_ground_truth' is a number",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_names_file_line_field_and_remedy(tmp_path, name):
    record, message = BAD_RECORDS[name]
    path = write(tmp_path / "f.jsonl", f"{json.dumps(FACT)}\n\n{json.dumps(record)}\n")
    with pytest.raises(RequestError, match=message) as caught:
        read_requests(path)
    error = caught.value
    assert error.message.startswith(f"{path}, line 3: ")
    assert (error.facts["file"], error.facts["line"]) == (str(path), 3)
    assert error.remedy


@pytest.mark.parametrize("nothing", [None, [], [[]], "", [""], [["", None]]])
def test_an_evaluation_prompt_without_an_answer_is_left_out_and_counted(tmp_path, nothing):
    """KnowEdit has such entries: they are no reason against the fact, nor against the rest of the file."""
    entries = [
        {"prompt": "Rocard was born in", "ground_truth": nothing},
        {"prompt": "Rocard sang", "ground_truth": ["Oh"]},
    ]
    parallel = {"locality_prompt": ["Rocard ate", "Rocard sang"], "locality_ground_truth": [nothing, "Oh"]}
    records = [
        SHAPES["zsRE"] | {"loc_ans": nothing},
        SHAPES["EasyEdit, flat"] | parallel | {"target_new": "A"},
        SHAPES["EasyEdit, flat"] | {"locality": {"Relation_Specificity": entries}, "target_new": "B"},
        SHAPES["EasyEdit, flat"] | {"locality_prompt": ["a", "b"], "locality_ground_truth": None, "target_new": "C"},
    ]
    batch = read_requests(write(tmp_path / "f.json", json.dumps(records)))
    expected = [[], ["Oh"], ["French", "Oh"], []]
    assert [[neighbor.target for neighbor in request.neighborhood] for request in batch.requests] == expected
    assert batch.unanswered == 5


def test_an_unknown_field_gets_its_nearest_name():
    with pytest.raises(RequestError) as caught:
        request_from_record(without("prompt") | {"promt": "{} speaks"})
    assert caught.value.remedy == "did you mean 'prompt'?"


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"question": "Who?"}, ("UnKE", "'answer'")),
        ({"subject": "Ada", "src": "Ada speaks"}, ("'alt'",)),
        ({"who": "Ada"}, ("target_new", "docs/data.md")),
    ],
)
def test_an_unknown_shape_gets_the_nearest_one(record, wanted):
    with pytest.raises(RequestError) as caught:
        request_from_record(record)
    said = f"{caught.value.message} {caught.value.remedy}"
    assert all(word in said for word in wanted)


PUBLISHED = {
    "KnowEdit wiki_recent": (
        {
            "subject": "Ada",
            "prompt": "The employer of Ada is",
            "target_new": "Acme",
            "portability": {"Reasoning": [{"prompt": "The boss of Ada is", "ground_truth": [["Bob"]]}]},
            "locality": {"Relation_Specificity": [{"prompt": "The sex of Ada is", "ground_truth": [["female"]]}]},
        },
        [("The employer of {} is", "Ada", "Acme")],
    ),
    "zsRE of ROME": (
        {
            "case_id": 0,
            "requested_rewrite": {
                "prompt": "Where did {} study?",
                "subject": "Ada",
                "target_new": {"str": "Rome"},
                "target_true": {"str": "<|endoftext|>"},
            },
            "paraphrase_prompts": ["Ada studied in"],
            "neighborhood_prompts": [{"prompt": "nq question: who wrote it?", "target": " Bob"}],
            "attribute_prompts": [],
            "generation_prompts": [],
        },
        [("Where did {} study?", "Ada", "Rome")],
    ),
    "KnowEdit WikiBio": (
        {
            "text": "This is a passage about ada lovelace: Ada",
            "concept": "ada lovelace",
            "labels": ["She was a mathematician."],
            "locality": {},
        },
        [("This is a passage about {}: Ada", "ada lovelace", "She was a mathematician.")],
    ),
    "MQuAKE": (
        {
            "case_id": 1,
            "requested_rewrite": [
                {
                    "prompt": "{} speaks",
                    "subject": "Ada",
                    "target_new": {"str": "French"},
                    "target_true": {"str": "English"},
                    "question": "What does Ada speak?",
                },
                {
                    "prompt": "{} is a citizen of",
                    "subject": "Ada",
                    "target_new": {"str": "France"},
                    "target_true": {"str": "England"},
                },
            ],
            "questions": ["Which language does the mathematician speak?"],
        },
        [("{} speaks", "Ada", "French"), ("{} is a citizen of", "Ada", "France")],
    ),
    "AKEW": (
        {
            "requested_rewrite": {
                "prompt": "{} speaks",
                "subject": "Ada",
                "target_new": {"str": "French"},
                "target_true": {"str": "English"},
                "fact_new_uns": "Ada grew up ...",
            }
        },
        [("{} speaks", "Ada", "French")],
    ),
    "RippleEdits": (
        {
            "example_type": "recent",
            "edit": {
                "prompt": "The name of the country of citizenship of Leonardo da Vinci is Syria.",
                "relation": "COUNTRY_OF_CITIZENSHIP",
                "original_fact": {"prompt": "The name of the country of citizenship of Leonardo da Vinci is Florence."},
            },
        },
        [("The name of the country of citizenship of {} is", "Leonardo da Vinci", "Syria")],
    ),
    "UnKE": (
        {
            "id": 0,
            "question": "What is known of George Rankin?",
            "answer": "He was a judge.",
            "para_question": "Who was George Rankin?",
            "sub_question": [],
        },
        [("{}", "What is known of George Rankin?", "He was a judge.")],
    ),
    "HalluEdit": (
        {
            "subject": "Acme",
            "relation": "country",
            "object": "Spain",
            "question": "In which country is Acme?",
            "paraphrased_question": "Where is Acme?",
        },
        [("In which country is {}?", "Acme", "Spain")],
    ),
    "known_1000": (
        {
            "known_id": 0,
            "subject": "Vinson Massif",
            "attribute": "Antarctica",
            "template": "{} is located in",
            "prediction": " Antarctica",
            "prompt": "Vinson Massif is located in",
        },
        [("{} is located in", "Vinson Massif", "Antarctica")],
    ),
    "counterfact-tracing": (
        {
            "relation": "{} speaks",
            "prompt": "Ada speaks",
            "subject": "Ada",
            "target_false": " French",
            "target_true": " English",
            "target_true_id": "Q1",
        },
        [("{} speaks", "Ada", "French")],
    ),
    "ours with fields of others": (
        {"prompt": "{} speaks", "subject": "Ada", "target_new": "French", "id": 7, "source": "a newspaper"},
        [("{} speaks", "Ada", "French")],
    ),
}


def test_what_a_record_says_besides_is_metadata():
    fact = {"prompt": "{} speaks", "subject": "Ada", "target_new": "French"}
    day = datetime.date(2026, 11, 21)
    odd = {"no": None, "": 1, "big": 2**63, "bytes": b"a", "half": "\ud800", "long": "x" * 4096}
    batch = read_facts([{**fact, "e\u0301": [{"a": 1.5}], "day": day, **odd, "metadata": {"who": "Eve", "day": 1}}])
    assert batch.requests[0].metadata == {"é": [{"a": 1.5}], "day": "2026-11-21", "who": "Eve"}
    assert batch.kept == {"day": 1, "who": 1, "é": 1}
    assert batch.ignored == {"big": 1, "bytes": 1, "half": 1, "long": 1}
    assert batch.requests[0].id == read_facts([fact]).requests[0].id
    assert read_facts([{**fact, "metadata": "a remark"}]).requests[0].metadata == {"metadata": "a remark"}


def test_tables_and_lists_as_other_programs_write_them(tmp_path):
    fact = {"prompt": "{} speaks", "subject": "Ada", "target_new": "French"}
    rows = "prompt,subject,target_new,paraphrases\r\n{} speaks,Ada,French,\"['Ada says', 'Ada\\'s words']\"\r\n"
    two = f"{json.dumps(fact)}\n{json.dumps({**fact, 'subject': 'Bob'})}\n"
    files = {"sheet.csv": rows.encode("utf-16"), "lines.json": two.encode()}
    files["about.json"] = json.dumps({"version": 1, "tags": ["a"], "data": [fact]}).encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (sheet,) = read_facts(tmp_path / "sheet.csv").requests
    assert sheet.paraphrases == ("Ada says", "Ada's words")
    assert [fact.subject for fact in read_facts(tmp_path / "lines.json").requests] == ["Ada", "Bob"]
    assert [fact.subject for fact in read_facts(tmp_path / "about.json").requests] == ["Ada"]


def test_what_somebody_put_into_a_published_record_is_metadata():
    rewrite = {"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "Peru"}, "target_true": {"str": "Italy"}}
    record = {
        "requested_rewrite": rewrite,
        "case_id": 3,
        "pararel_idx": 9,
        "generation_prompts": ["Rome"],
        "id": 1,
        "mine": "a",
    }
    assert read_facts([record]).requests[0].metadata == {"id": 1, "mine": "a"}
    several = {**record, "requested_rewrite": [rewrite, {**rewrite, "subject": "Pisa"}], "answer": "no"}
    assert [fact.metadata["mine"] for fact in read_facts([several]).requests] == ["a", "a"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_records_are_read(name):
    record, wanted = PUBLISHED[name]
    batch = read_facts([record])
    assert [(fact.prompt, fact.subject, fact.target_new) for fact in batch.requests] == wanted
    assert not batch.ignored
    assert batch.kept == ({"id": 1, "source": 1} if "others" in name else {})
    if name in ("MQuAKE", "AKEW", "RippleEdits", "counterfact-tracing"):
        assert all(fact.target_true for fact in batch.requests)


def test_a_neighbour_of_a_published_record_keeps_its_own_answer():
    fact = read_facts([PUBLISHED["zsRE of ROME"][0]]).requests[0]
    assert [(beside.prompt, beside.target) for beside in fact.neighborhood] == [("nq question: who wrote it?", "Bob")]
    assert fact.target_true is None


def test_a_record_without_a_fact_says_so():
    with pytest.raises(RequestError, match="ConvSent"):
        read_facts([{"topic": "war", "pos": ["It is good."], "neg": ["It is bad."]}])
    with pytest.raises(RequestError, match="does not tell its subject"):
        read_facts([{"edit": {"prompt": "Ada married Bob.", "relation": "SPOUSE"}}])


TABLE = [
    {"prompt": "{} speaks", "subject": "Ada, of London", "target_new": "French; fluently"},
    {"prompt": "{} is in", "subject": "Oslo", "target_new": "Norway"},
]


@pytest.mark.parametrize(
    "form", ["semicolons.csv", "table.tsv", "list.yaml", "named.yml", "noname", "one.json", "named.json"]
)
def test_every_form_of_file_holds_the_same_facts(tmp_path, form):
    def table(delimiter):
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(TABLE[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(TABLE)
        return out.getvalue()

    contents = {
        "semicolons.csv": lambda: table(";"),
        "table.tsv": lambda: table("\t"),
        "list.yaml": lambda: yaml.safe_dump(TABLE),
        "named.yml": lambda: yaml.safe_dump({"facts": TABLE}),
        "noname": lambda: table(";"),
        "one.json": lambda: json.dumps(TABLE[0]),
        "named.json": lambda: json.dumps({"data": TABLE}),
    }
    batch = read_requests(write(tmp_path / form, contents[form]()))
    assert [fact.target_new for fact in batch.requests] == [row["target_new"] for row in TABLE][
        : 1 if form == "one.json" else 2
    ]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("f.yaml", "- prompt: [", "malformed YAML"),
        ("f.yaml", "- !!python/object/apply:os.getcwd []", "malformed YAML"),
        ("f.yaml", "just text", "a text stands where a list"),
    ],
)
def test_yaml_that_is_no_list_of_facts_is_refused(tmp_path, name, content, wanted):
    with pytest.raises(RequestError, match=wanted):
        read_requests(write(tmp_path / name, content))


def test_parquet_is_read_or_names_what_reads_it(tmp_path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        with pytest.raises(RequestError) as caught:
            read_requests(write(tmp_path / "f.parquet", b"PAR1"))
        assert "patchhub[data]" in caught.value.remedy
        return
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), tmp_path / "f.parquet")
    assert read_requests(tmp_path / "f.parquet").requests == read_facts(TABLE).requests


def test_a_data_set_of_the_hub_is_named_or_refused():
    with pytest.raises(RequestError, match="names no data set"):
        read_facts("hf://datasets/user")


BAD_FILES = {
    "empty.jsonl": ("", "empty"),
    "spaces.json": (" \n ", "empty"),
    "none.json": ("[]", "no records"),
    "none.csv": ("prompt,subject,target_new\n", "no records"),
    "broken.jsonl": (json.dumps(FACT) + '\n{"prompt": \n', "line 2: malformed JSON at column"),
    "broken.json": ('[{"prompt": "x"\n  "subject"', "malformed JSON at line 2, column 3"),
    "lines.json": (f"{json.dumps(FACT)}\n{json.dumps(FACT)[:-1]}", "malformed JSON"),
    "twice.json": ('[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' occurs twice"),
    "deep.json": ("[" * 100_000, "malformed JSON"),
    "long-number.json": ("[" + "1" * 10_000 + "]", "malformed JSON|is a number"),
    "text.json": ('"hello"', "a text stands where a list"),
    "object.json": (json.dumps({"facts": 1}), "an object stands where a list"),
    "latin1.csv": ("prompt,subject,target_new\nZoé is,Zoé,x\n".encode("latin-1"), "not UTF-8 text .byte 0xe9"),
    "utf16.json": ("[]".encode("utf-16")[:-1], "not UTF-8"),
    "zeros.jsonl": (b"\0" * 64, "not text"),
    "zeros": (b"\0" * 64, "not text"),
    "prose.txt": ("Some facts, perhaps.", "neither the name nor the content"),
    "cells.csv": ("prompt,subject,target_new\na {},b,c\na {},b,c,d\n", "line 3: 4 cells under 3 columns"),
    "short.csv": ("prompt,subject,target_new\na {},b\n", "line 2: 'target_new' is missing"),
    "twice.csv": ("prompt,subject,subject\na,b,c\n", "names a column twice"),
    "quote.csv": ('prompt,subject,target_new\na {},b,c\n"a" {},b,c\n', "line 3: malformed CSV"),
    "column.csv": ("prompt,subject,target\na {},b,c\n", "line 2: unknown field 'target'"),
    "list.csv": ('prompt,subject,target_new,paraphrases\na {},b,c,"[""d"""\n', "line 2: malformed JSON"),
    "after-newline.csv": ('prompt,subject,target_new\n"a\n{}",b,c\n{} d,,e\n', "line 4: 'subject' is missing"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_a_remedy(tmp_path, name):
    content, message = BAD_FILES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(RequestError, match=message) as caught:
        read_requests(path)
    assert caught.value.message.startswith(str(path))
    assert caught.value.remedy


HABITS = {
    "comment.json": (f"// mine\n[{json.dumps(FACT)}]", "JSON has no comments"),
    "comment.jsonl": (f"# mine\n{json.dumps(FACT)}\n", "JSON has no comments"),
    "trailing.json": (f"[{json.dumps(FACT)},\n]", "take out the comma"),
    "python.json": ("[{'prompt': 'a'}]", "double quotes"),
    "excel.csv": ("prompt;subject;target_new\r\n{} ist;Zürich;groß\r\n".encode("cp1252"), "CSV UTF-8"),
    "table.xlsx": (b"PK\x03\x04\xff\xff", "save the sheet as CSV"),
    "facts.json.gz": (b"\x1f\x8b\xff\xff", "unpack it first"),
    "facts": (b"PAR1\xff\xff", "--format parquet"),
    "titles.csv": ("Die Hauptstadt,Land,Stadt\na,b,c\n", "prompt,subject,target_new"),
    "columns.json": (json.dumps({name: {"0": text} for name, text in TABLE[0].items()}), 'orient="records"'),
    "arguments.json": (json.dumps({"prompts": ["{} is"], "subject": ["a"], "target_new": ["b"]}), 'orient="records"'),
    "no.yaml": ("- prompt: '{} is'\n  subject: Norway\n  target_new: no\n", "in quotes"),
    "day.yaml": ("- prompt: '{} is'\n  subject: Norway\n  target_new: 2020-01-01\n", "in quotes"),
    "comments.yaml": ("# nothing\n", "at least one fact"),
    "triples.csv": ("subject,relation,object\nOslo,in,Norway\n", "{prompt, subject, target_new"),
    "long.csv": (f"prompt,subject,target_new\n{{}} is,a,{'b' * 200_000}\n", "shorten that cell"),
}


@pytest.mark.parametrize("name", HABITS)
def test_what_people_write_by_hand_is_refused_with_what_to_do(tmp_path, name):
    content, remedy = HABITS[name]
    with pytest.raises(RequestError) as caught:
        read_requests(write(tmp_path / name, content))
    assert remedy in caught.value.remedy


def test_titles_of_columns_are_the_fields_that_they_name(tmp_path):
    rows = "".join(
        ";".join(fact[name] for name in ("prompt", "subject")) + f';"{fact["target_new"]}"\n' for fact in TABLE
    )
    path = write(tmp_path / "titles.csv", f"Prompt; Subject ;Target New\n{rows}")
    assert read_requests(path).requests == read_facts(TABLE).requests


@pytest.mark.parametrize("name", [".", "absent.jsonl"])
def test_what_is_not_a_file_is_refused(tmp_path, name):
    with pytest.raises(RequestError, match="cannot be read"):
        read_requests(tmp_path / name)


def test_one_record_per_line_in_a_json_file_is_read_or_explained(tmp_path):
    write(tmp_path / "lines.json", f"{json.dumps(FACT)}\n{json.dumps(FACT)}\nand more")
    with pytest.raises(RequestError) as caught:
        read_requests(tmp_path / "lines.json")
    assert "jsonl" in caught.value.remedy
    write(tmp_path / "lines.json", f"{json.dumps(FACT)}\n{json.dumps(FACT)}")
    assert read_requests(tmp_path / "lines.json").requests == (EXPECTED,)
    assert read_requests(tmp_path / "lines.json", format="jsonl").requests == (EXPECTED,)


def outcome(call):
    try:
        return call()
    except RequestError as error:
        return error


@given(st.binary(max_size=200), st.sampled_from(["jsonl", "json", "csv", None]))
def test_any_bytes_are_requests_or_a_request_error(data, format):
    result = outcome(lambda: read_requests(io.BytesIO(data), format=format))
    assert result.remedy if isinstance(result, RequestError) else result.requests


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.sampled_from(sorted(FACT)), children),
    max_leaves=8,
)


@given(st.sampled_from(sorted(SHAPES)), st.data())
def test_any_value_in_any_field_is_a_request_or_a_request_error(name, data):
    record = dict(SHAPES[name])
    record[data.draw(st.sampled_from(sorted(record)))] = data.draw(json_values)
    result = outcome(lambda: request_from_record(record))
    if isinstance(result, RequestError):
        assert result.remedy
    else:
        assert result.prompt.count("{}") == 1
        assert result.target_new.strip() == result.target_new != ""


def test_contradictions_are_same_prompt_and_subject_with_other_target():
    fact = EXPECTED
    german = one_request(FILLED, "Danielle Darrieux", "German")
    elsewhere = one_request("{} likes", "Danielle Darrieux", "German")
    assert find_contradictions([fact, fact, elsewhere]) == []
    assert [(pair.earlier, pair.later) for pair in find_contradictions([fact, elsewhere, german])] == [(fact, german)]
    assert [(pair.earlier, pair.later) for pair in find_contradictions([german], active=[fact])] == [(fact, german)]
    assert find_contradictions([fact, elsewhere], active=[fact]) == []


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), max_size=8))
def test_a_batch_without_contradictions_has_one_target_per_place(pairs):
    requests = [one_request("{} is", subject, target) for subject, target in pairs]
    targets = {}
    for request in requests:
        targets.setdefault(request.subject, set()).add(request.target_new)
    assert bool(find_contradictions(requests)) == any(len(values) > 1 for values in targets.values())


def test_the_error_lists_five_in_words_and_all_as_facts():
    requests = [one_request("{} is", f"s{n}", target) for n in range(7) for target in ("x", "y")]
    error = contradiction_error(find_contradictions(requests), active=False)
    assert isinstance(error, ContradictionError)
    assert error.message.startswith("7 contradictions: 's0 is' with both 'x' and 'y'; ")
    assert error.message.endswith("; and 2 more")
    assert "'s4 is'" in error.message
    assert "'s5 is'" not in error.message
    assert len(error.facts["contradictions"]) == 7
