"""One self-contained HTML page from a document of JSON: template, style, script and data in one file that loads nothing.

The texts on the page are user input. They are in the file only as JSON inside a data block, with every character that could end the block
escaped, and the script puts them on the page as text nodes. The page's policy allows this style and this script alone, by their hashes, and
no connection; `require-trusted-types-for` has the browser refuse any assignment of markup."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final

_SCRIPTS: Final = (
    "elements.js",
    "plots.js",
    "history.js",
    "facts.js",
    "scores.js",
    "weights.js",
    "overlaps.js",
    "guard.js",
    "main.js",
)
_POLICY: Final = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
_UNSAFE: Final = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
GENERATOR: Final = '<meta name="generator" content="patchhub report">'


def render(document: Mapping[str, Any], *, title: str) -> bytes:
    """The page of a document as UTF-8; the same bytes for the same document.

    Raises:
        ValueError: the document is not JSON.
    """
    style = _part("page.css")
    script = "\n".join(['"use strict";', *map(_part, _SCRIPTS)])
    page = Template(_part("page.html")).substitute(
        generator=GENERATOR,
        policy=_POLICY.format(script=_hash(script), style=_hash(style)),
        title=escape(title),
        style=style,
        data=data_block(document),
        script=script,
    )
    return page.encode()


def data_block(document: Any) -> str:
    """JSON that stays inside a script element, whatever strings it holds: no ``<``, so neither ``</script`` nor ``<!--``."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_UNSAFE)


def is_page(file: Path) -> bool:
    """Whether a file begins as a page of `render` does."""
    with open(file, "rb") as opened:
        return GENERATOR.encode() in opened.read(512)


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
