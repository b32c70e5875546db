"""Batches: packing, collation, and an order that depends on nothing but seed and epoch, so that it can be resumed."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from omnilora.errors import BadValue
from omnilora.training.encode import MASKED, Example

MEGABATCH = 50  # batches that are sorted by length together


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Rows joined to at most ``length`` tokens, fullest fit first.

    Positions restart with every piece, and the first label of a piece is masked: it would be predicted from the
    piece before.
    """
    bins: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted
    for example in sorted(examples, key=len, reverse=True):
        at = bisect.bisect_left(free, (len(example), -1))
        if at == len(free):
            bins.append([example])
            bisect.insort(free, (length - len(example), len(bins) - 1))
        else:
            left, home = free.pop(at)
            bins[home].append(example)
            bisect.insort(free, (left - len(example), home))
    out = []
    for pieces in bins:
        joined = Example([], [], [])
        for p in pieces:
            assert p.labels is not None and joined.labels is not None and joined.positions is not None
            joined.ids += p.ids
            joined.labels += [MASKED, *p.labels[1:]]
            joined.positions += range(len(p.ids))
        out.append(joined)
    return out


class Collate:
    """Examples → a batch of tensors, padded on the right.

    Language models: input_ids, attention_mask, labels (batch, length), and position_ids when packed. Classification:
    labels (batch,). Pairs: input_ids (2·batch, length), anchors first, and score (batch,) where given.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [e.ids for e in examples]
        if examples[0].other is not None:
            rows = rows + [e.other for e in examples if e.other is not None]
        width = max(map(len, rows))
        batch = {"input_ids": _padded(rows, width, self.pad),
                 "attention_mask": _padded([[1] * len(r) for r in rows], width, 0)}  # fmt: skip
        first = examples[0]
        if first.labels is not None:
            batch["labels"] = _padded([e.labels or [] for e in examples], width, MASKED)
        elif first.other is not None:
            if first.target is not None:
                batch["score"] = torch.tensor([float(e.target or 0.0) for e in examples])
        elif first.target is not None:
            batch["labels"] = torch.tensor([int(e.target or 0) for e in examples])
        if first.positions is not None:
            batch["position_ids"] = torch.stack([_positions(e.positions or [], width) for e in examples])
        return batch


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([[*r, *[fill] * (width - len(r))] for r in rows], dtype=torch.long)


def _positions(positions: Sequence[int], width: int) -> Tensor:
    """Padding is a piece of its own: it neither sees nor is seen."""
    return torch.tensor([*positions, *range(width - len(positions))], dtype=torch.long)


def order(lengths: Sequence[int] | int, batch_size: int, seed: int, epoch: int, world: int = 1,
          grouped: bool = True) -> list[list[int]]:  # fmt: skip
    """The global batches of an epoch, each of at most ``batch_size · world`` rows.

    Rows are shuffled, sorted by length within runs of 50 batches, cut, and the batches shuffled: little padding,
    no bias of the order. Not ``grouped``: shuffled only, for rows that are joined without padding; long rows that meet in
    one batch would only need more memory. With several processes a last batch smaller than their number is dropped.
    """
    count = lengths if isinstance(lengths, int) else len(lengths)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    rows = torch.randperm(count, generator=generator).tolist()
    size = batch_size * world
    batches: list[list[int]] = []
    for start in range(0, count, size * MEGABATCH):
        run = rows[start : start + size * MEGABATCH]
        if grouped and not isinstance(lengths, int):
            run.sort(key=lambda i: lengths[i])
        batches += [run[i : i + size] for i in range(0, len(run), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    batches = [batches[i] for i in shuffled if len(batches[i]) >= world]
    if not batches:
        raise BadValue(f"{count} rows are fewer than {world} processes.", "Give more data or fewer processes.")
    return batches


class Feed:
    """Micro-batches of one process, epoch by epoch, from any position.

    ``data``: a sequence of examples (collated by ``collate``), a Dataset, or a DataLoader of your own, which is
    iterated as it is and whose position is restored by skipping.
    """

    def __init__(self, data: Any, collate: Any, batch_size: int, seed: int, workers: int = 0,
                 rank: int = 0, world: int = 1) -> None:  # fmt: skip
        self.data, self.collate, self.batch_size = data, collate, batch_size
        self.seed, self.workers, self.rank, self.world = seed, workers, rank, world
        self.grouped = True  # batches of rows of like length
        self.own = isinstance(data, DataLoader)
        if self.own and world > 1:
            raise BadValue("A DataLoader of your own with several processes.", "Pass the data set instead.")
        if not self.own and not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise BadValue(f"data is a {type(data).__name__}.", "Give a sequence, a Dataset or a DataLoader.")
        if not len(data):
            raise BadValue("The data is empty.", "Give at least one example.")
        sized = not self.own and isinstance(data[0], Example)
        self.lengths: Sequence[int] | int = [len(e) for e in data] if sized else len(data)

    def __len__(self) -> int:
        """Micro-batches an epoch."""
        return len(self.data) if self.own else len(order(self.lengths, self.batch_size, self.seed, 0, self.world))

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch from position ``skip`` on."""
        if self.own:
            for i, batch in enumerate(self.data):
                if i >= skip:
                    yield batch
            return
        plan = order(self.lengths, self.batch_size, self.seed, number, self.world, self.grouped)[skip:]
        mine = [batch[self.rank :: self.world] for batch in plan]
        yield from DataLoader(_Listed(self.data), batch_sampler=mine, collate_fn=self.collate, num_workers=self.workers,
                              generator=torch.Generator().manual_seed(self.seed))  # fmt: skip


    def endless(self, at: int = 0) -> Iterator[Any]:
        """Batches of one epoch after the other, from the batch number ``at`` on."""
        epoch, skip = divmod(at, len(self))
        while True:
            yield from self.epoch(epoch, skip)
            epoch, skip = epoch + 1, 0


class _Listed(Dataset):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        return self.data[i]


def two_parts(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(rows that updates learn from, rows set apart for rules), by the run's seed. Raises where one would be empty."""
    apart = round(share * count)
    if not 0 < apart < count:
        raise BadValue(f"{count} examples cannot be divided {1 - share:g} : {share:g}.", "Give more data.")
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(rows[apart:]), sorted(rows[:apart])


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a batch (mapping, sequence or tensor) on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(to_device(v, device) for v in batch)
    return batch


def token_count(batch: Any) -> int:
    """Input tokens without padding; rows, where the batch has no mask."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        first = mask if isinstance(mask, Tensor) else next((v for v in batch.values() if isinstance(v, Tensor)), None)
        return 0 if first is None else int(first.sum()) if first is mask else first.shape[0]
    first = batch[0] if isinstance(batch, (list, tuple)) else batch
    return first.shape[0] if isinstance(first, Tensor) and first.dim() else 0
