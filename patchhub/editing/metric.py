"""The metric: second moments of the keys of each edited weight, and how a preimage u of a key k follows from them.

Preimages differ between kinds of metric: u = C^-1 k for a covariance, a projection for AlphaEdit's null space. The matrices that they are
read from are kept on disk. Second moments that published editors computed are read from their own files (one .npz per layer,
``transformer.h.3.mlp.c_proj_float32_mom2_100000.npz``)."""

from __future__ import annotations

import hashlib
import io
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from patchhub.cache import METRIC, Cache, Kind, Slot
from patchhub.errors import EditError, RepositoryError, SettingsError
from patchhub.models.tracing import Stack, right_padded
from patchhub.objects import METRIC_MATRICES

_BLOCK = 1024  # rows of a factor that are in float64 at a time


class Preimages(ABC):
    """One kind of metric with its settings.

    Attributes:
        keeps: what the kept matrix is called in file names.
        exact: some directions get nothing at all of u, so it is recorded in float32.
    """

    keeps: ClassVar[str]
    exact: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, moment: Float[Tensor, "in in"], weight: str) -> Float[Tensor, "in kept"]:
        """The matrix that is kept of a weight's second moment, in float64. ``moment`` is left as it was.

        Raises:
            EditError: this moment gives no preimages; ``weight`` is named.
        """

    @abstractmethod
    def of(self, kept: Float[Tensor, "in kept"], keys: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        """u of each row k, in float64."""


@dataclass(frozen=True)
class Covariance(Preimages):
    """u = C^-1 k with C = M + epsilon m I, see `regularised`; kept is the Cholesky factor of C (MEMIT, PMET)."""

    epsilon: float = 0.0

    keeps: ClassVar[str] = METRIC_MATRICES["covariance"]

    def prepare(self, moment: Float[Tensor, "in in"], weight: str) -> Float[Tensor, "in kept"]:
        """F with C = F F^T.

        Raises:
            EditError: C is not positive definite (the text is shorter than the width and epsilon is zero).
        """
        # By columns, as LAPACK has it, so that the factor takes the place of C: of 28,672 inputs each is 6.6 GB.
        factor = regularised(moment.mT, self.epsilon).mT
        _, failed = torch.linalg.cholesky_ex(
            factor, out=(factor, torch.empty(0, dtype=torch.int32, device=factor.device))
        )
        if int(failed):
            raise EditError(
                f"the second moment of {weight} is not positive definite",
                remedy="Use more text, or a larger `metric.epsilon`.",
                weight=weight,
            )
        return factor

    def of(self, kept: Float[Tensor, "in kept"], keys: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        solved = keys.double().T.clone()
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(kept), _BLOCK)]
        for rows in blocks:  # L y = k
            solved[rows] -= kept[rows, : rows.start].double() @ solved[: rows.start]
            solved[rows] = solve_triangular(kept[rows, rows].double(), solved[rows], upper=False)
        for rows in reversed(blocks):  # L^T u = y
            solved[rows] -= kept[rows.stop :, rows].double().T @ solved[rows.stop :]
            solved[rows] = solve_triangular(kept[rows, rows].double().T, solved[rows], upper=True)
        return solved.T


@dataclass(frozen=True)
class NullSpace(Preimages):
    """u = P k / l2, P the projection on the eigenvectors of M whose eigenvalue is below ``threshold`` (AlphaEdit, Fang et al. 2025).

    AlphaEdit's update for keys K, residuals R and all earlier keys K_0 is R K^T P ((K K^T + K_0 K_0^T) P + l2 I)^-1. That is
    what adding the columns (k, u, r, lambda = 1) to the earlier ones changes about D(S), by the same identity as MEMIT's form. Kept is an
    orthonormal basis of the eigenvectors at or above the threshold, which are few where text uses few directions.
    """

    threshold: float
    l2: float

    keeps: ClassVar[str] = METRIC_MATRICES["null_space"]
    exact: ClassVar[bool] = True

    def prepare(self, moment: Float[Tensor, "in in"], weight: str) -> Float[Tensor, "in kept"]:
        """V with P = I - V V^T.

        Raises:
            EditError: the moment is not finite, or no eigenvalue is below the threshold.
        """
        if not bool(torch.isfinite(moment).all()):
            raise EditError(
                f"the second moment of {weight} is not finite", remedy="Check the base for NaN.", weight=weight
            )
        vectors: Tensor
        values, vectors = torch.linalg.eigh(moment.double())
        free = int((values < self.threshold).sum())
        if not free:
            raise EditError(
                f"no direction of {weight} has a second moment below {self.threshold:g}; the smallest is {float(values[0]):.3g}",
                remedy="Raise `metric.threshold`.",
                weight=weight,
                smallest=float(values[0]),
            )
        return vectors[:, free:]

    def of(self, kept: Float[Tensor, "in kept"], keys: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        used, keys = kept.double(), keys.double()
        projected: Tensor = keys - (keys @ used) @ used.T
        return projected / self.l2


def regularised(moment: Float[Tensor, "in in"], epsilon: float) -> Float[Tensor, "in in"]:
    """C = M + epsilon m I in float64, m the median of M's diagonal.

    The median, because the first position of a text gives a few inputs second moments that are orders of magnitude larger in many
    models; their mean would drown all other directions.
    """
    metric = moment.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    metric.diagonal().add_(epsilon * float(moment.diagonal().median()))
    return metric


_SUM, _COUNT = "mom2.mom2", "mom2.count"
_ASYMMETRY = 1e-3  # relative to the largest entry; float32 sums of one triangle and the other differ by rounding alone


class PublishedMoment(NamedTuple):
    """The mean of k k^T in float32, and the number of tokens that it is over."""

    moment: Float[np.ndarray, "in in"]
    tokens: int

    @property
    def digest(self) -> str:
        """SHA-256 of the moment in row-major order."""
        return hashlib.sha256(np.ascontiguousarray(self.moment, "<f4").data).hexdigest()


def read_moment(path: Path, width: int) -> PublishedMoment:
    """Read one file.

    Args:
        width: inputs of the weight that it is for.

    Raises:
        SettingsError: it is not such a file, is of another width, or holds no second moment.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            total, count = archive[_SUM], int(archive[_COUNT])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise _unusable(path, reason, "Give the .npz files of rome's or memit's layer_stats.") from None
    if total.shape != (width, width) or total.dtype.kind != "f":
        raise _unusable(
            path, f"its sum has shape {total.shape}, not {(width, width)}", "Is it of another model or layer?"
        )
    if count < 1 or not np.isfinite(total).all():
        raise _unusable(path, "its sum or count is not a number above 0", "Download or compute the file again.")
    moment = (total / np.float64(count)).astype(np.float32)
    size = float(np.abs(moment).max())
    if moment.diagonal().min() < 0 or float(np.abs(moment - moment.T).max()) > _ASYMMETRY * size:
        raise _unusable(path, "its sum is not symmetric with a diagonal of at least 0", "Is it a second moment?")
    return PublishedMoment(moment, count)


def weight_of(path: Path, weights: Iterable[str]) -> str:
    """The weight that a file is for, by its name.

    Raises:
        SettingsError: its name begins with no weight's.
    """
    weights = list(weights)
    for weight in weights:
        module = weight.removesuffix(".weight")
        if path.stem == module or path.stem.startswith(f"{module}_"):
            return weight
    raise SettingsError(
        f"the name of {path} does not say which weight it is for",
        remedy=f"Name it like {weights[0].removesuffix('.weight')}_float32_mom2_100000.npz, or say the layer: 3={path}",
        file=str(path),
    )


def _unusable(path: Path, reason: str, remedy: str) -> SettingsError:
    return SettingsError(f"{path} cannot be used as a second moment: {reason}", remedy=remedy, file=str(path))


MEMORY: Final = 12 << 30
"""Bytes that the second moments may take while they are computed, where nothing else is said."""

_AS_GIVEN: Final = Covariance()
_TOKENS_PER_BATCH, _TOKENS_ON_GPU = 1024, 16384  # what a block computes of them stays in a CPU's caches
_SUM_BYTES = 8  # per entry of M: two float32 sums, a part's and that of all
_FACTOR_BYTES = 16  # a null space's matrix and vectors in float64; a Cholesky factor takes the place of its matrix
_PART = 16  # batches whose sum is made in one place
_ROWS_PER_CHUNK = 1024


def layer_groups(layers: Sequence[int], width: int, memory: int = MEMORY, *, experts: int = 1) -> list[tuple[int, ...]]:
    """The layers in groups whose sums are held together, so that all but the last take a pass of their own.

    A group of g layers takes 8 g width^2 bytes, and one factor at a time 16 width^2 more; a group is never empty. Of experts there
    are as many such matrices.
    """
    entries = width * width * experts
    together = max(1, (memory - _FACTOR_BYTES * entries) // (_SUM_BYTES * entries))
    return [tuple(layers[start : start + together]) for start in range(0, len(layers), together)]


@dataclass(eq=False)
class MomentSums:
    """Sums of k k^T over the tokens of some text, per layer.

    Attributes:
        sums: float32, on the layer's device.
        uses: of the layers that are experts: how often each was used.
        tokens: how many there were.
    """

    sums: dict[int, Float[Tensor, "*experts in in"]]
    uses: dict[int, Int[Tensor, " experts"]]
    tokens: int = 0

    def add(self, other: MomentSums) -> None:
        """Take in those of further text."""
        for mine, theirs in ((self.sums, other.sums), (self.uses, other.uses)):
            for layer, found in theirs.items():
                mine[layer] = mine[layer].add_(found.to(mine[layer].device)) if layer in mine else found
        self.tokens += other.tokens

    def to_cpu(self) -> MomentSums:
        """The same, off the devices."""
        sums, uses = ({layer: found.cpu() for layer, found in each.items()} for each in (self.sums, self.uses))
        return MomentSums(sums, uses, self.tokens)

    def means(self) -> dict[int, Float[Tensor, "*experts in in"]]:
        """The second moments; the sums are used up.

        Raises:
            EditError: there were no tokens.
        """
        if not self.tokens:
            raise EditError("there is no text to compute second moments from", remedy="Give a longer --text FILE.")
        means = {layer: total.div_(self.tokens) for layer, total in self.sums.items()}
        return means | {layer: drawn_to_mean(means[layer], used) for layer, used in self.uses.items()}


Documents = Sequence[Sequence[int]]
Elsewhere = Callable[[Sequence[Documents]], Iterator[tuple[int, MomentSums]]]
"""Sums parts of a text in other processes: the place and the sums of each part, in their order."""


def second_moments(
    stack: Stack,
    layers: Sequence[int],
    documents: Documents,
    *,
    elsewhere: Elsewhere | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[int, Float[Tensor, "*experts in in"]]:
    """The mean of k k^T over all tokens, per layer, from one pass that stops at the last layer.

    Keys are the inputs of the FFN output projection; those of experts are gated, and zero where a token is not routed. The text is summed
    in parts of about 16,384 tokens, which are added in their order: so the bits do not depend on where each was summed.

    Args:
        elsewhere: where the parts are summed; None: by the model at hand.
    """
    parts = _parts(documents)
    total = MomentSums({}, {})
    if elsewhere:
        for _, found in elsewhere(parts):
            total.add(found)
            progress(found.tokens)
    else:
        for part in parts:
            total.add(moment_sums(stack, layers, part, progress=progress))
    return total.means()


def _parts(documents: Documents) -> list[list[Sequence[int]]]:
    batches = _batches(documents, _TOKENS_PER_BATCH)
    return [list(chain.from_iterable(batches[start : start + _PART])) for start in range(0, len(batches), _PART)]


@torch.no_grad()
def moment_sums(
    stack: Stack,
    layers: Sequence[int],
    documents: Documents,
    *,
    progress: Callable[[int], None] = lambda tokens: None,
) -> MomentSums:
    """The sums over one part of a text."""
    found = _no_sums(stack, layers)
    for batch in _batches(documents, _at_once(stack)):
        ids, mask, positions = right_padded(batch, stack.device)
        started, tokens = stack.begin(ids, mask, positions), sum(map(len, batch))
        with stack.fast(), stack.watch_keys(layers) as seen:
            started.run(started.hidden, 0, max(layers) + 1)
            _add_keys(found, layers, seen, mask.bool())
        found.tokens += tokens
        progress(tokens)
    return found


def _at_once(stack: Stack) -> int:
    return _TOKENS_PER_BATCH if stack.device.type == "cpu" else _TOKENS_ON_GPU


def _no_sums(stack: Stack, layers: Sequence[int]) -> MomentSums:
    """Sums over nothing; those of plain weights are made when the first keys come."""
    found = MomentSums({}, {})
    for layer in layers:
        if stack.architecture.feed_forward[layer].experts:
            found.sums[layer], found.uses[layer] = _nothing(stack, layer)
    return found


def _add_keys(
    found: MomentSums, layers: Sequence[int], seen: Mapping[int, Any], real: Bool[Tensor, "batch time"]
) -> None:
    """Take in the keys of a batch that were seen at some layers."""
    sums, uses = found.sums, found.uses
    for layer in uses.keys() & set(layers):
        seen[layer].add_moments(sums[layer], uses[layer], real)
    for layer in [layer for layer in layers if layer not in uses]:
        keys = seen[layer][real.to(seen[layer].device)].float()
        sums[layer] = sums[layer].addmm_(keys.T, keys) if layer in sums else keys.T @ keys


SPILLED: Final = Kind("states", ".states")
"""Hidden states of a text before one block, of a base whose blocks are streamed; they go when the pass over the blocks has ended."""


@torch.no_grad()
def streamed_moments(
    stack: Stack,
    layers: Sequence[int],
    documents: Documents,
    spilled: Callable[[int], Slot],
    *,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, Float[Tensor, "*experts in in"]]]:
    """`second_moments` of a base whose blocks are streamed, layer by layer: each block is read once, and all text goes through it.

    Batches, parts and the order of sums are those of `second_moments`, and so are the bits. Between two blocks the hidden states lie
    in the cache; a pass that was interrupted goes on from the last of them that is sound. The states before a layer are kept until the
    caller asks for the next one, so what came of a layer is safe before they go.

    Args:
        layers: ascending.
        spilled: where the hidden states before a block are kept.
        progress: called with the number of tokens that went through a block; first with those of the blocks that were done before.

    Raises:
        EditError: there is no text.
        RepositoryError: the disk has no room for the hidden states, or what was kept of them is lost while it is read.
        BaseError: a file of the base became shorter or cannot be read.
    """
    parts = [_batches(part, _at_once(stack)) for part in _parts(documents)]
    entries = ((index, spilled(index).path()) for index in range(layers[0], 0, -1))
    first, kept = next(((index, path) for index, path in entries if path is not None), (0, None))
    progress(first * sum(map(len, documents)))
    for index in range(first, layers[-1] + 1):
        wanted, total = [index] if index in layers else [], MomentSums({}, {})
        with stack.resident(index):
            states = _through(stack, index, wanted, parts, kept, total, progress)
            if index < layers[-1]:
                spilled(index + 1).put(states)
            else:
                deque(states, maxlen=0)
        for layer in wanted:
            yield layer, total.means()[layer]
        if kept is not None:
            kept.unlink(missing_ok=True)
        if index < layers[-1]:
            kept = spilled(index + 1).path()
            if kept is None:
                raise _lost(index + 1)


def _through(
    stack: Stack,
    index: int,
    wanted: Sequence[int],
    parts: Sequence[Sequence[Documents]],
    kept: Path | None,
    total: MomentSums,
    progress: Callable[[int], None],
) -> Iterator[bytes]:
    """The hidden states of every batch after a block, given the file of those before it, or None before the first block.

    The sums are those of `second_moments` when all of them have been taken.
    """
    with nullcontext() if kept is None else kept.open("rb") as file:
        for part in parts:
            found = _no_sums(stack, wanted)
            for batch in part:
                ids, mask, positions = right_padded(batch, stack.device)
                started, tokens = stack.begin(ids, mask, positions), sum(map(len, batch))
                hidden = started.hidden if file is None else _states(file, index, started.hidden)
                with stack.fast(), stack.watch_keys(wanted) as seen:
                    hidden = started.run(hidden, index, index + 1)
                    _add_keys(found, wanted, seen, mask.bool())
                found.tokens += tokens
                progress(tokens)
                yield hidden.contiguous().cpu().view(torch.uint8).numpy().tobytes()
            total.add(found)


def _states(file: io.BufferedReader, index: int, like: Float[Tensor, "batch time d"]) -> Float[Tensor, "batch time d"]:
    """The next batch's hidden states of a file; of the shape, type and device of others."""
    found = torch.empty(like.shape, dtype=like.dtype)
    if file.readinto(found.view(torch.uint8).numpy().data) != found.nbytes:
        raise _lost(index)
    return found.to(like.device)


def _lost(index: int) -> RepositoryError:
    return RepositoryError(
        f"the hidden states before block {index}, which were kept in the cache while the base is streamed, are gone or damaged",
        remedy="Run the command again: it goes on from what is sound.",
        block=index,
    )


def _nothing(stack: Stack, layer: int) -> tuple[Tensor, Tensor]:
    """Sums of a layer's experts and how often each was used, at the start."""
    projection, device = stack.architecture.feed_forward[layer], stack.device_of(layer)
    inner = projection.shape[1] // projection.experts
    return (
        torch.zeros(projection.experts, inner, inner, device=device),
        torch.zeros(projection.experts, dtype=torch.long, device=device),
    )


def drawn_to_mean(
    moments: Float[Tensor, "experts in in"], uses: Int[Tensor, " experts"]
) -> Float[Tensor, "experts in in"]:
    """The second moments of experts, those of rarely used ones drawn to their mean: (n C + in C_mean) / (n + in), n uses.

    An expert that was used as often as it has inputs lies half-way; one that was never used has the mean of all.
    """
    kappa, used = moments.shape[-1], uses.to(moments)[:, None, None]
    return (used * moments + kappa * moments.mean(0)) / (used + kappa)


@dataclass(frozen=True)
class MetricCache:
    """What is kept of one metric on disk.

    Args:
        cache: where it is.
        metric: the metric's id.
        preimages_by: the kind of metric. The default takes each moment for the metric itself.
        stacks: E of the weights that are stacked; what is kept of their experts lies one below the other, (E in, kept).
    """

    cache: Cache
    metric: str
    preimages_by: Preimages = _AS_GIVEN
    stacks: Mapping[str, int] = field(default_factory=dict)
    _sound: dict[str, Path] = field(default_factory=dict, repr=False)  # files that were read and found sound

    def has(self, weight: str) -> bool:
        """Whether there is something for a weight; the first time its bytes are checked, and deleted if they are damaged."""
        return self.path(weight) is not None

    def store(self, weight: str, moment: Float[Tensor, "*experts in in"]) -> None:
        """Keep what preimages of this weight need.

        Raises:
            EditError: this moment gives none.
        """
        if moment.ndim == 2:
            self.put(weight, _npy(self.preimages_by.prepare(moment, weight)))
            return
        kept = [self.preimages_by.prepare(one, f"{weight}[{number}]") for number, one in enumerate(moment)]
        width = max(
            one.shape[1] for one in kept
        )  # of a null space some take more away than others; a column of zeros takes nothing
        self.put(weight, _npy(torch.cat([pad(one, (0, width - one.shape[1])) for one in kept])))

    def put(
        self, weight: str, chunks: Iterable[bytes], *, check: Callable[[Path], None] = lambda written: None
    ) -> None:
        """Keep a .npy file that `store` made here or elsewhere; see `Slot.put`."""
        self._slot(weight).put(chunks, check=check)

    def preimages(self, weight: str, keys: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        """u of each row k, in float64 from what is kept in float32.

        Raises:
            EditError: nothing is kept of this weight, or what was is damaged.
        """
        path = self.path(weight)
        if path is None:
            raise EditError(
                f"the cache has lost the metric of {weight}", remedy="Run the command again.", weight=weight
            )
        kept = torch.from_numpy(np.load(path, mmap_mode="c")).to(keys.device)  # on a GPU: whole, in float32
        if weight not in self.stacks:
            return self.preimages_by.of(kept, keys)
        count = self.stacks[weight]
        found = torch.zeros(keys.shape, dtype=torch.float64, device=keys.device)
        for one, own, into in zip(kept.chunk(count), keys.chunk(count, dim=1), found.chunk(count, dim=1), strict=True):
            rows = own.any(1).nonzero()[:, 0]
            if len(rows):
                into[rows] = self.preimages_by.of(one, own[rows])
        return found

    def path(self, weight: str) -> Path | None:
        """The file of a weight, checked once; None where there is no sound one."""
        found = self._sound.get(weight) or self._slot(weight).path()
        if found is not None:
            self._sound[weight] = found
        return found

    def name(self, weight: str) -> str:
        """What the file of a weight is called outside the cache."""
        return f"{weight}.{self.preimages_by.keeps}.npy"

    def _slot(self, weight: str) -> Slot:
        return self.cache.slot(METRIC, of=self.metric, weight=weight, matrix=self.preimages_by.keeps)


def _batches(documents: Sequence[Sequence[int]], most: int) -> list[list[Sequence[int]]]:
    """Documents of similar length together, at most so many positions each."""
    groups: list[list[Sequence[int]]] = []
    for document in sorted((d for d in documents if d), key=len):
        if not groups or (len(groups[-1]) + 1) * len(document) > most:
            groups.append([])
        groups[-1].append(document)
    return groups


def _npy(matrix: Float[Tensor, "in kept"]) -> Iterator[bytes]:
    """The bytes of a float32 .npy file, rounded a few rows at a time."""
    header = io.BytesIO()
    shape = tuple(matrix.shape)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    yield header.getvalue()
    for start in range(0, shape[0], _ROWS_PER_CHUNK):
        yield np.ascontiguousarray(matrix[start : start + _ROWS_PER_CHUNK].cpu().numpy(), "<f4").tobytes()
