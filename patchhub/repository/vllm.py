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
from pathlib import Path
from typing import Any, Final

from patchhub.cache import user_folder
from patchhub.errors import PatchhubError, SettingsError

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

    from patchhub.porcelain.serving import Named, served_adapter

    log = logging.getLogger("vllm.patchhub")  # below vLLM's own logger, so that its settings hold

    class Resolver(LoRAResolver):  # type: ignore[misc]
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
