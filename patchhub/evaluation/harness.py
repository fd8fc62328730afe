"""lm-evaluation-harness on models that are in memory: the extra ``patchhub[harness]``.

The harness reads its tasks, asks the model through its own wrapper of transformers models and computes its own metrics and standard errors
(Gao et al., "A framework for few-shot language model evaluation"); here two runs of it, of the base and of a revision, stand beside each
other. Nothing of it is computed anew.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchhub.errors import SettingsError
from patchhub.results import Result

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
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and isfinite(value)


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
    plain, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)
