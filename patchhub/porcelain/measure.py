"""`eval` and `bench`: how well a revision holds facts, what that costs elsewhere, and editors compared on one list of facts.

Definitions are in docs/evaluation.md. `bench` edits each branch of a temporary repository with one editor."""

from __future__ import annotations

import csv
import io
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

from patchhub.cache import METRIC
from patchhub.canonical import canonical_json, object_id
from patchhub.editing.editor import EDITORS
from patchhub.editing.requests import Batch, Origin
from patchhub.editing.shapes import ZSRE_FIELDS
from patchhub.errors import EditError, RemoteError, RequestError, SettingsError
from patchhub.evaluation import outside as judging
from patchhub.evaluation import suites
from patchhub.evaluation.guard import Fault
from patchhub.evaluation.live import check_contexts, live_scores
from patchhub.evaluation.outside import Harness, HarnessRow, Judge, Written, beside
from patchhub.evaluation.suites import Scores, drift_scores, fault_of, fluency_scores, scored
from patchhub.fsio import write_atomically
from patchhub.models.placement import Placement
from patchhub.objects import Metric, Note, Request, Text, requests_json
from patchhub.porcelain.commit import Committed, Writing, commit
from patchhub.porcelain.metric import compute
from patchhub.porcelain.refs import switch_to_new
from patchhub.porcelain.scores import BESIDE, DEFINITIONS, FIGURES, LEADING, SUITES, Noted, Score, notes_of, read_note
from patchhub.progress import Progress
from patchhub.results import Result, Rows, spreadsheet_cell, told
from patchhub.sets.settings import Contender
from patchhub.store.store import Store
from patchhub.who import Who
from patchhub.worktree.measuring import (
    BASE,
    CONTEXTS,
    FLUENCY_FACTS,
    FLUENCY_TOKENS,
    FLUENCY_TOP_K,
    Measured,
    Measurer,
    Questions,
)
from patchhub.worktree.metric import HELD
from patchhub.worktree.opening import base_files
from patchhub.worktree.recording import chosen_settings


@dataclass(frozen=True)
class Facts:
    """What to evaluate on.

    Attributes:
        requests: the facts, in their order.
        file: the name of the file that they are from.
        metrics: whose scores: counterfact, zsre or wise.
        limit: at most so many of them: the first, or with `seed` a random choice.
        seed: of that choice, of sampled text and of the intervals; None: the first facts, and 0.
        text: files to measure drift on; none: the text that the repository keeps aside, or samples.
        contexts: what live decoding puts the prompt into, beside the bare prompt: templates with one `{}`.
    """

    requests: tuple[Request, ...]
    file: str = ""
    metrics: str = "counterfact"
    limit: int | None = None
    seed: int | None = None
    text: tuple[Path, ...] = ()
    contexts: tuple[str, ...] = CONTEXTS

    @property
    def chosen(self) -> tuple[Request, ...]:
        if self.limit is None or self.limit >= len(self.requests):
            return self.requests
        if self.seed is None:
            return self.requests[: self.limit]
        places = sorted(random.Random(self.seed).sample(range(len(self.requests)), self.limit))
        return tuple(self.requests[place] for place in places)


def suite_of(batch: Batch, file: Path | None, metrics: str = "auto", **options: Any) -> Facts:
    """Facts to evaluate on, from what was read of a file or handed in.

    Args:
        file: where they are from, if from a file.
        metrics: whose scores; "auto": zsRE's for a file of its records, else CounterFact's.
        options: the other fields of `Facts`; those that are None or empty are as they are by default.
    """
    chosen = metrics if metrics != "auto" else "counterfact" if file is None else metrics_for(file)
    given = {name: value for name, value in options.items() if value not in (None, ())}
    return Facts(batch.requests, "" if file is None else file.name, chosen, **given)


def metrics_for(file: Path) -> str:
    """zsre where the first record of a file has zsRE's fields, else counterfact."""
    try:
        head = file.read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:
        return "counterfact"
    header = {cell.strip().strip('"') for cell in head.partition("\n")[0].split(",")}
    return "zsre" if header >= ZSRE_FIELDS or all(f'"{name}":' in head for name in ZSRE_FIELDS) else "counterfact"


VERSION: Final = 1
"""Of the definitions; raised when a score of the same name is computed differently."""
IN_CHAT: Final = 2
"""The same in a chat, where facts are read behind their openings since 2."""
RESAMPLES: Final = 1000
_FUNCTIONS: Final[Mapping[str, Callable[..., Scores]]] = {
    "counterfact": suites.counterfact_scores,
    "zsre": suites.zsre_scores,
    "wise": suites.wise_scores,
}


@dataclass(frozen=True)
class Evaluation(Result):
    """The scores of one revision.

    Attributes:
        commit: None for the unpatched model.
        facts: what it was measured on.
        suite: the name of what was measured with these settings.
        settings: all that the numbers depend on beside the commit.
        groups: teacher forced, live, fluency, drift, and what a judge said where one was asked.
        base: each score of the unpatched model.
        faults: facts that are not said, or run on, in what the revision writes after their prompts.
        note: the note that keeps the scores, if one does.
        harness: what lm-evaluation-harness reached on its own tasks, where that was asked for; no note keeps it.
        history: every commit below the revision that was asked for, newest first, if all of them were evaluated; this is then the
            evaluation of the newest that gives numbers, or of the base.
    """

    TOLD: ClassVar = {name: name for name in ("scores", "definitions", "relations")}

    commit: str | None
    facts: tuple[Request, ...] = field(metadata=told(by=len))
    suite: str
    settings: Mapping[str, Any]
    groups: tuple[Scores, ...] = field(metadata=told(omit=True))
    base: Mapping[str, float] = field(metadata=told(omit=True))
    faults: tuple[Fault, ...] = ()
    note: str | None = None
    harness: tuple[HarnessRow, ...] = field(default=(), metadata=told(optional=True))
    history: Rows[HistoryRow] | None = field(default=None, metadata=told(omit=True))

    def words(self) -> str:
        leading = [(name, self.scores[name]) for name in LEADING[self.settings["metrics"]] if name in self.scores]
        values = ", ".join(f"{name} {score.value:.3f}" for name, score in leading)
        return f"{self.commit[:12] if self.commit else 'the base'} on {len(self.facts)} facts: {values}"

    @property
    def chat(self) -> bool:
        """Facts were asked in the base's chat form."""
        return "chat" in self.settings

    @property
    def scores(self) -> dict[str, Score]:
        """All scores by name, in the order of their definitions."""
        found = {name: estimate for group in self.groups for name, estimate in group.estimates.items()}
        return {
            name: Score(
                found[name].value, *_bounds(found[name].low, found[name].high), self.base.get(name), found[name].records
            )
            for name in DEFINITIONS
            if name in found
        }

    @property
    def definitions(self) -> dict[str, str]:
        """What each score means."""
        return {name: DEFINITIONS[name] for name in self.scores}

    @property
    def relations(self) -> dict[str, dict[str, float]]:
        """The teacher-forced and live scores of the facts of each prompt template, with `facts`, their number."""
        return {
            template: {"facts": len(rows), **self.groups[0].of(rows), **self.groups[1].of(rows)}
            for template, rows in suites.relations(self.facts).items()
        }

    def records(self) -> Iterator[dict[str, Any]]:
        """One row per fact: what it is, and its own value of every score."""
        columns = {name: column for group in self.groups for name, column in group.columns.items()}
        for place, request in enumerate(self.facts):
            fact = {"request": request.id, "prompt": request.text, "target_new": request.target_new}
            yield {**fact, **{name: column[place] for name, column in columns.items()}}


@dataclass(frozen=True)
class HistoryRow(Result):
    """One commit of a walk: its scores, and whether they were measured now; without scores where it could not be measured."""

    commit: str
    time: str
    message: str
    noted: Noted | None
    fresh: bool


class Evaluator:
    """Evaluates revisions on one list of facts. The base is measured once; see `Measurer` for what is cached. Use it as a context manager.

    Args:
        judge: asked whether the texts after the facts' prompts give the targets.
        placement, chat, workers, on: as in `Measurer`.

    Attributes:
        measurer: the model in memory, and what it answered.
        suite: the name of what is measured.

    Raises:
        SettingsError: there are no such metrics, a context has not one `{}`, or there is no chat template to ask in.
        RequestError: there are no facts, or the text for drift cannot be read.
    """

    def __init__(
        self,
        repository: Store,
        facts: Facts,
        progress: Progress,
        *,
        judge: Judge | None = None,
        placement: Placement | None = None,
        chat: bool | None = None,
        workers: int | None = None,
        on: str | None = None,
    ) -> None:
        if facts.metrics not in SUITES:
            raise SettingsError(
                f"there are no metrics {facts.metrics!r}", remedy=f"The metrics are {', '.join(SUITES)}."
            )
        self.requests = facts.chosen
        if not self.requests:
            raise RequestError("there are no facts to evaluate", remedy="Give --suite FILE with at least one record.")
        self.repository, self._facts, self.progress, self._judge = repository, facts, progress, judge
        self._bases: dict[str, Measured] = {}
        check_contexts(facts.contexts)
        questions = Questions(self.requests, seed=facts.seed or 0, text=facts.text, contexts=facts.contexts)
        options: dict[str, Any] = {"placement": placement, "chat": chat, "workers": workers, "on": on}
        self.measurer = Measurer(repository, questions, progress, **options)
        self.settings = self._settings(questions)
        judged = {} if judge is None else {"judge": {"model": judge.model, "prompt": judging.PROMPT}}
        self._judged_settings = {**self.settings, **judged}
        self.suite = self._named(self._judged_settings)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *error: object) -> None:
        self.measurer.close()

    def _base(self, commit: str | None) -> Measured:
        """What the base answers; in a chat to facts that are read behind the openings with which a commit holds them."""
        behind = BASE if commit is None or self.measurer.chat is None else commit
        if behind not in self._bases:
            self._bases[behind] = self.measurer.measure(BASE, behind=behind)
        return self._bases[behind]

    def evaluate(self, revision: str) -> Evaluation:
        """The scores of a revision beside the base's, of models alone: no judge is asked.

        Raises:
            RevisionError: no such revision.
            BaseError: the base is not where it was, or is another model now.
            EditError: the model's logits are not numbers.
        """
        return self._scored(*self._measured(revision))

    def evaluate_and_keep(self, revision: str, who: Who, *, keep: bool = True) -> tuple[Evaluation, Noted | None]:
        """The scores of a revision, the judge's among them, and the note that keeps them; there is none about the base.

        Raises:
            RemoteError: the judge cannot be asked. What was measured until then is kept without it.
            RevisionError, BaseError, EditError: as in `evaluate`.
        """
        commit, after = self._measured(revision)
        done = self._scored(commit, after)
        if self._judge is not None:
            try:
                done = self._judged(self._judge, done, after)
            except RemoteError as error:
                noted = self.keep(commit, done, who=who) if keep and commit else None
                where = f"as note {noted.note[:12]}" if noted else "in the cache"
                remedy = f"{error.remedy} What was measured without the judge is kept {where}."
                raise RemoteError(error.message, remedy=remedy, **error.facts) from error
        return done, self.keep(commit, done, who=who) if keep and commit else None

    def _measured(self, revision: str) -> tuple[str | None, Measured]:
        commit = self.repository.resolve(revision)
        return commit, self._base(None) if commit is None else self.measurer.measure(commit)

    def _scored(self, commit: str | None, after: Measured) -> Evaluation:
        before = self._base(commit)
        groups, base = self._groups(after, before, RESAMPLES), self._groups(before, before, 1)
        values = {name: found.value for group in base for name, found in group.estimates.items()}
        self.progress.close()
        suite, faults = self._named(self.settings), self._faults(after)
        return Evaluation(commit, self.requests, suite, self.settings, groups, values, faults)

    def _judged(self, judge: Judge, done: Evaluation, after: Measured) -> Evaluation:
        """The same with what the judge says of the texts after the facts' prompts, the base's too."""
        texts, before = self._written(after), self._written(self._base(done.commit))
        self.progress.stage(f"asking {judge.model}", judge.unsaid([*texts, *before]))
        columns = [judge.column(part, self.progress.advance) for part in (texts, before)]
        self.progress.close()
        settings = {"model": judge.model}
        options = {"resamples": RESAMPLES, "seed": self._facts.seed or 0}
        now, base = (scored("judge", settings, {"judged": column}, {}, **options) for column in columns)
        values = {name: found.value for name, found in base.estimates.items()}
        return replace(
            done,
            suite=self.suite,
            settings=self._judged_settings,
            groups=(*done.groups, now),
            base={**done.base, **values},
        )

    def _written(self, found: Measured) -> list[Written | None]:
        texts = (reading.continuations[0] for reading in found.live)
        return [
            None if text is None else (request.text, request.target_new, text)
            for request, text in zip(self.requests, texts, strict=True)
        ]

    def _named(self, settings: Mapping[str, Any]) -> str:
        """The name of a suite: whose scores, in which form, and a hash of all other settings."""
        named = {name: value for name, value in settings.items() if name != "file"}
        asked = "-chat" if self.measurer.chat else ""
        return f"{self._facts.metrics}{asked}-{object_id(canonical_json(named))[:12]}"

    def _faults(self, found: Measured) -> tuple[Fault, ...]:
        """What does not read right of the facts themselves."""
        pairs = zip(self.requests, (reading.continuations[0] for reading in found.live), strict=True)
        anywhere = self.measurer.chat is not None
        judged = (fault_of(request, text, anywhere=anywhere) for request, text in pairs if text is not None)
        return tuple(fault for fault in judged if fault is not None)

    def keep(self, commit: str, done: Evaluation, *, who: Who) -> Noted:
        """Write scores as the note of a commit for this suite.

        Scores that are not finite numbers are left out, since the format has none.
        """
        scores = {name: score.to_json() for name, score in done.scores.items() if math.isfinite(score.value)}
        note = Note(commit=commit, made_by=who.author, scores=scores, settings=done.settings, suite=done.suite)
        identity = self.repository.add_note(
            note, command="eval", arguments={"suite": done.suite}, author=who.author, time=who.time
        )
        return read_note(identity, note)

    def _groups(self, found: Measured, before: Measured, resamples: int) -> tuple[Scores, ...]:
        options = {"resamples": resamples, "seed": self._facts.seed or 0}
        forced = _FUNCTIONS[self._facts.metrics](found.facts, before.facts, **options)
        return (
            forced,
            live_scores(found.live, before.live, chat=self.measurer.chat is not None, **options),
            fluency_scores(found.texts, **options),
            drift_scores(found.documents, **options),
        )

    def _settings(self, questions: Questions) -> dict[str, Any]:
        documents = self.measurer.documents
        return {
            "metrics": self._facts.metrics,
            "file": self._facts.file,
            "facts": len(self.requests),
            "items": object_id(requests_json(replace(request, metadata={}) for request in self.requests)),
            "seed": questions.seed,
            "resamples": RESAMPLES,
            "contexts": list(questions.contexts),
            "new_tokens": self.measurer.new_tokens,
            "fluency": {"facts": FLUENCY_FACTS, "tokens": FLUENCY_TOKENS, "top_k": FLUENCY_TOP_K},
            "text": {"id": Text(documents).id, "tokens": sum(map(len, documents))},
            **self.measurer.running,
            **self.measurer.asking,
            "version": VERSION if self.measurer.chat is None else IN_CHAT,
        }


def evaluate(
    evaluator: Evaluator, revision: str, who: Who, *, keep: bool = True, harness: Harness | None = None
) -> Evaluation:
    """Evaluate one revision; the scores of a commit are kept as its note unless told otherwise.

    Args:
        harness: tasks that are run on the same model afterwards.

    Raises:
        SettingsError, RevisionError, BaseError, EditError, RemoteError: as in `Evaluator.evaluate_and_keep`.
    """
    if harness is not None:
        harness.check()
    done, noted = evaluator.evaluate_and_keep(revision, who, keep=keep)
    if harness is not None:
        done = replace(done, harness=_run(harness, evaluator.measurer, revision, evaluator.progress))
    return done if noted is None else replace(done, note=noted.note)


def evaluate_harness(
    repository: Store,
    revision: str,
    harness: Harness,
    progress: Progress,
    *,
    placement: Placement | None = None,
) -> Evaluation:
    """Only what lm-evaluation-harness says of a revision and of the base: an evaluation without facts and scores.

    Raises:
        SettingsError: it is not installed, or a task is not known or cannot be run.
        RevisionError, BaseError: as in `Evaluator`.
    """
    harness.check()
    commit = repository.resolve(revision)
    measurer = Measurer(repository, Questions(()), progress, placement=placement)
    rows = _run(harness, measurer, revision, progress)
    return Evaluation(commit, (), "", {"metrics": SUITES[0], "file": "", **measurer.running}, (), {}, harness=rows)


def _run(harness: Harness, measurer: Measurer, revision: str, progress: Progress) -> tuple[HarnessRow, ...]:
    """The harness on a revision and on the base, as they are put into memory one after the other."""
    reached = {}
    for place in dict.fromkeys((measurer.repository.resolve(revision) or BASE, BASE)):
        tree = measurer.at(place)
        progress.stage(f"harness {place[:12]}", 0)
        reached[place] = harness.reached(tree.model, tree.tokenizer)
    progress.close()
    now, *base = reached.values()
    return beside(base[0] if base else now, now)


def evaluate_history(evaluator: Evaluator, revision: str, who: Who) -> list[HistoryRow]:
    """Evaluate every commit below a revision that has no note of this suite yet; all of them, newest first.

    A commit whose model gives no numbers is warned about and left without scores.
    """
    repository, rows = evaluator.repository, []
    start = repository.resolve(revision)
    for identity, found in repository.log(start) if start else ():
        known = next((noted for noted in notes_of(repository, identity) if noted.suite == evaluator.suite), None)
        noted = known
        if known is None:
            try:
                noted = evaluator.evaluate_and_keep(identity, who)[1]
            except EditError as error:
                evaluator.progress.warn(f"commit {identity[:12]} is left out: {error.message}")
        rows.append(HistoryRow(identity, found.time, found.message, noted, known is None))
    return rows


def refuse_unkept(keep: bool, harness: Harness | None = None) -> None:
    """Raise `SettingsError` where a walk over commits is not to keep what it measures, or to run the harness, which no note keeps."""
    if harness is not None:
        raise SettingsError(
            "--all and --harness contradict each other", remedy="Name the revision that it should run on."
        )
    if not keep:
        raise SettingsError(
            "--all and --no-note contradict each other", remedy="A walk keeps what it measures; leave one out."
        )


def evaluate_all(evaluator: Evaluator, revision: str, who: Who) -> Evaluation:
    """The evaluation of the newest commit that gives numbers, or of the base, with the history that `evaluate_history` gives."""
    rows = evaluate_history(evaluator, revision, who)
    newest = next((row.commit for row in rows if row.noted), BASE)
    return replace(evaluate(evaluator, newest, who, keep=False), history=Rows(rows))


def _bounds(low: float, high: float) -> tuple[float | None, float | None]:
    """An interval, or nothing where it is not finite."""
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)


COSTS: Final[Mapping[str, str]] = {
    "held": "share of the facts that were the model's answer (argmax) when they were committed",
    "seconds": "wall time of the commits per fact, without the metric",
    "kB": "bytes that the commits added to the store, per fact, in thousands",
}


@dataclass(frozen=True)
class BenchRow(Result):
    """What one contender reached, and at what cost per fact; the first row is the base's, which costs nothing.

    Attributes:
        scores: empty where its edit was refused, with the reason in `failure`.
        costs: by the names in `COSTS`.
    """

    name: str
    scores: Mapping[str, Score]
    costs: Mapping[str, float]
    failure: str | None = None


@dataclass(frozen=True)
class Bench(Result):
    """A comparison: what it was on, and a row per contender below the base's."""

    TOLD: ClassVar = {"definitions": "definitions"}

    settings: Mapping[str, Any]
    rows: tuple[BenchRow, ...]

    @property
    def titles(self) -> list[str]:
        """The columns of a table: the figures that come first, the leading scores, what is said beside them, fluency and costs."""
        names = dict.fromkeys((*FIGURES, *LEADING[self.settings["metrics"]], *BESIDE, "fluency"))
        return [*(name for name in names if any(name in row.scores for row in self.rows)), *COSTS]

    @property
    def definitions(self) -> dict[str, str]:
        """What each score and cost means."""
        return {**{name: DEFINITIONS[name] for row in self.rows for name in row.scores}, **COSTS}


def bench(
    repository: Store,
    contenders: Sequence[Contender],
    facts: Facts,
    progress: Progress,
    *,
    who: Who,
    batch: int | None = None,
    chat: bool | None = None,
) -> Bench:
    """Write the facts with each contender, on the base alone, and evaluate what comes out.

    The repository gives the base, the settings and the metric, and stays as it is.
    An edit that fails, or that its method does not do, is a row with the reason; what only the guard would refuse is measured all the
    same.

    Args:
        batch: commit so many facts at a time; None: all at once.
        chat: write and ask the facts in the base's chat form; None: as the repository's config says.

    Raises:
        SettingsError, RequestError, BaseError: as in `commit` and `Evaluator`.
    """
    with _beside(repository, who=who) as trial:
        _complete_metric(trial, contenders, progress)
        evaluator = Evaluator(trial, facts, progress, chat=chat)
        rows = [BenchRow(BASE, evaluator.evaluate(BASE).scores, {})]
        chosen = evaluator.requests
        for number, one in enumerate(contenders):
            switch_to_new(trial, f"trial-{number}", BASE, who)
            before = _stored(trial)
            try:
                who = Who(who.author, who.time, one.name)
                made = list(_commits(trial, one, chosen, batch or len(chosen), who, progress, chat))
                done = evaluator.evaluate("HEAD")
            except (EditError, SettingsError) as error:
                rows.append(BenchRow(one.name, {}, {}, error.message))
                continue
            rows.append(BenchRow(one.name, done.scores, _costs(made, _stored(trial) - before, len(chosen))))
    return Bench({**evaluator.settings, "batch": batch}, tuple(rows))


def write_bench(found: Bench, file: Path) -> None:
    """Write `bench_csv` to a file."""
    write_atomically(file, (bench_csv(found).encode("utf-8"),))


def bench_csv(found: Bench) -> str:
    """One line per contender, in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["editor", *found.titles])
    for row in found.rows:
        writer.writerow(
            [spreadsheet_cell(row.name), *("" if value is None else value for value in row_values(found, row))]
        )
    return buffer.getvalue()


def row_values(found: Bench, row: BenchRow) -> list[float | None]:
    """The numbers of one row under the comparison's titles."""
    known = {**{name: score.value for name, score in row.scores.items()}, **row.costs}
    return [known.get(title) for title in found.titles]


@contextmanager
def _beside(repository: Store, *, who: Who) -> Iterator[Store]:
    """A temporary repository with the same base, settings and metric, and without commits."""
    with tempfile.TemporaryDirectory(prefix="patchhub-bench-") as name:
        config, root = repository.config, Path(name)
        with Store.init(
            root,
            repository.objects.get(config.base_id),
            base_info=config.base,
            settings=config.settings,
            author=who.author,
            time=who.time,
        ) as trial:
            _share_cache(repository, trial)
            if config.recording is not None:
                data = repository.objects.get(config.recording.metric)
                text = Metric.from_json(data).text
                trial.objects.put(data)
                if text is not None and text in repository.objects:
                    trial.objects.put(repository.objects.get(text))
                trial.write_config(config)
            yield trial


def _share_cache(repository: Store, trial: Store) -> None:
    """Second moments and held text are the same for the same metric, and dear."""
    trial.cache.folder.mkdir(exist_ok=True)
    for kind in (METRIC, HELD):
        source = (repository.cache.folder / kind.name).resolve()
        source.mkdir(parents=True, exist_ok=True)
        (trial.cache.folder / kind.name).symlink_to(source, target_is_directory=True)


def _complete_metric(trial: Store, contenders: Sequence[Contender], progress: Progress) -> None:
    """Compute what the editors need of the metric beforehand, so that no one of them pays for it."""
    architecture = base_files(trial).architecture
    layers = {
        layer
        for one in contenders
        if one.method in EDITORS
        for layer in chosen_settings(trial, one.method, architecture, one.settings).layers
    }
    compute(trial, progress, layers=sorted(layers))


def _commits(
    trial: Store,
    one: Contender,
    facts: Sequence[Request],
    size: int,
    who: Who,
    progress: Progress,
    chat: bool | None,
) -> Iterator[Committed]:
    for start in range(0, len(facts), size):
        part = tuple(facts[start : start + size])
        batch = Batch(part, tuple(Origin(one.name) for _ in part), 0)
        writing = Writing(one.method, one.settings)
        yield commit(trial, batch, who, progress, writing, force=True, chat=chat)


def _costs(made: Sequence[Committed], size: int, facts: int) -> dict[str, float]:
    return {
        "held": sum(done.held for done in made) / facts,
        "seconds": sum(done.seconds for done in made) / facts,
        "kB": size / facts / 1000,
    }


def _stored(repository: Store) -> int:
    return sum(repository.objects.size(identity) for identity in repository.objects.ids())
