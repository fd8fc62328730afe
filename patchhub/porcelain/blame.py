"""`blame` and `bisect`: which fact moves an answer, and which commit broke something.

`blame` splits the change of an output into one part per request. `bisect` finds the commit in about log2 n checks; a check is a program on
the applied checkpoint, or a measurement on one model that is switched."""

from __future__ import annotations

import math
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from patchhub.constraints import Columns, responsibilities
from patchhub.editing.locate import encode_text
from patchhub.errors import RequestError, RevisionError, SettingsError
from patchhub.models.placement import Placement
from patchhub.models.tracing import right_padded
from patchhub.objects import Element, Request
from patchhub.porcelain.history import Entry, show
from patchhub.porcelain.search import mentioned
from patchhub.progress import Progress, Silent
from patchhub.results import Result, in_full, told
from patchhub.sets.columns import read_columns
from patchhub.sets.elements import active_requests, distinct, openings_of, places_of
from patchhub.sets.shards import without_shards
from patchhub.store import lookup, states
from patchhub.store.lookup import Fact
from patchhub.store.states import Parents
from patchhub.store.store import Store
from patchhub.text.tokens import Chat
from patchhub.worktree.opening import Worktree, main_state_at, open_worktree, state_at

Keys = Mapping[str, Float[np.ndarray, " in"]]


@dataclass(frozen=True)
class Share(Result):
    """One active request: its share of the change at the prompt's key, and its text unless that is withheld."""

    patch: str
    request_id: str = field(metadata=told(name="id"))
    share: float
    request: Request | None = field(metadata=told(inline=True, by=lambda request: in_full(request) or {}))


@dataclass(frozen=True)
class Blame(Result):
    """Who moves the answer to a prompt.

    Attributes:
        commit: the revision asked.
        token: the token of the prompt whose keys were read, and its position in what the model read.
        answer: the likeliest next token there and its probability.
        change: per weight, ||D k|| over ||W0 k + D k||: how much of the output at that key is the edits'.
        requests, patches: shares, the largest first.
        mentioned: active facts whose subject is in the prompt; those of exactly this text first.
        shards: how many active facts are in shards, which answer beside the weights and have no share in their change.
        chat: the form in which the prompt was asked; None: as it is.
    """

    commit: str
    prompt: str
    token: tuple[str, int]
    answer: tuple[str, float]
    change: Mapping[str, float]
    requests: tuple[Share, ...]
    patches: Mapping[str, float]
    mentioned: tuple[Fact, ...]
    shards: int = 0
    chat: Chat | None = None


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one pass of the patched model gives at one token, per edited weight, and the answer; in which form it was.

    Attributes:
        outputs: the lengths of what the feed-forward parts put into the stream.
        slopes: what a small change of each channel of the weight's output is multiplied with on its way there (out,).
    """

    keys: Keys
    outputs: Mapping[str, float]
    slopes: Mapping[str, Float[np.ndarray, " out"]]
    token: tuple[str, int]
    answer: tuple[str, float]
    chat: Chat | None


def blame(
    repository: Store,
    prompt: str,
    progress: Progress,
    *,
    subject: str | None = None,
    revision: str = "HEAD",
    base: str | None = None,
    placement: Placement | None = None,
    chat: bool | None = None,
) -> Blame:
    """Split the change at a prompt's key among the active requests.

    Args:
        subject: read the keys at the last token of this part of the prompt. Default: of the longest subject of an active fact that is
            in the prompt, since that is where facts are written; without one, the prompt's last token.
        placement: on which device, in which type or quantisation the model runs; None: as the repository's config says.
        chat: the prompt is the user's message of the base's chat form; None: as the repository's config says.

    Raises:
        RevisionError: no such revision, or nothing is active there.
        RequestError: the subject is not in the prompt.
        SettingsError: it is to be asked in a chat, and the base has no chat template that can be used.
    """
    prompt = prompt.strip()
    commit = _with_facts(repository, revision)
    elements = repository.active(commit)
    facts = mentioned(repository, prompt, revision)
    place = subject if subject is not None else next((fact.subject for fact in facts), None)
    columns = read_columns(repository, elements)
    state = main_state_at(repository, revision)
    tree = open_worktree(repository, progress, state, base=base, placement=placement, chat=chat)
    reading = _read(tree, prompt, place, sorted(columns))
    progress.close()
    contributions = _contributions(columns, reading)
    changes = {weight: float(np.linalg.norm(rows.sum(0))) for weight, rows in contributions.items()}
    owners = {weight: found.labels for weight, found in columns.items()}
    whole = sum(changes.values()) or 1.0
    requests = _norms(contributions, owners)
    patches = _norms(contributions, {weight: [(patch, None) for patch, _ in found] for weight, found in owners.items()})
    texts = active_requests(repository, elements)
    shares = [Share(e[0], str(e[1]), norm / whole, texts.get(e)) for e, norm in requests.items()]
    return Blame(
        commit,
        prompt,
        reading.token,
        reading.answer,
        {weight: changes[weight] / (reading.outputs[weight] or 1.0) for weight in changes},
        tuple(sorted(shares, key=lambda share: (-share.share, share.request_id))),
        {patch: norm / whole for (patch, _), norm in sorted(patches.items(), key=lambda item: -item[1])},
        tuple(facts),
        len(places_of(repository, elements - without_shards(repository, elements))),
        reading.chat,
    )


def _with_facts(repository: Store, revision: str) -> str:
    """The commit of a revision with facts in its weights; `RevisionError` where there are none."""
    commit = repository.resolve(revision)
    elements = repository.active(commit)
    if commit is None or not without_shards(repository, elements):
        shards = ", and those in shards answer beside the weights" if elements else ""
        raise RevisionError(
            f"no fact in the weights is active at {revision}{shards}",
            remedy="Name a revision with facts in its weights.",
        )
    return commit


def _contributions(columns: Mapping[str, Columns], reading: _Reading) -> dict[str, Float[np.ndarray, "n out"]]:
    """How each request moves the output of each weight at the keys that were read, in the stream: b_i (u_i^T k) by row."""
    return {
        weight: responsibilities(found)
        * (found.preimages.astype(np.float64) @ reading.keys[weight])[:, None]
        * reading.slopes[weight]
        for weight, found in columns.items()
    }


def _norms(
    contributions: Mapping[str, Float[np.ndarray, "n out"]], owners: Mapping[str, Sequence[Element]]
) -> dict[Element, float]:
    """For each owner, the norm of the sum of its rows, summed over weights."""
    norms: dict[Element, float] = {}
    for weight, rows in contributions.items():
        places = {owner: number for number, owner in enumerate(dict.fromkeys(owners[weight]))}
        sums = np.zeros((len(places), rows.shape[1]))
        np.add.at(sums, [places[owner] for owner in owners[weight]], rows)
        for owner, norm in zip(places, np.linalg.norm(sums, axis=1).tolist(), strict=True):
            norms[owner] = norms.get(owner, 0.0) + norm
    return norms


@torch.no_grad()
def _read(
    tree: Worktree,
    prompt: str,
    subject: str | None,
    weights: Sequence[str],
) -> _Reading:
    architecture, stack = tree.architecture, tree.stack
    ids, place = _place(tree.tokenizer, prompt, subject, tree.chat)
    layers = [layer for layer in range(architecture.n_layers) if architecture.ffn_weight(layer) in weights]
    batch = right_padded([ids], stack.device)
    with stack.watch_keys(layers) as seen, stack.watch_values(layers) as projected:
        logits = tree.model(input_ids=batch[0], attention_mask=batch[1]).logits[0, -1]
    outputs = {layer: projected[layer][0, place].double().cpu() for layer in layers}
    best = logits.float().softmax(-1).max(-1)
    return _Reading(
        {architecture.ffn_weight(layer): seen[layer][0, place].double().cpu().numpy() for layer in layers},
        {architecture.ffn_weight(layer): float(stack.behind(layer)(outputs[layer]).norm()) for layer in layers},
        {architecture.ffn_weight(layer): stack.behind(layer).slope(outputs[layer]).numpy() for layer in layers},
        (str(tree.tokenizer.decode([ids[place]])), place),
        (str(tree.tokenizer.decode([int(best.indices)])), float(best.values)),
        tree.chat,
    )


def _place(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str | None, chat: Chat | None
) -> tuple[tuple[int, ...], int]:
    """The tokens that ask the prompt, and the index of its subject's last one (of the last of the whole prompt without a subject)."""
    if not prompt:
        raise RequestError("the prompt is empty", remedy="Write the beginning of a sentence.")
    part = prompt if subject is None else subject
    start = prompt.find(part) if part else -1
    if start < 0:
        raise RequestError(
            f"the subject {subject!r} is not in the prompt {prompt!r}",
            remedy="Write it as it stands in the prompt, or leave --subject out.",
        )
    encoded = encode_text(tokenizer, prompt, (start, start + len(part)), chat=chat)
    return encoded.input_ids, encoded.subject_last


Verdict = Literal["good", "bad", "skip"]
Outcome = tuple[Verdict, float | None]
"""A verdict, and the number that it was read off, if there is one."""
Check = Callable[[str | None], Outcome]
"""The verdict on a commit; on the base for None."""


@dataclass(frozen=True)
class Step(Result):
    """One check that was made; the commit is None for the base."""

    commit: str | None
    verdict: Verdict
    value: float | None


@dataclass(frozen=True)
class Bisection(Result):
    """What a bisection found.

    Attributes:
        suspects: the first bad commit; several, newest first, where skipped commits hide which one it is.
        steps: the checks in the order in which they were made.
        entry, added, removed: the first bad commit and its facts, if it is known.
        chat: the form in which the checks' prompts were asked; None: as they are, or as a command does.
    """

    TOLD: ClassVar = {"first_bad": "first_bad"}

    suspects: tuple[str, ...]
    steps: tuple[Step, ...]
    entry: Entry | None = field(metadata=told(name="commit"))
    added: tuple[Request, ...] = field(metadata=told(name="facts_added", by=in_full))
    removed: tuple[Request, ...] = field(metadata=told(name="facts_removed", by=in_full))
    chat: Chat | None = None

    @property
    def first_bad(self) -> str | None:
        """The id of the first bad commit, if it is known."""
        return self.entry.id if self.entry else None


# --- the search: pure -----------------------------------------------------------------------------------------------


def first_bad(good: Iterable[str], bad: str, parents: Parents, verdict: Callable[[str], Verdict]) -> list[str]:
    """The commit below or at `bad` that is bad and whose parents are all good or have a good descendant.

    Each check is made at the commit that splits what is left best, as in git: the number of candidates that are
    ancestors of it is closest to half. It finds the commit exactly if every descendant of a bad commit is bad.

    Returns:
        One commit; where only skipped ones are left beside it, all that it may be, children first.
    """
    known = states.ancestors(good, parents)
    candidates = [commit for commit in states.oldest_first([bad], parents) if commit not in known]
    skipped: set[str] = set()
    while True:
        below = ancestor_sets(candidates, parents)
        choice = _best_split(candidates, below, skipped | {candidates[-1]})
        if choice is None:
            return candidates[::-1]
        outcome = verdict(choice)
        if outcome == "skip":
            skipped.add(choice)
            continue
        inside = below[choice]
        candidates = [c for place, c in enumerate(candidates) if bool(inside >> place & 1) == (outcome == "bad")]


def ancestor_sets(commits: Sequence[str], parents: Parents) -> dict[str, int]:
    """For each of `commits` (parents first) those of them that are it or its ancestors, as bits of their positions."""
    sets: dict[str, int] = {}
    for place, commit in enumerate(commits):
        bits = 1 << place
        for parent in parents(commit):
            bits |= sets.get(parent, 0)
        sets[commit] = bits
    return sets


def _best_split(candidates: Sequence[str], below: Mapping[str, int], excluded: Collection[str]) -> str | None:
    """The candidate for which the smaller of its two sides is largest; the newest such one."""
    best, choice = 0, None
    for commit in candidates:
        inside = bin(below[commit]).count("1")
        if commit not in excluded and min(inside, len(candidates) - inside) >= best:
            best, choice = min(inside, len(candidates) - inside), commit
    return choice


# --- the verb -------------------------------------------------------------------------------------------------------


def bisect(
    repository: Store, good: str, bad: str, check: Check, progress: Progress, *, chat: Chat | None = None
) -> Bisection:
    """Find the first bad commit between two revisions, both of which are checked first.

    Args:
        chat: the form in which ``check`` asks, to be told with what it found.

    Raises:
        RevisionError: `good` is not an ancestor of `bad`, or `check` does not find them good and bad.
    """
    start, end = repository.resolve(good), repository.resolve(bad)
    known = lookup.whole_graph(repository)

    def parents(commit: str) -> Sequence[str]:
        return known[commit][1]

    if end is None or start == end or (start and not states.is_ancestor(start, end, parents)):
        raise RevisionError(
            f"{good} is not an ancestor of {bad}",
            remedy="Name an older commit (or `base`) that is good, then a bad one.",
        )
    steps: list[Step] = []
    progress.stage("checking", 3 + int(math.log2(len(states.ancestors([end], parents)))))

    def verdict(commit: str | None) -> Verdict:
        outcome, value = check(commit)
        steps.append(Step(commit, outcome, value))
        progress.advance(1)
        return outcome

    _demand(good, verdict(start), "good")
    _demand(bad, verdict(end), "bad")
    suspects = first_bad([start] if start else [], end, parents, verdict)
    progress.close()
    if len(suspects) > 1:
        return Bisection(tuple(suspects), tuple(steps), None, (), (), chat)
    shown = show(repository, suspects[0])
    return Bisection(tuple(suspects), tuple(steps), shown.entry, shown.added, shown.removed, chat)


def _demand(revision: str, found: Verdict, wanted: Verdict) -> None:
    if found != wanted:
        raise RevisionError(
            f"the check says {found!r} of {revision}, which should be {wanted}",
            remedy="Choose revisions on both sides of the change, or another check.",
            revision=revision,
            verdict=found,
        )


SKIP_CODE: Final = 125
_STDERR: Final = 2  # the descriptor
METRICS: Final[Mapping[str, str]] = {
    "efficacy": "reliability",
    "paraphrase": "generalisation",
    "locality": "locality",
    "perplexity": "perplexity",
}
"""What can be measured, and its name in the WISE suite."""
_NEEDED: Final[Mapping[str, str]] = {"efficacy": "", "paraphrase": " with paraphrases"}
_ON_TEXT: Final = "perplexity"
"""The one that is measured on running text, in a chat or not."""


@dataclass(frozen=True, eq=False)
class MetricCheck:
    """A check by a measurement: bad where it is below `below` or above `above`.

    Attributes:
        measure: the number of a commit; of the base for None.
        chat: the form in which its prompts are asked; None: as they are.
    """

    measure: Callable[[str | None], float]
    below: float | None
    above: float | None
    chat: Chat | None

    def __call__(self, commit: str | None) -> Outcome:
        value = self.measure(commit)
        bad = (self.below is not None and value < self.below) or (self.above is not None and value > self.above)
        return ("bad" if bad else "good"), value


def command_check(
    repository: Store, run: Callable[[Path, str | None], int], progress: Progress, *, base: str | None = None
) -> Check:
    """A check by a program on the applied checkpoint: exit code 0 is good, 125 skips, anything else is bad.

    Args:
        run: runs it on a checkpoint folder (deleted afterwards) and a commit's id, and returns its exit code.
    """
    from patchhub.porcelain.model import apply

    def check(commit: str | None) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="patchhub-bisect-") as folder:
            model = Path(folder) / "model"
            apply(repository, commit or "base", model, progress, base=base)
            code = run(model, commit)
        return ("skip" if code == SKIP_CODE else "bad" if code else "good"), float(code)

    return check


def program(command: Sequence[str], environment: Mapping[str, str]) -> Callable[[Path, str | None], int]:
    """What runs a program for `command_check`, with the checkpoint in PATCHHUB_MODEL and the commit in PATCHHUB_COMMIT.

    What it prints goes to stderr, since stdout is for results.
    """

    def run(model: Path, commit: str | None) -> int:
        places = {"PATCHHUB_MODEL": str(model), "PATCHHUB_COMMIT": commit or "base"}
        try:
            return subprocess.run(command, env={**environment, **places}, stdout=_STDERR, check=False).returncode
        except OSError as error:
            raise SettingsError(
                f"cannot run {command[0]!r}: {error.strerror}", remedy="Give a program and its arguments after `--`."
            ) from error

    return run


def metric_check(
    repository: Store,
    metric: str,
    requests: Sequence[Request],
    *,
    below: float | None = None,
    above: float | None = None,
    progress: Progress | None = None,
    base: str | None = None,
    placement: Placement | None = None,
    chat: bool | None = None,
) -> MetricCheck:
    """A check by a measurement: bad where it is below `below` or above `above`.

    efficacy and paraphrase are the shares of facts and of their paraphrases that are the model's answer; locality is the share of
    neighbour prompts that are answered as by the base (each token by argmax); perplexity is over the neighbours' true sentences. One
    model stays in memory and is switched from commit to commit.

    Args:
        placement: on which device, in which type or quantisation the model runs; None: as the repository's config says.
        chat: ask prompts, neighbours' too, in the base's chat form; None: as the repository's config says. Sentences stay outside it.

    Raises:
        SettingsError: no such metric, or no bound; a chat without a chat template that can be used, or for perplexity.
        RequestError: the facts have no prompts of the kind that the metric needs.
    """
    if metric not in METRICS or (below is None and above is None):
        raise SettingsError(
            f"{metric} cannot be checked",
            remedy=f"Use --metric {', '.join(METRICS)} with --below or --above and a number.",
        )
    if chat and metric == _ON_TEXT:
        raise SettingsError(f"{metric} is measured on running text, not in a chat", remedy="Leave --chat out.")
    needed = {"efficacy": len(requests), "paraphrase": sum(len(request.paraphrases) for request in requests)}
    if not needed.get(metric, sum(len(request.neighborhood) for request in requests)):
        raise RequestError(
            f"the facts have no prompts to measure {metric} on",
            remedy=f"Give facts{_NEEDED.get(metric, ' with neighborhood prompts')} by --facts.",
        )
    measure, form = _measurement(repository, metric, requests, progress or Silent(), base, placement, chat)
    return MetricCheck(measure, below, above, form)


def facts_to_measure(repository: Store, metric: str, good: str, bad: str) -> list[Request]:
    """The facts that a metric is about by default.

    What must hold all along, efficacy and paraphrases: the facts active at both ends, or, where there are none, at the bad end.
    What must not be disturbed, locality and perplexity: the neighbours of all facts active at the bad end.
    """
    texts = active_requests(repository, repository.active(repository.resolve(bad)))
    if metric in ("efficacy", "paraphrase"):
        held = {request for _, request in places_of(repository, repository.active(repository.resolve(good)))}
        texts = {place: request for place, request in texts.items() if request.id in held} or texts
    return list(distinct(texts))


def _measurement(
    repository: Store,
    metric: str,
    requests: Sequence[Request],
    progress: Progress,
    base: str | None,
    placement: Placement | None,
    chat: bool | None,
) -> tuple[Callable[[str | None], float], Chat | None]:
    """commit -> the number, on one model that is loaded now; and the form in which it is asked."""
    from patchhub.evaluation.metrics import perplexity
    from patchhub.evaluation.suites import read_facts, wise_scores

    unpatched_state = state_at(repository, "base")
    # Text is read as it is, whatever the form in which facts are asked.
    asked = False if metric == _ON_TEXT else chat
    tree = open_worktree(repository, progress, unpatched_state, base=base, placement=placement, chat=asked)
    model, tokenizer, form = tree.model, tree.tokenizer, tree.chat
    unpatched = [] if metric == _ON_TEXT else read_facts(model, tokenizer, requests, chat=form)
    texts = [f"{near.prompt} {near.target}" for request in requests for near in request.neighborhood]

    def measure(commit: str | None) -> float:
        tree.moved(state_at(repository, commit or "base"))
        if metric == _ON_TEXT:
            return perplexity(model, tokenizer, texts)
        elements = repository.active(commit) if form is not None else ()
        openings = openings_of(repository, [(patch, request) for patch, request in elements if request is not None])
        read = read_facts(model, tokenizer, requests, chat=form, openings=openings)
        scores = wise_scores(read, unpatched, resamples=1)
        return scores.estimates[METRICS[metric]].value

    return measure, form
