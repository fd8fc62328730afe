"""The page as a file: whatever the texts are, they stay data, and nothing on the page can be loaded or run but its own script."""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchhub.porcelain.report.report import data_block, is_page, render

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>\u2028\u2029\u0000",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "$data ${title} %s {}",
    "\u202eright to left",
]
texts = st.text() | st.sampled_from(HOSTILE)


class Elements(HTMLParser):
    """Every element with its attributes, and the raw text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.found if name == tag]


@given(
    st.recursive(
        texts | st.integers() | st.booleans() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(texts, inner)
    )
)
def test_data_is_what_it_was_and_holds_no_markup(document: Any) -> None:
    text = data_block(document)
    assert json.loads(text) == document
    assert not set(text) & set("<>&\u2028\u2029")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_adds_no_element(text: str) -> None:
    plain, hostile = (Elements(render({"texts": [one]}, title=one).decode()) for one in ("plain", text))
    assert [tag for tag, _, _ in hostile.found] == [tag for tag, _, _ in plain.found]
    assert hostile.all("title")[0][1].replace("\u0000", "") == text.replace("\u0000", "")
    data = next(content for attributes, content in hostile.all("script") if attributes.get("id") == "data")
    assert json.loads(data) == {"texts": [text]}


def test_the_policy_allows_this_style_and_this_script_alone() -> None:
    page = Elements(render({}, title="title").decode())
    policy = next(a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    script = next(content for attributes, content in page.all("script") if attributes.get("type") is None)
    for name, content in (("script-src", script), ("style-src", page.all("style")[0][1])):
        assert rules[name] == f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
    assert rules["default-src"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"


def test_nothing_is_loaded_and_no_handler_is_inline() -> None:
    page = Elements(render({}, title="title").decode())
    for _, attributes, _ in page.found:
        assert all(not name.startswith("on") and name not in ("style", "srcset", "action") for name in attributes)
        assert str(attributes.get("src", "#")).startswith("#")
        assert str(attributes.get("href", "#")).startswith(("#", "data:,"))
    assert "url(" not in page.all("style")[0][1]


def test_every_name_that_the_script_asks_for_is_on_the_page() -> None:
    page = Elements(render({}, title="title").decode())
    script = next(content for attributes, content in page.all("script") if attributes.get("type") is None)
    asked = {part.split('"')[0] for part in script.split('byId("')[1:]}
    made = {"commit-title"}
    assert asked - made <= {str(attributes.get("id")) for _, attributes, _ in page.found}


def test_a_page_knows_itself(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_bytes(render({}, title="title"))
    assert is_page(file)
    file.write_text("<!doctype html><p>my own page</p>", encoding="utf-8")
    assert not is_page(file)
