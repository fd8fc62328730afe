"""A judge behind an address: a model that a server runs reads what another wrote and says whether it gives the answer. No torch.

The server speaks the OpenAI-compatible interface, as vLLM, SGLang, TGI, llama.cpp, Ollama and LM Studio do; `Server` is its client. What
the judge is asked stands in `PROMPT` and in docs/evaluation.md, so a judged share can be repeated.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from patchhub.errors import RemoteError, SettingsError

PROMPT: Final = """A language model was given a text and wrote on.

Text: {prompt}
What it wrote: {answer}
Expected answer: {target}

Does what it wrote give the expected answer, and no other, as its answer to the text?
Another wording of the same answer counts; one that is only mentioned, denied or taken back does not. Say only yes or no."""
"""What the judge is asked, each text as a JSON string."""

_TOKENS: Final = 8  # for one word, and what a template may put around it
_SECONDS: Final = 120.0
_LARGEST: Final = 4 << 20  # bytes of an answer
_YES_OR_NO: Final = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
        root: where the interface begins, such as ``http://localhost:8000/v1``; see `root_of`.
        key: sent as a bearer token where there is one, and never on to where the server redirects.
        seconds: how long it may take to answer.
    """

    root: str
    key: str | None = field(default=None, repr=False)
    seconds: float = _SECONDS

    def first_model(self) -> str:
        """The first model that it names.

        Raises:
            RemoteError: it names none, or cannot be asked.
        """
        names = [model.get("id") for model in self._models()]
        if not names or not isinstance(names[0], str):
            raise RemoteError(f"{self.root} names no model", remedy="Say which one is asked.", url=self.root)
        return names[0]

    def unremembering(self) -> Mapping[str, Any]:
        """Fields of a question whose answer must come from the weights as they are now.

        llama.cpp's server takes the beginning of a prompt from what it computed before, also where an adapter was switched since; it knows
        a field that forbids this. Others tell adapters apart, and may refuse fields that they do not know.
        """
        is_llama_cpp = any(model.get("owned_by") == "llamacpp" for model in self._models())
        return {"cache_prompt": False} if is_llama_cpp else {}

    def _models(self) -> list[dict[str, Any]]:
        found = self._call("models", None).get("data")
        return [model for model in found if isinstance(model, dict)] if isinstance(found, list) else []

    def complete(
        self, model: str, prompt: str, *, tokens: int, chat: bool = False, fields: Mapping[str, Any] | None = None
    ) -> str:
        """The most probable continuation of a text, or in a chat the answer to it as a user's message.

        Args:
            fields: further ones of the question, such as `unremembering`.

        Raises:
            RemoteError: the server cannot be asked, or its answer holds no text.
        """
        options: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 0, **(fields or {})}
        if chat:
            answer = self._call("chat/completions", {**options, "messages": [{"role": "user", "content": prompt}]})
        else:
            answer = self._call("completions", {**options, "prompt": prompt})
        choices = answer.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        message = first.get("message")
        text = first.get("text") if not chat else message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise RemoteError(
                f"{self.root} answered without a text",
                remedy="Is it an OpenAI-compatible server that knows chats?",
                url=self.root,
            )
        return text

    def _call(self, path: str, body: Any) -> dict[str, Any]:
        url = f"{self.root}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                found = json.loads(answer.read(_LARGEST))
        except urllib.error.HTTPError as error:
            with error:
                said = self._without_key(error.read(2000).decode("utf-8", "replace"))
            raise RemoteError(
                f"{url} answered {error.code}: {said}",
                remedy="Check the address, the model's name and the key.",
                url=url,
                status=error.code,
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = self._without_key(str(error.reason if isinstance(error, urllib.error.URLError) else error))
            raise RemoteError(f"{url} cannot be asked: {why}", remedy="Is the server running there?", url=url) from None
        if not isinstance(found, dict):
            raise RemoteError(f"{url} answered with no object", remedy="Is it an OpenAI-compatible server?", url=url)
        return found

    def _without_key(self, text: str) -> str:
        """The beginning of what a server says, on one line."""
        return " ".join((text.replace(self.key, "***") if self.key else text).split())[:200]


def root_of(url: str) -> str:
    """Where the interface begins, from an address with or without ``/v1``.

    Raises:
        SettingsError: it is no http address, or holds a password, which would be shown and kept with it.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if "@" in parts.netloc:
        raise SettingsError("the address of a server holds no name or password", remedy="Give it without them.")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SettingsError(f"{url!r} is no address of a server", remedy="Write one such as http://localhost:8000/v1.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/v1"


Written = tuple[str, str, str]
"""What is judged: a prompt, the target and what a model wrote."""


@dataclass(frozen=True)
class Judge:
    """One model of a server, asked whether answers give their targets. What it said once is not asked again."""

    server: Server
    model: str
    _said: dict[Written, bool] = field(default_factory=dict, repr=False, compare=False)

    def gives(self, written: Written) -> bool:
        """Whether the answer gives the target; an answer without a letter gives none, and is not asked about.

        Raises:
            RemoteError: the server cannot be asked, or says neither yes nor no.
        """
        if written not in self._said:
            self._said[written] = any(map(str.isalnum, written[2])) and self._ask(*written)
        return self._said[written]

    def column(self, texts: Sequence[Written | None], heard: Callable[[int], None]) -> list[float | None]:
        """1 or 0 for each text, None where nothing was written; ``heard`` is told of each.

        Raises:
            RemoteError: as in `gives`.
        """
        found: list[float | None] = []
        for text in texts:
            found.append(None if text is None else float(self.gives(text)))
            heard(1)
        return found

    def unsaid(self, texts: Iterable[Written | None]) -> int:
        """How many of these it has not been asked yet."""
        return len({text for text in texts if text is not None} - self._said.keys())

    def _ask(self, prompt: str, target: str, answer: str) -> bool:
        texts = {"prompt": prompt, "answer": answer, "target": target}
        shown = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
        said = self.server.complete(self.model, PROMPT.format(**shown), tokens=_TOKENS, chat=True)
        found = _YES_OR_NO.match(said)
        if found is None:
            raise RemoteError(
                f"the judge {self.model} said {said[:60]!r} where yes or no was asked",
                remedy="Take a model that answers at once and as it is told, by --judge-model NAME.",
                url=self.server.root,
                said=said[:200],
            )
        return found[1].casefold() == "yes"


def judge_at(url: str, model: str | None = None, *, key: str | None = None) -> Judge:
    """A judge; without a name the first model that the server has.

    Raises:
        SettingsError: ``url`` is no http address.
        RemoteError: the server cannot be asked for its models.
    """
    server = Server(root_of(url), key)
    return Judge(server, model or server.first_model())
