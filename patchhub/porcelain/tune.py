"""`tune`: try layers, step sizes and lambda on a few facts, and write the best into the config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from patchhub.editing.editors import EDITORS
from patchhub.editing.settings import EditSettings
from patchhub.editing.tuning import candidates, sizes, successive_halving
from patchhub.errors import RequestError, SettingsError
from patchhub.models.architectures import Architecture, additive_probe, describe, read_config
from patchhub.models.checkpoint import Checkpoint
from patchhub.objects import Request
from patchhub.porcelain.edit_settings import chosen_settings
from patchhub.porcelain.loading import open_base
from patchhub.porcelain.opened import Opened, open_model
from patchhub.porcelain.placements import placement_of
from patchhub.porcelain.progress import Progress
from patchhub.porcelain.recording import open_recorder
from patchhub.porcelain.trials import Trial, Trials
from patchhub.store.repository import Repository

FACTS: Final = 24
"""How many facts are tried at most."""
TUNED: Final = ("layers", "learning_rate", "ridge")

_HELD_BACK: Final = 3  # of so many facts one is held back as a neighbour, where the facts bring none


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        method: the editor.
        trials: all settings that were tried, those on all facts first and the best of them at the head.
        present: the place in ``trials`` of the settings as they are.
        written: the config's keys that were set; empty where nothing is better, or in a dry run.
        facts, held_back: how many facts were written in each trial of the last round, and how many served as neighbours.
        seconds: wall time.
    """

    method: str
    trials: tuple[Trial, ...]
    present: int
    written: Mapping[str, Any]
    facts: int
    held_back: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        trials = [{**asdict(trial), "score": trial.score} for trial in self.trials]
        return {**asdict(self), "trials": trials}


def tune(
    repository: Repository,
    requests: Sequence[Request],
    progress: Progress,
    *,
    method: str = "memit",
    limit: int = FACTS,
    dry_run: bool = False,
    text: Sequence[Path] = (),
) -> Tuned:
    """Find the layers, step size and lambda that write some facts best, by successive halving, on the unpatched base.

    Values are optimised once for each last layer and step size and used for every band and lambda; nothing is committed. Where
    the facts bring no neighbourhood prompts, a third of them is held back and must keep the base's answers.

    Args:
        requests: facts with, if possible, paraphrases and neighbourhood prompts.
        limit: use at most so many, from the first on.
        dry_run: leave the config as it is.
        text: as in `commit`.

    Raises:
        SettingsError: there is no such editor.
        RequestError: there are no facts.
    """
    if method not in EDITORS:
        raise SettingsError(f"tune does not know the editor {method!r}", remedy=f"Use {' or '.join(EDITORS)}.")
    if not requests:
        raise RequestError("there are no facts to try settings on", remedy="Give a file of facts.")
    begun = perf_counter()
    checkpoint = open_base(repository)
    architecture = describe(read_config(checkpoint.folder))
    present = chosen_settings(repository, method, architecture, {})
    tried = candidates(present, architecture.n_layers)
    layers = sorted({layer for settings in tried for layer in settings.layers})
    opened = _open(repository, checkpoint, architecture, layers, progress)
    recorder = open_recorder(repository, opened.stack, opened.tokenizer, layers, text, progress)
    written, held_back = _split(requests[:limit])
    trials = Trials(opened, recorder, method, written, held_back)
    standings = successive_halving(tried, _counted(trials.score, progress, len(tried)), sizes(len(written)))
    found = tuple(trials.trial(standing) for standing in standings)
    place = next(i for i, standing in enumerate(standings) if standing.candidate is present)
    chosen: dict[str, Any] = {}
    if not dry_run and place > 0 and found[0].score > found[place].score:
        chosen = _write(repository, method, standings[0].candidate, present)
    progress.close()
    return Tuned(method, found, place, chosen, len(written), len(held_back), perf_counter() - begun)


def _open(
    repository: Repository,
    checkpoint: Checkpoint,
    architecture: Architecture,
    layers: Sequence[int],
    progress: Progress,
) -> Opened:
    """The unpatched base, with the layers that will be tried checked."""
    progress.stage("loading the base", 0)
    weights = [architecture.ffn_weight(layer) for layer in layers]
    chat = bool(repository.config.settings.get("chat", False))
    opened = open_model(repository, checkpoint, architecture, weights, {}, placement_of(repository), chat=chat)
    for layer in layers:
        additive_probe(opened.model, architecture, layer)
    return opened


def _split(requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """The facts to write, and those that are held back as neighbours because none bring any."""
    if any(request.neighborhood for request in requests) or len(requests) < _HELD_BACK:
        return list(requests), []
    held_back = [request for place, request in enumerate(requests, 1) if place % _HELD_BACK == 0]
    return [request for request in requests if request not in held_back], held_back


def _counted(
    score: Callable[[EditSettings, int], float], progress: Progress, count: int
) -> Callable[[EditSettings, int], float]:
    """The score, with a stage of the progress for every round."""
    round_of = 0

    def counting(settings: EditSettings, facts: int) -> float:
        nonlocal round_of
        if facts != round_of:
            progress.stage(f"settings on {facts} fact{'' if facts == 1 else 's'}", count if not round_of else 0)
            round_of = facts
        result = score(settings, facts)
        progress.advance(1)
        return result

    return counting


def _write(repository: Repository, method: str, best: EditSettings, present: EditSettings) -> dict[str, Any]:
    """Set what differs from the present settings in the config."""
    values = {name: value for name in TUNED if (value := getattr(best, name)) != getattr(present, name)}
    keys = {f"{method}.{name}": list(value) if name == "layers" else value for name, value in values.items()}
    repository.change_config(lambda config: replace(config, settings={**config.settings, **keys}))
    return keys
