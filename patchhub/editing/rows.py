"""Texts on their way through the blocks: keys of requests, and rows opened for value optimisation.

The keys are read in batches on the way up. A row is where a value enters the last edited layer, and the batch that runs from there on: what
cannot change while values are optimised is run once and kept, hidden states below the edited layer, keys and values of the positions before
the subject's last token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from patchhub.editing.locate import Encoded
from patchhub.models.tracing import Pass, Prefix, Stack, left_padded, right_padded


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one batch from the subject's last token on, over a frozen prefix; whole texts where no state can be kept.

    Attributes:
        last: column of the subject's last token: 0 over a prefix.
    """

    start: Pass
    ids: Int[Tensor, "rows time"]
    mask: Int[Tensor, "rows all"]
    positions: Int[Tensor, "rows time"]
    prefix: Prefix | None
    hidden: Float[Tensor, "rows time d"]  # before the first block that runs at each step
    fact: Int[Tensor, " rows"]  # index into the batch's facts
    last: Int[Tensor, " rows"]

    def at_last(self, states: Float[Tensor, "rows time d"]) -> Float[Tensor, "rows d"]:
        """States at the subjects' last tokens."""
        return states[torch.arange(len(states), device=states.device), self.last.to(states.device)]

    def put_last(
        self, states: Float[Tensor, "rows time d"], new: Float[Tensor, "rows d"]
    ) -> Float[Tensor, "rows time d"]:
        """States with others at the subjects' last tokens."""
        return states.index_put((torch.arange(len(states), device=states.device), self.last.to(states.device)), new)

    def select(self, rows: Int[Tensor, " kept"], fact: Int[Tensor, " kept"]) -> Rows:
        prefix = self.prefix.select(rows) if self.prefix is not None else None
        ids, mask, positions = self.ids[rows], self.mask[rows], self.positions[rows]
        start = self.start.stack.begin(ids, mask, positions, prefix)
        return Rows(start, ids, mask, positions, prefix, self.hidden[rows], fact, self.last[rows])

    def lend(self, rows: Int[Tensor, " kept"]) -> Rows:
        """Some rows, for one pass: what stands before them is copied as a block asks for it, one block at a time."""
        prefix = self.prefix.lend(rows) if self.prefix is not None else None
        ids, mask, positions = self.ids[rows], self.mask[rows], self.positions[rows]
        start = self.start.stack.begin(ids, mask, positions, prefix)
        return Rows(start, ids, mask, positions, prefix, self.hidden[rows], self.fact[rows], self.last[rows])

    def to(self, dtype: torch.dtype) -> Rows:
        """The same in the type that the model is in now."""
        prefix = self.prefix.to(dtype) if self.prefix is not None else None
        start = self.start.stack.begin(self.ids, self.mask, self.positions, prefix)
        return replace(self, start=start, prefix=prefix, hidden=self.hidden.to(dtype))


class Site(ABC):
    """Where the change enters a layer: which blocks run again at each step, and what the change is added to.

    A change has one vector per part; part 0 is the one that is written into weights.
    """

    parts: int

    def __init__(self, stack: Stack, layer: int) -> None:
        self.stack, self.layer = stack, layer

    @property
    @abstractmethod
    def first(self) -> int:
        """The first block that runs at each step."""

    @abstractmethod
    def run(
        self, rows: Rows, change: Float[Tensor, "rows parts d"], row: Int[Tensor, " m"], column: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        """Hidden states after the last block, with the change added at the subject's last token; columns count from there."""

    @abstractmethod
    def unedited(self, rows: Rows) -> Float[Tensor, "rows parts d"]:
        """What the change is added to."""

    def lengths(self, rows: Rows, unedited: Float[Tensor, "rows parts d"]) -> Float[Tensor, "rows parts"]:
        """What the clamp and the decay of each part are relative to: the length of what the change is added to."""
        length: Tensor = unedited.norm(dim=-1)
        return length

    def unit(self, hidden: Float[Tensor, "groups parts d"]) -> Float[Tensor, "groups parts 1"]:
        """What lengths are measured in: 1, or in a model with norms, which do not see them, the root mean square of each part."""
        if self.stack.architecture.normed:
            return hidden.square().mean(-1, keepdim=True).sqrt()
        return torch.ones_like(hidden[..., :1])


class BlockOutput(Site):
    """The output of the layer's block: MEMIT's site."""

    parts = 1

    @property
    def first(self) -> int:
        return self.layer + 1

    def run(
        self, rows: Rows, change: Float[Tensor, "rows parts d"], row: Int[Tensor, " m"], column: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        first = (rows.at_last(rows.hidden).float() + change[:, 0]).to(rows.hidden.dtype)
        return rows.start.finish(rows.put_last(rows.hidden, first), self.first, row, rows.last[row] + column)

    def unedited(self, rows: Rows) -> Float[Tensor, "rows parts d"]:
        return rows.at_last(rows.hidden)[:, None].float()

    def unit(self, hidden: Float[Tensor, "groups parts d"]) -> Float[Tensor, "groups parts 1"]:
        return torch.ones_like(hidden[..., :1])


class _AtProjections(Site):
    """The outputs of some linear maps of the layer, with everything behind them in the pass."""

    @property
    def first(self) -> int:
        return self.layer

    @abstractmethod
    def _hook(self, part: int, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Give the output of the map of a part to a function; what that returns takes its place."""

    def run(
        self, rows: Rows, change: Float[Tensor, "rows parts d"], row: Int[Tensor, " m"], column: Int[Tensor, " m"]
    ) -> Float[Tensor, "m d"]:
        def adding(part: int) -> Callable[[Tensor], Tensor]:
            def add(output: Tensor) -> Tensor:
                found = output.view(rows.hidden.shape)  # OPT's feed-forward part has no rows
                first = (rows.at_last(found).float() + change[:, part].to(output.device)).to(output.dtype)
                return rows.put_last(found, first).view(output.shape)

            return add

        handles = [self._hook(part, adding(part)) for part in range(self.parts)]
        blocks, column = len(self.stack.blocks), rows.last[row] + column
        try:
            if self.layer < blocks - 1:
                return rows.start.finish(rows.hidden, self.first, row, column)
            # The change enters the last feed-forward part itself, which then runs everywhere.
            return rows.start.run(rows.hidden, self.first, blocks)[row, column]
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def unedited(self, rows: Rows) -> Float[Tensor, "rows parts d"]:
        found: dict[int, Tensor] = {}

        def keeping(part: int) -> Callable[[Tensor], None]:
            def keep(output: Tensor) -> None:
                found[part] = rows.at_last(output.view(rows.hidden.shape)).float().to(self.stack.device)

            return keep

        handles = [self._hook(part, keeping(part)) for part in range(self.parts)]
        try:
            rows.start.run(rows.hidden, self.layer, self.layer + 1)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[part] for part in range(self.parts)], dim=1)


class Projections(_AtProjections):
    """The outputs of the layer's feed-forward (part 0) and attention (part 1) projections: PMET's site."""

    parts = 2

    def _hook(self, part: int, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        if part == 0:
            return self.stack.hook_output(self.layer, function)
        attention = self.stack.model.get_submodule(self.stack.architecture.attn_module(self.layer))
        handle: RemovableHandle = attention.register_forward_hook(lambda module, args, output: function(output))
        return handle

    def lengths(self, rows: Rows, unedited: Float[Tensor, "rows parts d"]) -> Float[Tensor, "rows parts"]:
        """In a mixture of experts, whose output is next to nothing at some tokens, they are relative to the stream's length."""
        architecture = self.stack.architecture
        if architecture.site is None or architecture.normed:
            return super().lengths(rows, unedited)
        length: Tensor = rows.at_last(rows.hidden).float().norm(dim=-1, keepdim=True)
        return length.expand(-1, self.parts)


class FeedForward(_AtProjections):
    """The output of the layer's feed-forward projection: MEMIT's site where a norm comes behind it.

    What a norm can give is a small part of the stream, which a vector added to the stream itself would leave.
    """

    parts = 1

    def _hook(self, part: int, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        return self.stack.hook_output(self.layer, function)


@dataclass(frozen=True, eq=False)
class Fact:
    """One request as the optimiser sees it: ``rows[0]`` is the bare prompt; ``essence`` is "{subject} is a".

    ``closers`` are the tokens that may follow the target, the same tensor for targets that end alike; None: what follows is not optimised.
    ``behind`` are those that may follow what stands behind it (`Encoded.after`), but the target's first; None: all.
    The last ``others`` of the rows are in another form than the first; together they weigh ``weight``, and the rest what is left.
    Before those stand ``wordings`` rows that are of this fact alone, and so have no common beginnings with those of others.
    The target of ``sentence`` is what the model says of the subject by itself, which is to stay as likely as it is; None: nothing is.
    """

    rows: tuple[Encoded, ...]
    essence: Encoded
    closers: Bool[Tensor, " vocabulary"] | None = None
    behind: Bool[Tensor, " vocabulary"] | None = None
    wordings: int = 0
    others: int = 0
    weight: float = 0.0
    sentence: Encoded | None = None

    @property
    def shares(self) -> list[float]:
        """What each row weighs; 1 in all."""
        own = len(self.rows) - self.others
        return [(1.0 - self.weight) / own] * own + ([self.weight / self.others] * self.others if self.others else [])

    @property
    def contexts(self) -> list[int]:
        """The number of each row's context: all wordings are of `alone`."""
        front = len(self.rows) - self.others - self.wordings
        return [*range(front), *[self.alone] * self.wordings, *range(front, self.alone)]

    @property
    def alone(self) -> int:
        """The context of texts that are of this fact alone: it comes last but for the KL term's."""
        return len(self.rows) - self.wordings

    def suffix(self, row: Encoded) -> int:
        """Positions from the subject's last token to the last that predicts: the last target token, or of what follows it."""
        return row.target[1] + row.after - row.subject_last - (self.closers is None)

    @property
    def opened(self) -> list[Row]:
        """Its rows and then its sentence, as rows of fact 0."""
        rows = [Row(row, self.suffix(row), context, 0) for row, context in zip(self.rows, self.contexts, strict=True)]
        if self.sentence is not None:
            kept = self.sentence.target[1] - self.sentence.subject_last - 1
            rows.append(Row(self.sentence, kept, self.alone, 0, stays=True))
        return rows

    @property
    def texts(self) -> tuple[Encoded, ...]:
        """All that is read of it."""
        return (*self.rows, *([] if self.sentence is None else [self.sentence]), self.essence)


@dataclass(frozen=True)
class Row:
    """A text to open: how many positions are needed from the subject's last token on, its trunk, and its fact in the batch.

    Its target is to be said or, where it ``stays``, what the base says, which is to stay as likely.
    """

    encoded: Encoded
    kept: int
    trunk: int
    fact: int
    stays: bool = False


@dataclass(frozen=True, eq=False)
class Trunk:
    """The common beginnings of groups of texts. Row ``g`` of ``prefix`` belongs to group ``g``; rows are padded on the left."""

    lengths: tuple[int, ...]
    mask: Int[Tensor, "groups time"]
    prefix: Prefix | None


def beginnings(stack: Stack, groups: Sequence[Sequence[Encoded]]) -> tuple[tuple[int, ...], ...]:
    """What the texts of each group have in common before their subjects' last tokens; nothing where no state can be kept."""
    if stack.architecture.recurrent:
        return ((),) * len(groups)
    return tuple(common_beginning([text.input_ids[: text.subject_last] for text in group]) for group in groups)


def run_trunk(stack: Stack, common: Sequence[tuple[int, ...]], stop: int | None = None) -> Trunk:
    """Run the beginnings, one for each group, on the model's present weights; up to before block ``stop``, if one is given."""
    lengths = tuple(map(len, common))
    if not any(lengths):
        return Trunk(lengths, torch.zeros(len(common), 0, dtype=torch.long, device=stack.device), None)
    ids, mask, positions = left_padded(common, stack.device)
    return Trunk(lengths, mask, stack.read_prefix(ids, mask, positions, stop=stop))


def common_beginning(texts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest beginning of all texts: that of the smallest and the largest in alphabetical order."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


@torch.no_grad()
def open_rows(site: Site, rows: Sequence[Row], trunk: Trunk) -> Rows:
    """Run what cannot change of the rows, and the blocks below the site for the rest."""
    stack = site.stack
    before = torch.tensor([row.encoded.subject_last for row in rows], device=stack.device)
    fact = torch.tensor([row.fact for row in rows], device=stack.device)
    if stack.architecture.recurrent:
        whole = [row.encoded.input_ids[: row.encoded.subject_last + row.kept] for row in rows]
        ids, mask, positions = right_padded(whole, stack.device)
        start = stack.begin(ids, mask, positions)
        hidden = start.run(start.hidden, 0, site.first)
        return Rows(start, ids, mask, positions, None, hidden, fact, before)
    prefix, prefix_mask = _read_prefix(stack, rows, trunk)
    after = [row.encoded.input_ids[row.encoded.subject_last :][: row.kept] for row in rows]
    ids, mask, positions = right_padded(after, stack.device)
    positions, mask = positions + before[:, None], torch.cat([prefix_mask, mask], dim=1)
    start = stack.begin(ids, mask, positions, prefix)
    hidden = start.run(start.hidden, 0, site.first)
    return Rows(start, ids, mask, positions, prefix, hidden, fact, torch.zeros_like(before))


def _read_prefix(stack: Stack, rows: Sequence[Row], trunk: Trunk) -> tuple[Prefix | None, Int[Tensor, "rows time"]]:
    """Keys and values of everything before each row's subject's last token, padded on the left, and their mask."""
    of_row = torch.tensor([row.trunk for row in rows], device=stack.device)
    shared = trunk.prefix.select(of_row) if trunk.prefix is not None else None
    lengths = torch.tensor([trunk.lengths[row.trunk] for row in rows], device=stack.device)
    own = [row.encoded.input_ids[trunk.lengths[row.trunk] : row.encoded.subject_last] for row in rows]
    if not any(own):
        return shared, trunk.mask[of_row]
    ids, mask, positions = right_padded(own, stack.device)
    whole = torch.cat([trunk.mask[of_row], mask], dim=1)
    prefix = stack.read_prefix(ids, whole, positions + lengths[:, None], shared)
    place, mask = _to_the_right(whole)
    return prefix.rearrange(place), mask


def _to_the_right(
    mask: Int[Tensor, "rows time"],
) -> tuple[Int[Tensor, "rows kept"], Int[Tensor, "rows kept"]]:
    """Where each position comes from when all padding goes to the left and as much of it as can be is cut, and the new mask."""
    place = mask.sort(dim=1, stable=True).indices
    kept = int(mask.sum(1).max())
    place = place[:, place.shape[1] - kept :]
    return place, mask.gather(1, place)


_PASS_CPU, _PASS_GPU = (
    32,
    256,
)  # in positions, what one more pass costs: the weights are read once more, kernels started


@dataclass(frozen=True, eq=False)
class Lane:
    """Rows of about one length that run as one batch, and which of their states are read.

    Attributes:
        row, column: of each state that is read; columns count from the subject's last token.
        slot: its place among the states of all lanes: first those of the predictions, then those of the essences.
        context: of each row, which of its fact's texts it is; the essence comes last.
    """

    rows: Rows
    context: Int[Tensor, " rows"]
    row: Int[Tensor, " read"]
    column: Int[Tensor, " read"]
    slot: Int[Tensor, " read"]

    def select(
        self, kept: Bool[Tensor, " groups"], place: Int[Tensor, " groups"], slots: Int[Tensor, " slots"]
    ) -> Lane | None:
        """What is left when only some groups stay, with their new numbers and those of the slots (-1: gone); None: nothing."""
        rows = kept[self.rows.fact].nonzero()[:, 0]
        if not len(rows):
            return None
        read, new = (slots[self.slot] >= 0).nonzero()[:, 0], new_places(rows, len(self.rows.fact))
        chosen = self.rows.select(rows, place[self.rows.fact[rows]])
        return Lane(chosen, self.context[rows], new[self.row[read]], self.column[read], slots[self.slot[read]])


def open_lanes(
    site: Site, rows: Sequence[Row], read: Sequence[tuple[int, int]], trunk: Trunk
) -> list[tuple[Lane, Sequence[int]]]:
    """The rows in lanes, each with its rows' numbers; ``read`` is the row and column of every slot."""
    device, recurrent = site.stack.device, site.stack.architecture.recurrent
    lengths = [row.kept + (row.encoded.subject_last if recurrent else 0) for row in rows]
    reads: dict[int, list[tuple[int, int]]] = {}
    for slot, (row, column) in enumerate(read):
        reads.setdefault(row, []).append((column, slot))
    found: list[tuple[Lane, Sequence[int]]] = []
    for numbers in by_length(lengths, _PASS_CPU if device.type == "cpu" else _PASS_GPU):
        states = [(place, *one) for place, number in enumerate(numbers) for one in reads[number]]
        row, column, slot = torch.tensor(states, device=device).T
        context = torch.tensor([rows[number].trunk for number in numbers], device=device)
        opened = open_rows(site, [rows[number] for number in numbers], trunk)
        found.append((Lane(opened, context, row, column, slot), numbers))
    return found


def by_length(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Rows by length in groups that together cost least, padded to the longest of each; a group costs ``overhead`` positions besides."""
    sizes = sorted(set(lengths))
    counts = Counter(lengths)
    best: list[tuple[int, int]] = [(0, 0)]  # least cost of the sizes so far, and where the last group of them begins
    for stop in range(1, len(sizes) + 1):
        rows, options = 0, []
        for start in range(stop - 1, -1, -1):
            rows += counts[sizes[start]]
            options.append((best[start][0] + overhead + rows * sizes[stop - 1], start))
        best.append(min(options))
    groups: list[list[int]] = []
    stop = len(sizes)
    while stop:
        start = best[stop][1]
        held = set(sizes[start:stop])
        groups.append([number for number, length in enumerate(lengths) if length in held])
        stop = start
    return groups


def new_places(kept: Int[Tensor, " kept"], count: int) -> Int[Tensor, " count"]:
    """Where each of ``count`` items goes when only some are kept; -1 for the others."""
    places = torch.full((count,), -1, device=kept.device)
    return places.index_copy(0, kept, torch.arange(len(kept), device=kept.device))


@dataclass(frozen=True, eq=False)
class KeyRow:
    """One context of one request, cut after the subject's last token. Context 0 is the bare prompt."""

    tokens: tuple[int, ...]
    request: int
    context: int
    weight: float  # in the mean key of the request


def key_rows(encoded: Sequence[Sequence[Encoded]]) -> list[KeyRow]:
    """The contexts of each request as rows; the bare prompt comes first and weighs half, the others share the rest.

    That is the published mean over the two context types (compute_ks.py): first within a type, then over types.
    """
    rows = []
    for request, contexts in enumerate(encoded):
        others = len(contexts) - 1
        for context, row in enumerate(contexts):
            weight = 1.0 if not others else (0.5 if context == 0 else 0.5 / others)
            rows.append(KeyRow(row.input_ids[: row.subject_last + 1], request, context, weight))
    return rows


@dataclass(frozen=True, eq=False)
class Beginnings:
    """What the rows of each context have in front; a row's own tokens, at least its last one, come after it."""

    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[KeyRow], stack: Stack) -> Beginnings:
        """Nothing is in front where a block's state cannot be kept."""
        if stack.architecture.recurrent:
            return cls(((),) * (1 + max(row.context for row in rows)))
        groups: list[list[tuple[int, ...]]] = [[] for _ in range(1 + max(row.context for row in rows))]
        for row in rows:
            groups[row.context].append(row.tokens[:-1])
        return cls(tuple(common_beginning(group) if group else () for group in groups))

    def own(self, row: KeyRow) -> tuple[int, ...]:
        return row.tokens[len(self.tokens[row.context]) :]

    def run(self, stack: Stack, stop: int) -> Trunk:
        """Their keys and values in the blocks before ``stop``, on the model's present weights."""
        return run_trunk(stack, self.tokens, stop)


@dataclass(eq=False)
class Climb:
    """A batch of rows on its way up; ``hidden`` is the input of the next block for the rows' own tokens.

    Attributes:
        ids, mask, positions: of the rows' own tokens, padded on the right.
        last: column of each row's last token.
        bare: whether these are bare prompts; a batch holds only such or none.
        spilled: ``hidden`` is a file.
    """

    stack: Stack
    ids: Int[Tensor, "rows time"]
    mask: Int[Tensor, "rows time"]
    positions: Int[Tensor, "rows time"]
    last: Int[Tensor, " rows"]
    request: Int[Tensor, " rows"]
    context: Int[Tensor, " rows"]
    weight: Float[Tensor, " rows"]
    bare: bool
    hidden: Float[Tensor, "rows time d"]
    spilled: bool

    @classmethod
    def of(cls, stack: Stack, rows: Sequence[KeyRow], beginnings: Beginnings, file: Path | None = None) -> Climb:
        """The rows embedded.

        Args:
            file: where hidden states are kept; None: in memory.
        """
        own = [beginnings.own(row) for row in rows]
        ids, mask, positions = right_padded(own, stack.device)
        before = torch.tensor([len(row.tokens) for row in rows]) - torch.tensor([len(tokens) for tokens in own])
        climb = cls(
            stack,
            ids,
            mask,
            positions + before.to(stack.device)[:, None],
            last=torch.tensor([len(tokens) - 1 for tokens in own]),
            request=torch.tensor([row.request for row in rows]),
            context=torch.tensor([row.context for row in rows]),
            weight=torch.tensor([row.weight for row in rows], dtype=torch.float64),
            bare=rows[0].context == 0,
            hidden=torch.zeros(0),
            spilled=file is not None,
        )
        climb.hidden = stack.begin(ids, mask, climb.positions).hidden
        if file is not None:
            kept = torch.from_file(str(file), shared=True, size=climb.hidden.numel(), dtype=climb.hidden.dtype)
            climb.hidden = kept.view(climb.hidden.shape).copy_(climb.hidden)
        return climb

    def step(self, trunk: Trunk) -> Pass:
        """What the blocks are called with after these beginnings."""
        if trunk.prefix is None:
            return self.stack.begin(self.ids, self.mask, self.positions)
        of_row = self.context.to(trunk.mask.device)
        mask = torch.cat([trunk.mask[of_row], self.mask], dim=1)
        return self.stack.begin(self.ids, mask, self.positions, trunk.prefix.lend(of_row))

    def advance(self, step: Pass, start: int, stop: int) -> None:
        """Run the blocks from ``start`` to before ``stop``."""
        if start == stop:
            return
        hidden = step.run(self.hidden, start, stop)
        self.hidden = self.hidden.copy_(hidden) if self.spilled else hidden

    def add_to(self, keys: Float[Tensor, "n in"], found: Float[Tensor, "rows in"]) -> None:
        """Add each row's key, as it weighs, to the mean key of its request (float64, on the CPU)."""
        keys.index_add_(0, self.request, found.double().cpu() * self.weight[:, None])


def read_keys(climb: Climb, step: Pass, layer: int) -> Float[Tensor, "rows in"]:
    """The keys at the rows' last tokens; nothing after them is needed, so the feed-forward part runs at those tokens only."""
    rows, stack = torch.arange(len(climb.last)), climb.stack
    with stack.watch_keys([layer]) as seen, stack.feed_forward_at(layer, rows, climb.last) as shortened:
        step.run(climb.hidden, layer, layer + 1)
    return seen[layer][0, : len(rows)] if shortened else at(seen[layer], rows, climb.last)


def at(states: Float[Tensor, "rows time d"], row: Int[Tensor, " m"], column: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """States at some positions, wherever they live."""
    return states[row.to(states.device), column.to(states.device)]


def batches(rows: Sequence[KeyRow], beginnings: Beginnings, positions: int) -> Iterator[list[KeyRow]]:
    """Rows with equally many tokens of their own or nearly so together, bare ones apart, at most so many positions each."""
    batch: list[KeyRow] = []
    for row in sorted(rows, key=lambda row: (row.context == 0, len(beginnings.own(row)))):
        full = (len(batch) + 1) * len(beginnings.own(row)) > positions
        if batch and (full or (batch[0].context == 0) != (row.context == 0)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


_TOKENS = 8192  # positions of a batch


@torch.no_grad()
def mean_keys(stack: Stack, layer: int, rows: Sequence[KeyRow]) -> Float[Tensor, "n in"]:
    """For each request the weighted mean over its rows of the FFN output projection's input at the row's last token, float64 on the CPU.

    At the lowest edited layer these are the keys that recording will store.
    """
    requests = 1 + max(row.request for row in rows)
    keys = torch.zeros(requests, stack.architecture.shapes[layer][1], dtype=torch.float64)
    beginnings = Beginnings.of(rows, stack)
    with stack.fast():
        trunk = beginnings.run(stack, layer + 1)
        for batch in batches(rows, beginnings, _TOKENS):
            climb = Climb.of(stack, batch, beginnings)
            step = climb.step(trunk)
            climb.advance(step, 0, layer)
            climb.add_to(keys, read_keys(climb, step, layer))
    return keys
