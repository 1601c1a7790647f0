"""Batches: tokenised once, bucketed by length, padded to their own longest row, standardised."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from conki_lib.config import MODALITIES
from conki_lib.data.store import SplitView

_POOL = 16  # batches that are sorted by length together when the order is shuffled


@dataclass(frozen=True)
class Batch:
    """B utterances, padded to the longest of the batch; padding is 0 everywhere.

    ``inputs["t"]`` (B, l) holds token ids, ``inputs["v"]`` and ``inputs["a"]`` (B, l, d_in) frames.
    `index` is the row within the split.
    """

    inputs: dict[str, Tensor]
    lengths: dict[str, Int[Tensor, " B"]]
    y: Float[Tensor, " B"]
    ids: tuple[str, ...]
    index: Int[Tensor, " B"]
    corpus: str

    def __len__(self) -> int:
        return len(self.ids)

    def mask(self, m: str) -> Bool[Tensor, "B l"]:
        """True at real steps of modality m, False at padding."""
        steps = torch.arange(self.inputs[m].shape[1], device=self.inputs[m].device)
        return steps < self.lengths[m][:, None]

    def parts(self, n: int) -> list["Batch"]:
        """Cut into up to n batches of consecutive utterances, padded as the whole."""
        cuts = np.linspace(0, len(self), min(n, len(self)) + 1).astype(int)
        return [self._rows(slice(*ends)) for ends in itertools.pairwise(cuts.tolist())]

    def _rows(self, part: slice) -> "Batch":
        return replace(
            self,
            inputs={m: x[part] for m, x in self.inputs.items()},
            lengths={m: x[part] for m, x in self.lengths.items()},
            y=self.y[part],
            ids=self.ids[part],
            index=self.index[part],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            inputs={m: move(x) for m, x in self.inputs.items()},
            lengths={m: move(x) for m, x in self.lengths.items()},
            y=move(self.y),
            index=move(self.index),
        )


def tokenise(
    texts: Iterable[str], tokenizer: Any, *, lower_case: bool = True, max_tokens: int = 64
) -> list[Int[np.ndarray, " _"]]:
    """Turn texts into token ids once, special tokens included; longer ones are cut.

    Args:
        texts: one per utterance.
        tokenizer: a transformers tokenizer.
        lower_case: MOSI's transcripts are upper case, which some tokenizers keep.
        max_tokens: most tokens per utterance, special ones included.
    """
    texts = [text.lower() if lower_case else text for text in texts]
    if not texts:
        return []
    encoded = tokenizer(
        texts, truncation=True, max_length=max_tokens, padding=False, return_attention_mask=False
    )
    return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]


class BucketSampler(Sampler[list[int]]):
    """Batches of utterances of similar length; every utterance exactly once an epoch.

    Shuffled, epoch e's order is a pure function of (seed, e): the utterances are permuted, pools of
    16 batches are sorted by length, cut into batches of equal size (but for one utterance), and the
    batches permuted. Otherwise all are sorted by length. The length of an utterance is the sum over
    modalities of its length relative to the mean.
    """

    def __init__(
        self, lengths: Float[np.ndarray, " N"], batch_size: int, shuffle: bool, seed: int = 0
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self._batches())

    def _batches(self) -> list[Int[np.ndarray, " _"]]:
        n, count = len(self.lengths), len(self)
        if not self.shuffle:
            order = np.argsort(self.lengths, kind="stable")
            return np.split(order, range(self.batch_size, n, self.batch_size)) if n else []
        rng = np.random.default_rng([self.seed, self.epoch])
        order, ends = rng.permutation(n), np.linspace(0, n, count + 1).astype(int)
        batches = []
        for first in range(0, count, _POOL):
            cuts = ends[first : first + _POOL + 1]
            pool = order[cuts[0] : cuts[-1]]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += np.split(pool, cuts[1:-1] - cuts[0])
        return [batches[i] for i in rng.permutation(count)]


class _Collator(Dataset[Batch]):
    """Builds whole batches straight from the mapped file: each frame is copied once.

    Attributes:
        share: (rank, number of processes); a process gets every so-manyth utterance of each batch,
            padded as the whole batch, so that the processes' batches together are what one process
            alone would get. A batch with less than one utterance per process is a `ValueError`.
    """

    share = (0, 1)

    def __init__(
        self,
        split: SplitView,
        modalities: Sequence[str],
        tokens: Sequence[np.ndarray] | None,
        standardise: bool,
        max_steps: int,
        pad_to: Mapping[str, int],
    ) -> None:
        self.split, self.modalities, self.tokens = split, tuple(modalities), tokens
        self.max_steps, self.pad_to = max_steps, dict(pad_to)
        widths = split.store.info.widths
        present = [m for m in modalities if m in widths]
        self.stats = {m: split.store.stats(m) for m in present} if standardise else {}

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> Batch:
        return self.__getitems__([i])

    def __getitems__(self, indices: list[int]) -> Batch:
        rank, world = self.share
        if len(indices) < world:
            raise ValueError(
                f"a batch of {len(indices)} utterances cannot be shared by {world} processes: "
                "raise batch_size, or start fewer processes"
            )
        packed = {m: self._pack(m, indices) for m in self.modalities}
        indices = indices[rank::world]
        ids = self.split.columns["id"]
        return Batch(
            inputs={m: torch.from_numpy(values) for m, (values, _) in packed.items()},
            lengths={m: torch.from_numpy(lengths) for m, (_, lengths) in packed.items()},
            y=torch.from_numpy(self.split.y[indices]),
            ids=tuple(ids[i] for i in indices),
            index=torch.tensor(indices, dtype=torch.int64),
            corpus=self.split.store.info.name,
        )

    def _pack(self, m: str, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pad the own rows of one modality to the longest of all; (values, lengths)."""
        if m == "t":
            rows, tail, dtype = [self.tokens[i] for i in indices], (), np.int64
        else:
            rows, dtype = [self._frames(m, i) for i in indices], np.float32
            tail = (rows[0].shape[1],)
        longest = max(*map(len, rows), self.pad_to.get(m, 0))
        rank, world = self.share
        rows = rows[rank::world]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        values = np.zeros((len(rows), longest, *tail), dtype=dtype)
        for place, row in zip(values, rows, strict=True):
            self._fill(m, place[: len(row)], row)
        return values, lengths

    def _frames(self, m: str, i: int) -> np.ndarray:
        if m not in self.split.store.info.widths:
            return np.zeros((1, 1), dtype=np.float32)
        return self.split.store.frames(m, int(self.split.rows[i]))[: self.max_steps]

    def _fill(self, m: str, place: np.ndarray, row: np.ndarray) -> None:
        if m not in self.stats or (len(row) == 1 and not row.any()):  # a placeholder stays 0
            place[...] = row
            return
        mean, std = self.stats[m]
        np.subtract(row, mean, out=place)
        place /= std


def make_loader(
    split: SplitView,
    *,
    modalities: Sequence[str],
    batch_size: int,
    tokens: Sequence[np.ndarray] | None = None,
    shuffle: bool,
    seed: int = 0,
    standardise: bool = True,
    max_steps: int = 512,
    pad_to: int | Mapping[str, int] = 0,
) -> DataLoader:
    """Make a loader of `Batch` over one split, bucketed by length, the last batch kept.

    ``loader.batch_sampler.set_epoch(e)`` chooses the order of epoch e, a function of (seed, e)
    alone; without shuffling the utterances come sorted by length. Torch's global random state is
    not touched. An utterance without frames, and a modality that the corpus lacks, give one zero
    frame (in the latter case one feature wide), which standardisation leaves alone.

    Args:
        split: ``store["train"]``.
        modalities: subset of ``("t", "v", "a")``.
        batch_size: utterances per batch.
        tokens: for ``"t"``: what `tokenise` gave for the split's texts.
        shuffle: seeded shuffle, or a fixed order.
        seed: of the shuffle.
        standardise: subtract mean, divide by deviation of the train frames of the split's own store
            and fold.
        max_steps: longer vision and audio sequences are cut.
        pad_to: pad to at least so many steps, all modalities or each; a means of testing that
            padding changes nothing.
    """
    unknown = [m for m in modalities if m not in MODALITIES]
    if unknown or not modalities:
        raise ValueError(f"modalities: a non-empty subset of 'tva' is needed, not {modalities!r}")
    if "t" in modalities and (tokens is None or len(tokens) != len(split)):
        given = "none" if tokens is None else len(tokens)
        raise ValueError(
            f"{split.store.path}, split {split.split!r}: text needs tokens for its {len(split)} "
            f"utterances, {given} given; pass tokens=tokenise(split.table['text'], tokenizer)"
        )
    pads = dict.fromkeys(MODALITIES, pad_to) if isinstance(pad_to, int) else pad_to
    lengths = sum(_relative(split, m, tokens, max_steps) for m in modalities)
    return DataLoader(
        _Collator(split, modalities, tokens, standardise, max_steps, pads),
        batch_sampler=BucketSampler(np.asarray(lengths), batch_size, shuffle, seed),
        collate_fn=_as_is,
        generator=torch.Generator().manual_seed(seed),
    )


def _relative(
    split: SplitView, m: str, tokens: Sequence[np.ndarray] | None, max_steps: int
) -> Float[np.ndarray, " N"]:
    if m == "t":
        lengths = np.array([len(ids) for ids in tokens or ()], dtype=np.float64)
    else:
        lengths = np.minimum(split.lengths(m), max_steps).astype(np.float64)
    return lengths / max(lengths.mean(), 1.0)


def _as_is(batch: Batch) -> Batch:
    return batch
