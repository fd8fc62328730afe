"""A plug-in of vLLM, which is no dependency: a revision is served under its name, ``model="user/facts@v1.2"``.

vLLM asks its resolvers for an adapter that it does not know (``--enable-lora``, ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``), and
keeps what it was given for as long as it runs: name tags and commits, which do not move. Whoever may ask the server names the
model, so only places that ``PATCHHUB_SERVE`` lists are opened: ids on the Hub, and absolute folders of stores, between commas.
Without it nothing is registered. ``PATCHHUB_SERVE_MAX_RANK`` is the server's ``--max-lora-rank``, which no resolver is told.
"""

import asyncio
import logging
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from patchhub.cache import user_folder
from patchhub.errors import PatchhubError, RepositoryError, SettingsError, UnsupportedModelError

PLACES: Final = "PATCHHUB_SERVE"
MAX_RANK: Final = "PATCHHUB_SERVE_MAX_RANK"
NAME: Final = "patchhub"

_EXACT: Final = 1e-6


def register() -> None:
    """What vLLM calls when it starts, in each of its processes, once or more often.

    Raises:
        SettingsError: a variable has no right value.
    """
    places, rank = places_of(os.environ), max_rank_of(os.environ)
    if not places:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        cache = user_folder(os.environ) or Path(tempfile.gettempdir()) / NAME
        LoRAResolverRegistry.register_resolver(NAME, resolver(places, cache, rank))


def places_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The places that may be served.

    Raises:
        SettingsError: one is neither an id on the Hub nor an absolute folder.
    """
    from patchhub.remotes.sync import HUB, hub_id

    found = [entry.strip().removeprefix(HUB) for entry in environment.get(PLACES, "").split(",") if entry.strip()]
    for entry in found:
        if not os.path.isabs(entry):
            try:
                hub_id(HUB + entry)
            except SettingsError:
                raise SettingsError(
                    f"{PLACES} names {entry!r}, which is neither user/repo of the Hub nor an absolute folder",
                    remedy=f"Write {PLACES}=user/facts,/srv/facts.",
                ) from None
    return tuple(found)


def max_rank_of(environment: Mapping[str, str]) -> int | None:
    """The highest rank that the server takes; None where that is not said.

    Raises:
        SettingsError: it is no number above 0.
    """
    given = environment.get(MAX_RANK, "").strip()
    if not given:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise SettingsError(f"{MAX_RANK} is {given!r}, not a rank", remedy="Write the number of --max-lora-rank.")
    return int(given)


def resolver(places: Collection[str], cache: Path, max_rank: int | None) -> Any:
    """A resolver of vLLM for revisions of these places; adapters are written below ``cache``.

    What it refuses it raises as ValueError, in one sentence with its remedy, which vLLM answers to whoever asked.
    """
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    log = logging.getLogger("vllm.patchhub")  # below vLLM's own logger, so that its settings hold

    class Resolver(LoRAResolver):  # type: ignore[misc]  # vLLM is no dependency, so its class is Any here
        """Gives the adapter of a revision, named ``PLACE@REVISION``."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            named = Named.parse(lora_name, places)
            if named is None:
                return None
            try:
                found = await asyncio.to_thread(served_adapter, named, base_model_name, cache, max_rank=max_rank)
            except PatchhubError as error:
                log.error("%s is not served: %s %s", lora_name, error.message, error.remedy)
                raise ValueError(f"{lora_name} is not served: {error.message}. {error.remedy}") from error
            if found.error > _EXACT:
                log.warning("%s is recompressed to rank %d; relative error %.1e", lora_name, found.rank, found.error)
            log.info("%s is commit %s, rank %d, from %s", lora_name, found.commit, found.rank, named.place)
            number = int(found.commit[:7], 16) + 1  # above 0; vLLM counts its own
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(found.folder))

    return Resolver()


@dataclass(frozen=True)
class Named:
    """A name that a server is asked for, ``user/facts@v1.2`` or ``/srv/facts@main``: where the facts are, and their revision."""

    place: str
    revision: str

    @classmethod
    def parse(cls, name: str, allowed: Collection[str]) -> "Named | None":
        """None where the place is none of those that are allowed.

        Args:
            allowed: ids on the Hub, and folders.
        """
        place, _, revision = name.rpartition("@") if "@" in name else (name, "", "")
        kept = place.removeprefix("hf://")
        if kept not in allowed:
            absolute = str(Path(place).resolve()) if place.startswith("/") else None
            if absolute is None or absolute not in {
                str(Path(entry).resolve()) for entry in allowed if entry[:1] == "/"
            }:
                return None
            kept = absolute
        return cls(kept, revision or "HEAD")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter in a folder: of which commit, its rank, and its relative error against the state."""

    folder: Path
    commit: str
    rank: int
    error: float


def served_adapter(named: Named, base: str, cache: Path, *, max_rank: int | None = None) -> ServedAdapter:
    """Fetch a revision, prove that its weights are those of its facts, check that the base is its base, and write its PEFT adapter.

    Args:
        base: the model that the server serves: a folder, or an id on the Hub.
        cache: the adapter is written below it, in a folder named after the commit.
        max_rank: the highest rank that the server takes; None: any that servers know.

    Raises:
        RepositoryError: the revision changes nothing, or no adapter of a rank that the server takes is near enough to it.
        UnsupportedModelError: it is one that servers serve wrongly or not at all as an adapter: side memories, routed experts.
        RevisionError, RemoteError, CorruptStoreError, BaseError: as in `patchhub.load`.
    """
    from patchhub.export.adapters import BaseName, adapter_files, make_adapter
    from patchhub.fsio import os_errors, write_atomically
    from patchhub.models.checkpoint import open_checkpoint
    from patchhub.models.fingerprint import check_tensors
    from patchhub.objects import block_of
    from patchhub.porcelain.exchange import TOLERANCE
    from patchhub.remotes.hub import adapter_name
    from patchhub.worktree.loading import open_state

    state = open_state(named.place, named.revision, base=base)
    if state.commit is None or (not state.weights and not state.routing.memories):
        raise RepositoryError(f"{named.revision} of {named.place} changes nothing", remedy=f"Ask for {base} itself.")
    if state.routing.memories:
        raise UnsupportedModelError(
            f"{named.revision} of {named.place} routes queries to a side memory, which no LoRA adapter can do",
            remedy=_LOAD,
        )
    checkpoint = open_checkpoint(base)
    check_tensors(state.base, checkpoint, state.weights)
    if state.stored.keys() & state.weights.keys():
        raise UnsupportedModelError(
            f"{named.revision} of {named.place} changes routed experts, and servers leave such adapters out without a word",
            remedy="Serve what `patchhub apply` writes.",
        )
    shapes = {weight: deltas[0].shape for weight, deltas in state.weights.items()}
    beyond = sorted(weight for weight, (_, inner) in shapes.items() if block_of(weight) == weight or inner == 1)
    if beyond:
        raise RepositoryError(
            f"{named.revision} of {named.place} changes {beyond[0]}, and no LoRA adapter holds more than linear weights of the blocks",
            remedy="Serve what `patchhub apply` writes.",
        )
    adapter = make_adapter(state.weights, shapes, tolerance=TOLERANCE)
    if max_rank is not None and adapter.rank > max_rank:
        raise RepositoryError(
            f"the adapter of {named.revision} of {named.place} has rank {adapter.rank}, and the server takes {max_rank}",
            remedy=f"Start it with --max-lora-rank {adapter.rank}, or serve what `patchhub apply` writes.",
            rank=adapter.rank,
        )
    name = BaseName(base, None, fan_in_fan_out=state.orientation == "in_out")
    folder = cache / "served" / adapter_name(named.place, state.commit)
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file, data in adapter_files(adapter, name).items():
        write_atomically(folder / file, (data,))
    return ServedAdapter(folder, state.commit, adapter.rank, adapter.error)


_LOAD: Final = "Load it with patchhub.load in a server of your own."
