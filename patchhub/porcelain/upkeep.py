"""Verbs that keep a repository well: `config`, `fsck`, `gc`. No torch, and NumPy in `fsck` alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar, Final

from patchhub.errors import SettingsError
from patchhub.progress import Progress, increments
from patchhub.results import Result
from patchhub.sets.settings import as_text, known_setting, read_setting, refuse_beyond, refuse_fixed, without_metric
from patchhub.store.config import Config, beside
from patchhub.store.fsck import (
    NOTHING_PACKED,
    Garbage,
    Packed,
    Report,
    check,
    delete_garbage,
    every_commit,
    pack_objects,
    reindex,
    with_proofs,
)
from patchhub.store.store import Store
from patchhub.who import FORMAT


def config(repository: Store, key: str | None = None, value: Any = None, *, unset: bool = False) -> Any:
    """All settings that differ from their defaults; or one, or one that is set or unset, as it is then.

    Raises:
        SettingsError, RepositoryError: as `config_set` and `config_unset`.
    """
    if key is None:
        return config_values(repository)
    if unset:
        return config_unset(repository, key)
    return config_get(repository, key) if value is None else config_set(repository, key, as_text(value))


def config_values(repository: Store) -> dict[str, Any]:
    """Every setting that differs from its default."""
    values = {"base.path": repository.config.base_place(repository.root), **repository.config.settings}
    return dict(sorted(values.items()))


def config_get(repository: Store, key: str) -> Any:
    """One setting, None where the default holds.

    Raises:
        SettingsError: there is no such key.
    """
    known_setting(key)
    return config_values(repository).get(key)


def config_set(repository: Store, key: str, text: str) -> Any:
    """Set one key from text; returns the value.

    Raises:
        SettingsError: no such key, or the value cannot be used.
        RepositoryError: facts are recorded with the metric already, so its settings are fixed.
    """
    known_setting(key)
    refuse_fixed(repository, key)
    value = read_setting(key, text)
    refuse_beyond(repository, key, value)
    if key in ("sign.key", "sign.allowed"):
        value = _file(value)
    if key == "base.path":
        if not Path(value).is_dir():
            raise SettingsError(f"there is no folder {value}", remedy="Give the base model's folder.")
        if not (Path(value) / "config.json").is_file():
            raise SettingsError(
                f"there is no model in {value}: it has no config.json", remedy="Give the base model's folder."
            )
        near = beside(Path(value), repository.root)
        place = {"path": str(Path(value).resolve()), "revision": None, "near": near}
        repository.change_config(lambda config: replace(config, base={**config.base, **place}))
    else:
        repository.change_config(
            lambda config: without_metric(key, replace(config, settings={**config.settings, key: value}))
        )
    return value


def _file(text: str) -> str:
    """The absolute path of a file that is there."""
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise SettingsError(f"there is no file {path}", remedy="Give the file of the key, or of the allowed signers.")
    return str(path)


def config_unset(repository: Store, key: str) -> None:
    """Go back to the default.

    Raises:
        SettingsError: there is no such key, or it has no default.
        RepositoryError: as in `config_set`.
    """
    known_setting(key)
    if key == "base.path":
        raise SettingsError(
            "base.path has no default: a store is about one base",
            remedy="Say where it is: `patchhub config base.path FOLDER`.",
        )
    refuse_fixed(repository, key)

    def without(config: Config) -> Config:
        kept = {name: value for name, value in config.settings.items() if name != key}
        return without_metric(key, replace(config, settings=kept))

    repository.change_config(without)


def fsck(repository: Store, progress: Progress, *, rebuild: bool = False) -> Report:
    """Check a whole store, and prove the weights of its commits where nothing is damaged.

    Args:
        rebuild: make its derived tables again first.
    """
    if rebuild:
        reindex(repository)
    progress.stage("checking objects", sum(1 for _ in repository.objects.ids()))
    report = check(repository, progress=increments(progress))
    commits = every_commit(repository) if report.sound else []
    if commits:
        from patchhub.sets.proofs import prove  # it needs NumPy

        progress.stage("proving weights", 0)
        tips = repository.refs().values()
        report = with_proofs(repository, report, prove(repository, commits, tips=tips, advance=progress.advance))
    progress.close()
    return report


GRACE: Final = timedelta(days=14)


@dataclass(frozen=True)
class Collected(Result):
    """What was deleted, or would be (`dry_run`), and what was packed."""

    TOLD: ClassVar = {"bytes": "size"}

    items: tuple[Garbage, ...]
    dry_run: bool
    packed: Packed = NOTHING_PACKED

    def words(self) -> str:
        would = "would " if self.dry_run else ""
        deleted = f"{'delete' if would else 'deleted'} {len(self.items)} files, {self.size / 1e6:.2f} MB"
        packed = (
            f"; {would}{'pack' if would else 'packed'} {self.packed.objects} objects into {self.packed.packs} packs"
        )
        return f"{would}{deleted}{packed if self.packed.objects else ''}"

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(item.size for item in self.items)

    @property
    def counts(self) -> Mapping[str, int]:
        """How many of each kind."""
        return Counter(item.kind for item in self.items)


def collect(
    repository: Store, *, now: str, grace: timedelta = GRACE, dry_run: bool = False, pack: bool = False
) -> Collected:
    """Delete objects that neither refs, notes nor any operation of the log lead to, leftovers of interrupted writes, and cached
    factors of metrics that nothing names; all of them only if older than `grace`.

    What the operation log reaches is never deleted, however old: `undo` always works.

    Args:
        pack: put objects that are files of their own into packs then.

    Raises:
        CorruptStoreError: the store is damaged; nothing was deleted.
    """
    before = (datetime.strptime(now, FORMAT).replace(tzinfo=timezone.utc) - grace).timestamp()
    found = tuple(delete_garbage(repository, before, dry_run=dry_run))
    packed = pack_objects(repository, dry_run=dry_run) if pack else NOTHING_PACKED
    return Collected(found, dry_run, packed)
