"""Measured by others: lm-evaluation-harness on models in memory (the extra ``patchhub[harness]``), and a judge behind an address. No torch.

The harness reads its tasks, asks the model through its own wrapper of transformers models and computes its own metrics and standard errors
(Gao et al., "A framework for few-shot language model evaluation"); here two runs of it, of the base and of a revision, stand beside each
other. Nothing of it is computed anew.

A judge is a model that a server runs: it reads what another wrote and says whether it gives the answer. The server speaks the
OpenAI-compatible interface, as vLLM, SGLang, TGI, llama.cpp, Ollama and LM Studio do; `Server` is its client. What the judge is asked
stands in `PROMPT` and in docs/evaluation.md, so a judged share can be repeated."""

from __future__ import annotations

import copy
import http.client
import json
import logging
import random
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from patchhub.errors import RemoteError, SettingsError
from patchhub.results import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INSTALL: Final = "Install it: `pip install 'patchhub[harness]'`."
_AT_ONCE: Final = 8  # texts in one forward pass

Reached = Mapping[tuple[str, str], tuple[float, float | None]]
"""By task and metric, the value and its standard error, where the harness gives one."""


@dataclass(frozen=True)
class HarnessRow(Result):
    """One metric of one task, of a revision beside the base.

    Attributes:
        metric: as the harness calls it, with its filter where that is not "none": `acc`, `exact_match,strict-match`.
        value, error: of the revision: the metric, and its standard error over the task's documents.
        base, base_error: the same of the base.
    """

    task: str
    metric: str
    value: float
    error: float | None
    base: float
    base_error: float | None

    @property
    def change(self) -> float:
        """The revision's value minus the base's."""
        return self.value - self.base


@dataclass(frozen=True)
class Harness:
    """What to run: a choice of the harness's tasks.

    Attributes:
        tasks: by name, group or tag.
        folder: where further tasks are described, as the harness's ``--include_path``.
        limit: at most so many documents of each task.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None

    def reached(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Reached:
        """Run the tasks on a model; it, the tokenizer and the random streams are left as they were.

        Raises:
            SettingsError: the harness is not installed, or a task cannot be read or run.
        """
        evaluator, wrapper, _ = _library()
        training = model.training
        try:
            with _quietly(), _kept_streams():
                # The harness gives the tokenizer a padding token, so it is handed its own.
                asked = wrapper(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=_AT_ONCE)
                found = evaluator.simple_evaluate(
                    model=asked,
                    tasks=list(self.tasks),
                    task_manager=self._known,
                    limit=self.limit,
                    log_samples=False,
                )
        except Exception as error:  # a task's file, template, code and data are others', and fail in ways of their own
            raise SettingsError(
                f"the harness cannot run {', '.join(self.tasks)}: {_beginning(error)}",
                remedy="Check the tasks' files, and that their data can be read here.",
            ) from error
        finally:
            model.train(training)
        return _numbers(found["results"])

    def check(self) -> None:
        """Refuse what cannot be run, before a model is put into memory.

        Raises:
            SettingsError: no harness, no task, or a task that it does not know.
        """
        missing = [task for task in self.tasks if not self._known.match_tasks([task])]
        if not self.tasks or missing:
            where = f", nor in {self.folder}" if self.folder else ""
            raise SettingsError(
                f"the harness knows no task {', '.join(missing) or 'without a name'}{where}",
                remedy="`lm-eval ls tasks` lists its tasks; --harness-path DIR names a folder with others.",
            )

    @cached_property
    def _known(self) -> Any:
        """The harness's list of tasks. Its own are thousands of files, so they are left out where the folder has all that are run."""
        if self.folder is not None and not self.folder.is_dir():
            raise SettingsError(f"{self.folder} is no folder of tasks", remedy="Give --harness-path a folder.")
        listed = _library()[2]
        with _quietly():
            if self.folder is None:
                return listed()
            own = listed(include_path=str(self.folder), include_defaults=False)
            return own if all(own.match_tasks([task]) for task in self.tasks) else listed(include_path=str(self.folder))


def beside(base: Reached, now: Reached) -> tuple[HarnessRow, ...]:
    """The metrics that both runs gave, in the order of the harness."""
    return tuple(
        HarnessRow(task, metric, *now[task, metric], *base[task, metric])
        for task, metric in now
        if (task, metric) in base
    )


def _library() -> tuple[Any, Any, Any]:
    """The harness's evaluator, its wrapper of transformers models, and its list of tasks."""
    try:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SettingsError("lm-evaluation-harness is not installed", remedy=_INSTALL) from error
    return evaluator, HFLM, TaskManager


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> Reached:
    """The numbers of the harness's results, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if metric.endswith("_stderr") or not chosen or not _is_number(value):
                continue
            error: Any = values.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else key
            found[task, name] = (float(value), float(error) if _is_number(error) else None)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _beginning(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _quietly() -> Iterator[None]:
    """What the harness prints and warns of is not heard: its table is printed here, and stdout may be JSON."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _kept_streams() -> Iterator[None]:
    """The random streams of the process, which the harness seeds, are put back afterwards."""
    import numpy as np
    import torch

    plain, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)


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
