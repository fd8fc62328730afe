"""Facts written with MEMIT or PMET: settings, rivals, values, columns, and the patch that keeps them (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchhub.constraints import Moments, beyond, no_columns
from patchhub.delta import Delta
from patchhub.editing.editor import EDITORS, Asked, encode_facts
from patchhub.editing.locate import (
    ANSWER_TOKENS,
    Encoded,
    encode_marked,
    encode_targets,
    find_openings,
    has_sentence,
    mark_text,
)
from patchhub.editing.metric import MEMORY
from patchhub.editing.prompts import find_wordings, namesakes, siblings
from patchhub.editing.record import Edit, Recording, Running, State
from patchhub.editing.requests import Keep
from patchhub.editing.rows import key_rows, mean_keys
from patchhub.editing.settings import EditSettings, crowding, is_narrow, preset
from patchhub.editing.steps import step_budget
from patchhub.editing.values import KeptValues, Part, Values, ValueSettings
from patchhub.evaluation.live import Wanted, continue_greedily, first_clause, room_after
from patchhub.models.architectures import Architecture, additive_probe
from patchhub.models.placement import optimised_in
from patchhub.objects import SLOT, Metric, Patch, Request, set_digest
from patchhub.progress import Progress, told
from patchhub.sets.columns import (
    read_additive,
    read_rows,
    read_state,
    stacked_weights,
    write_columns,
)
from patchhub.sets.commits import Sentence, Written, store_patch
from patchhub.sets.elements import Plan, active_requests
from patchhub.sets.rivals import Rival, competition, refuse, suspects, warnings
from patchhub.sets.settings import metric_settings
from patchhub.sets.shards import without_shards
from patchhub.sets.sums import asked_for, solve_change
from patchhub.store.store import Store
from patchhub.text.tokens import Chat, context_length
from patchhub.worktree.metric import Recorder, open_recorder
from patchhub.worktree.opening import Worktree, other_form
from patchhub.worktree.workers import Opened, Workers, written_by

_KEPT_TOKENS = 8  # of an answer that a keep is known by
_ABOUT = "Tell me about {}."  # by which the model is asked about a subject in a chat
_IS_A = "{} is a"  # the same in plain text
_SENTENCE_TOKENS = 12  # of what it says then
_SENTENCE_ROOM = (
    2 * _SENTENCE_TOKENS
)  # in which these are read again: what was written token by token may have more tokens as a text
_SUBJECTS = 100  # about which it is asked where only the guard wants to know
_GAPS = 2  # tokens of white space and commas before a target that is said again, and again
_OTHER_WORDS = 12  # tokens by which an answer in other words may be longer than the base's
_FOUND_KEEPS = 4  # other subjects for each prompt of a batch (docs/methods.md)
_NULL_SPACE_RIDGE = 1.0  # AlphaEdit weighs requests by 1 and the norm of the change by l2


def chosen_settings(
    repository: Store, method: str, architecture: Architecture, given: Mapping[str, Any], facts: int = 0
) -> EditSettings:
    """The settings of a closed-form editor in this repository.

    Args:
        given: values that replace all others, by field of `EditSettings`; ``preset`` names a preset.
        facts: how many the set will have, by which the default lambda grows (`crowding`).

    Raises:
        SettingsError: a value cannot be used, or there is no such layer or preset.
    """
    values = {**_configured(repository, method), **given}
    name = values.pop("preset", None)
    settings = EDITORS[method].default_settings(architecture)
    settings = replace(settings, ridge=settings.ridge * crowding(architecture, facts))
    if name is not None:
        settings = preset(str(name), method, architecture).settings
    if _kind(repository) == "null_space":
        settings = replace(settings, ridge=_NULL_SPACE_RIDGE)
    if "layers" in values:
        values["layers"] = tuple(values["layers"])
        for layer in values["layers"]:
            architecture.block(layer)
    return replace(settings, **values)


def _configured(repository: Store, method: str) -> dict[str, Any]:
    settings = repository.config.settings
    named = {"preset": settings["preset"]} if "preset" in settings else {}
    prefix = f"{method}."
    return named | {key[len(prefix) :]: value for key, value in settings.items() if key.startswith(prefix)}


def _kind(repository: Store) -> str:
    """The kind of the metric that is pinned, else of the one that will be."""
    pinned = repository.config.recording
    if pinned is None:
        return metric_settings(repository)[0]
    return Metric.from_json(repository.objects.get(pinned.metric)).kind


def state_without(repository: Store, plan: Plan) -> dict[str, list[Delta]]:
    """The deltas of the state that the new facts are recorded on: HEAD's, without the facts they replace or are written with."""
    found = {weight: list(deltas) for weight, deltas in read_state(repository, plan.parent).items()}
    if plan.replaced or plan.again:
        for weight, part in solve_change(
            repository, repository.active(plan.parent), plan.kept, near=plan.parent
        ).items():
            found.setdefault(weight, []).append(part)
    return found


def write_closed_form(
    repository: Store,
    tree: Worktree,
    plan: Plan,
    method: str,
    settings: EditSettings,
    text: Sequence[Path],
    progress: Progress,
    *,
    strict: bool = False,
    find_keeps: bool = False,
    workers: Workers | None = None,
) -> Written:
    """Write the facts of ``plan`` with MEMIT or PMET; ``tree`` is in the state of `state_without`.

    Args:
        strict: refuse facts that compete with others for a key, before anything is optimised.
        find_keeps: keep the same prompts about other subjects as well (`editing.prompts.siblings`).
        workers: who asks the model and optimises values, and makes a metric where there is none; None: the model at hand.

    Raises:
        InterferenceError: there are such facts, under ``strict``.
        EditError: the optimisation or the solve is not finite.
        UnsupportedModelError: an edited layer is not additive.
    """
    settings = replace(settings, chat=tree.chat)
    for layer in settings.layers:
        with tree.stack.resident(layer):
            additive_probe(tree.model, tree.architecture, layer)
    model, memory = (tree.stack, tree.tokenizer), min(MEMORY, step_budget(tree.stack.device, tree.memory))
    recorder = open_recorder(repository, *model, settings.layers, text, progress, memory=memory, workers=workers)
    fixed = read_additive(repository, plan.kept)
    below = State(asked_for(repository, plan.parent, plan.kept, fixed), tree.state.weights, fixed)
    rivals = _rivals(repository, tree, plan, recorder, settings, below)
    if rivals and strict:
        raise refuse(rivals)
    for warning in warnings(rivals):
        progress.warn(warning)
    found = _found_keeps(repository, tree, plan, recorder, settings) if find_keeps else ()
    keeps = _keeps(tree, (*plan.keeps, *found), progress)
    asked, sentences = _asked(tree, plan, settings, keeps, progress, workers)
    running = _running(repository, tree, plan, method, settings, asked.also, workers, progress)
    edit = EDITORS[method].edit(
        *model,
        plan.requests,
        recorder.contexts,
        settings,
        recorder.cache,
        below,
        asked=asked,
        failing=partial(_reading_wrong, tree, plan.requests, settings, asked, workers),
        running=running,
    )
    patch = _kept_as_patch(repository, plan, method, settings, recorder, asked, edit)
    running.release()
    change = None if plan.replaced or plan.again else edit.recording.change
    return Written((patch.id,), plan.kept | patch.elements, recorder.metric, change, rivals, tuple(keeps), sentences)


def _asked(
    tree: Worktree,
    plan: Plan,
    settings: EditSettings,
    keeps: Sequence[Request],
    progress: Progress,
    workers: Workers | None,
) -> tuple[Asked, tuple[Sentence, ...]]:
    """What a batch asks besides its requests, and what the model says of their subjects now."""
    also = _also(tree, plan, settings)
    openings = _openings(tree, plan, settings, tree.chat or also, progress, workers)
    wordings = _wordings(tree, plan, settings, progress)
    sentences = _sentences(tree, plan, settings, also, progress, workers)
    return Asked(keeps, also, openings, wordings, _staying(tree, settings, sentences)), sentences


def _kept_as_patch(
    repository: Store, plan: Plan, method: str, settings: EditSettings, recorder: Recorder, asked: Asked, edit: Edit
) -> Patch:
    """The columns and values of an edit in the store; a keep has no value of its own."""
    columns = edit.recording.columns
    unmoved = np.zeros((len(asked.keeps), edit.values.targets.shape[1]), np.float32)
    targets = np.concatenate([edit.values.targets.numpy(), unmoved])
    return store_patch(
        repository,
        kind="closed_form",
        method=method,
        requests=(*plan.requests, *asked.keeps),
        settings={**settings.to_json(), "contexts": list(recorder.contexts), **_told_with(plan, asked)},
        tensors=write_columns(columns, targets, stacked_weights(repository)),
        weights={weight: found.shape for weight, found in columns.items()},
        below=without_shards(repository, plan.kept),
        metric=recorder.metric,
    )


def _running(
    repository: Store,
    tree: Worktree,
    plan: Plan,
    method: str,
    settings: EditSettings,
    also: Chat | None,
    workers: Workers | None,
    progress: Progress,
) -> Running:
    """How an edit runs: within the worktree's memory, its values kept in the cache, by the workers that there are."""
    stages = {
        "values": ("optimising values", len(plan.requests)),
        "layers": ("writing layers", len(settings.layers)),
        "further": ("optimising further", 0),
    }
    return Running(
        tree.memory,
        kept=lambda values: _kept_values(repository, tree, plan, method, settings, values, also),
        elsewhere=workers.each(_optimised, method, settings.layers) if workers else None,
        progress=told(progress, stages),
    )


def _told_with(plan: Plan, asked: Asked) -> dict[str, Any]:
    """What a patch tells besides its settings: what else was asked, and the patches that the facts written again come from.

    In the latter a revert of those patches finds them.
    """
    return {
        **({"refreshes": sorted({patch for patch, _ in plan.again})} if plan.again else {}),
        **({"keeps": [keep.id for keep in asked.keeps]} if asked.keeps else {}),
        **({"openings": asked.openings} if asked.openings else {}),
        **({"also": asked.also.to_json()} if asked.also else {}),
    }


def _rivals(
    repository: Store, tree: Worktree, plan: Plan, recorder: Recorder, settings: EditSettings, below: State
) -> tuple[Rival, ...]:
    """What the batch competes with, from its keys at the lowest edited layer."""
    layer = settings.layers[0]
    weight = tree.architecture.ffn_weight(layer)
    shape = tree.architecture.shapes[layer]
    active = below.columns.get(weight, no_columns(shape))
    if isinstance(active, Moments):  # keys are compared one by one
        recorded = read_rows(repository.patch, repository.objects.place, plan.kept, weight, shape)
        active = beyond(recorded, below.fixed.get(weight, ()))

    def read(requests: Sequence[Request], contexts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        limit = context_length(tree.model)
        facts = encode_facts(tree.tokenizer, requests, contexts, chat=settings.chat, limit=limit)
        keys = mean_keys(tree.stack, layer, key_rows([fact.rows for fact in facts]))
        return keys.numpy(), recorder.cache.preimages(weight, keys).numpy()

    found = [plan.requests[row] for row in suspects(*read(plan.requests, recorder.contexts[:1]), active)]
    if not found:
        return ()
    keys, preimages = read(found, recorder.contexts)
    return competition(repository, found, keys, preimages, settings.ridge, active)


def _optimised(method: str, layers: Sequence[int], part: Part, opened: Opened) -> Values:
    """A worker's part of the values."""
    return EDITORS[method].optimise(opened.stack, layers, part, opened.memory)


def _reading_wrong(
    tree: Worktree,
    requests: Sequence[Request],
    settings: EditSettings,
    asked: Asked,
    workers: Workers | None,
    recording: Recording,
) -> dict[int, list[str]]:
    """The places of the facts that the model does not say by itself, or goes on after, with a recording in its weights.

    They are asked in every form in which they were optimised; in a chat an answer begins as the base's did, or says the target in words of
    its own. With each place comes, form by form, what stands between the target and the same target said again at once, or "".
    """
    changes = {tree.architecture.layer_of(weight): [change] for weight, change in recording.change.items()}
    closing, forms = settings.closing > 0, (tree.chat, asked.also) if asked.also else (tree.chat,)
    write = partial(written_by, workers, tree, changes=changes)
    found: dict[int, list[str]] = {}
    for number, form in enumerate(forms):
        said = [asked.openings.get(request.id, "") if form else "" for request in requests]
        for place, gap in _wrong_in(tree, requests, form, said, write, closed=closing).items():
            found.setdefault(place, [""] * len(forms))[number] = gap
    return dict(sorted(found.items()))


def _wrong_in(
    tree: Worktree,
    requests: Sequence[Request],
    chat: Chat | None,
    openings: Sequence[str],
    write: Callable[..., Mapping[str, str]],
    *,
    closed: bool,
) -> dict[int, str]:
    """The places of the facts that do not read right in one form, each with what stands before the target said again, or "".

    Args:
        write: `written_by` of the model to be judged.
    """
    tokenizer, limit = tree.tokenizer, context_length(tree.model)
    pairs = [(request.text, request.target_new) for request in requests]
    whole = encode_targets(tokenizer, pairs, chat=chat, openings=openings)
    prompts = encode_targets(tokenizer, [(request.text, "") for request in requests], chat=chat)
    wanted = [
        Wanted(request.target_new, opening, closed, request.subject if chat else None)
        for request, opening in zip(requests, openings, strict=True)
    ]
    room: dict[str, int] = {}
    judges: dict[str, list[Wanted]] = {}
    places: list[int] = []
    for place, (request, prompt, text) in enumerate(zip(requests, prompts, whole, strict=True)):
        start, target = len(prompt.input_ids), text.target[1] - text.target[0]
        least = 1 + len(text.input_ids) - start
        if start + least <= limit:
            more = (2 * target + _GAPS if closed else 0) + (_OTHER_WORDS if chat else 0)
            room[request.text] = max(room.get(request.text, 0), min(least + more, limit - start))
            judges.setdefault(request.text, []).append(wanted[place])
            places.append(place)
    expected = {requests[place].text: whole[place].input_ids for place in places}
    written = write(room, chat=chat, expected=expected, enough=partial(_decided, judges))
    faults = {place: wanted[place].fault(written[requests[place].text]) for place in places}
    return {place: fault for place, fault in faults.items() if fault is not None}


def _decided(judges: Mapping[str, Sequence[Wanted]], prompt: str, written: str) -> bool:
    return all(wanted.decided(written) for wanted in judges[prompt])


def _also(tree: Worktree, plan: Plan, settings: EditSettings) -> Chat | None:
    """The chat form in which facts outside a chat are optimised as well; None where they are not, or one is too long for it."""
    form = other_form(tree) if settings.chat_weight else None
    if form is None:
        return None
    facts = encode_facts(tree.tokenizer, plan.requests, (SLOT,), chat=form)
    longest = max(max(len(fact.rows[0].input_ids), len(fact.essence.input_ids)) for fact in facts)
    return form if longest + max(longest, ANSWER_TOKENS) <= context_length(tree.model) else None


def _openings(
    tree: Worktree,
    plan: Plan,
    settings: EditSettings,
    chat: Chat | None,
    progress: Progress,
    workers: Workers | None,
) -> dict[str, str]:
    """What the answers in a chat say before their targets: as records or earlier commits have it, else as the model answers now."""
    if chat is None or not settings.opening:
        return {}
    known = {request.id: plan.openings[request.id] for request in plan.requests if request.id in plan.openings}
    open_ = [request for request in plan.requests if request.id not in known]
    if open_:
        progress.stage("asking the model", len(open_))
        room = room_after(tree.model, tree.tokenizer, [request.text for request in open_], ANSWER_TOKENS, chat=chat)
        answers = written_by(workers, tree, room, chat=chat, enough=_answered)
        asked = [(request, answers[request.text]) for request in open_]
        known |= find_openings(tree.stack, tree.tokenizer, asked, chat)
    bare = sum(request.id not in known for request in plan.requests)
    if bare:
        progress.warn(
            f"no place for the target in {bare} of the base's answers in the chat: written as the answer's first word there; "
            "`answer` in the record says the sentence"
        )
    return {request: opening for request, opening in known.items() if opening}


def _answered(prompt: str, answer: str) -> bool:
    return has_sentence(answer)


def _wordings(tree: Worktree, plan: Plan, settings: EditSettings, progress: Progress) -> Mapping[str, Sequence[str]]:
    """Where else the target of each fact is optimised; nowhere in a chat."""
    if tree.chat is not None or not settings.wordings:
        return {}
    progress.stage("reading the model's own sentences", len(plan.requests))
    return find_wordings(tree.stack, tree.tokenizer, plan.requests, settings.wordings)


def _sentences(
    tree: Worktree,
    plan: Plan,
    settings: EditSettings,
    also: Chat | None,
    progress: Progress,
    workers: Workers | None,
) -> tuple[Sentence, ...]:
    """What the model says of each subject by itself now: in the chat in which facts are optimised, where there is one.

    Where it is not to stay, so much of it as the guard reads; nothing of narrow models, which hardly write sentences.
    """
    chat, subjects = tree.chat or also, list(dict.fromkeys(request.subject for request in plan.requests))
    if not settings.essence:
        subjects = [] if is_narrow(tree.architecture) else subjects[:_SUBJECTS]
    if not subjects:
        return ()
    asking = _ABOUT if chat else _IS_A
    progress.stage("asking the model about the subjects", len(subjects))
    prompts = [asking.replace(SLOT, subject) for subject in subjects]
    room = room_after(tree.model, tree.tokenizer, prompts, _SENTENCE_ROOM, chat=chat)
    asked = {prompt: _SENTENCE_TOKENS for prompt, left in room.items() if left == _SENTENCE_ROOM}
    written = written_by(workers, tree, asked, chat=chat)
    said = {subject: written.get(prompt, "").strip() for subject, prompt in zip(subjects, prompts, strict=True)}
    words = {subject: text for subject, text in said.items() if any(map(str.isalnum, text))}
    return tuple(Sentence(subject, chat, asking, text) for subject, text in words.items())


def _staying(tree: Worktree, settings: EditSettings, sentences: Sequence[Sentence]) -> dict[str, Encoded]:
    """The tokens of what is said of each subject and is to stay, by subject."""
    if not sentences or not settings.essence:
        return {}
    chat = sentences[0].chat
    asked = [(one.asking.split(SLOT), one) for one in sentences]
    marked = [mark_text(head, one.subject, tail, one.said, chat=chat) for (head, tail), one in asked]
    encoded = encode_marked(tree.tokenizer, marked, chat=chat)
    return {one.subject: text for one, text in zip(sentences, encoded, strict=True)}


def _found_keeps(
    repository: Store, tree: Worktree, plan: Plan, recorder: Recorder, settings: EditSettings
) -> tuple[Keep, ...]:
    """The batch's prompts about other subjects of the same kind and others of the same last word, without those that are answered.

    Answered are those of active facts and keeps.
    """
    weight = tree.architecture.ffn_weight(settings.layers[0])
    pairs = siblings(
        tree.stack,
        tree.tokenizer,
        plan.requests,
        settings.layers[0],
        lambda keys: recorder.cache.preimages(weight, keys),
        _FOUND_KEEPS,
        chat=tree.chat,
    )
    active = active_requests(repository, plan.kept).values()
    pairs += namesakes(plan.requests)
    told = {(request.prompt, request.subject) for request in active} | {(k.prompt, k.subject) for k in plan.keeps}
    return tuple(Keep(prompt, name, None) for prompt, name in pairs if (prompt, name) not in told)


def _keeps(tree: Worktree, keeps: Sequence[Keep], progress: Progress) -> list[Request]:
    """The prompts to keep, with what the model says to each before the edit where their answer was not given."""
    open_ = [keep for keep in keeps if keep.answer is None]
    said: dict[Keep, str] = {}
    if open_:
        progress.stage("asking what to keep", len(open_))
        prompts = [keep.prompt.replace(SLOT, keep.subject) for keep in open_]
        answers = continue_greedily(
            tree.model,
            tree.tokenizer,
            prompts,
            chat=tree.chat,
            max_new_tokens=_KEPT_TOKENS,
            batch_tokens=tree.batch_tokens,
        )
        said = {keep: first_clause(answer) for keep, answer in zip(open_, answers, strict=True)}
    silent = [keep for keep, answer in said.items() if not answer]
    if silent:
        progress.warn(f"{len(silent)} of the prompts to keep have no answer, and are left out")
    return [keep.asked(said.get(keep, "")) for keep in keeps if keep.answer or said[keep]]


def _kept_values(
    repository: Store,
    tree: Worktree,
    plan: Plan,
    method: str,
    settings: EditSettings,
    values: ValueSettings,
    also: Chat | None,
) -> KeptValues:
    """Where the values of facts are kept that are optimised on this state with these settings."""
    config = tree.model.config
    quick = optimised_in(tree.model, tree.memory)
    inputs = {
        "base": repository.config.base_id,
        "dtype": str(tree.model.dtype),
        **({"optimised_in": str(quick)} if quick != tree.model.dtype else {}),
        "layer": EDITORS[method].way(tree.architecture).layer(settings.layers),
        "method": method,
        "quantization": str(getattr(config, "quantization_config", None)),
        "settings": asdict(values),
        "state": set_digest(without_shards(repository, plan.kept)),
        **(
            {"following": "another word", "behind": "another word"} if values.closing else {}
        ),  # once it could be the target's
        **({"chat_weight": settings.chat_weight} if also else {}),
    }
    return KeptValues(repository.cache, inputs, tree.architecture.d_model)
