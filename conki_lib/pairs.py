"""The pair sets of hierarchical contrastive learning, as masks over all ordered pairs of rows.

A row is one representation of one sample. Rows are sample-major: with K representations per
sample, row ``K * i + k`` is representation ``k`` of sample ``i``. A mask holds True at ``[p, q]``
if the ordered pair (p, q), p the anchor, belongs to the set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int, Real
from torch import Tensor

from conki_lib.config import near_names

REPS = ("O_t", "O_v", "O_a", "A_t", "A_v", "A_a")
SETS = ("P1", "P2", "N1", "N2")
N1_READINGS = ("symmetric", "literal")

Labels = Real[Tensor, " B"] | Real[np.ndarray, " B"] | pd.Series | Sequence[float]


@dataclass(frozen=True)
class PairMasks:
    """The four pair sets; `P1` and `P2` pull together, `N1` and `N2` push apart.

    The sets never overlap. Read symmetrically they partition all pairs with p != q. Of a whole
    batch the masks are R x R.
    """

    P1: Bool[Tensor, "P Q"]
    P2: Bool[Tensor, "P Q"]
    N1: Bool[Tensor, "P Q"]
    N2: Bool[Tensor, "P Q"]

    @property
    def positive(self) -> Bool[Tensor, "P Q"]:
        """P1 u P2: the pairs whose similarity the loss raises."""
        return self.P1 | self.P2

    @property
    def all(self) -> Bool[Tensor, "P Q"]:
        """P1 u P2 u N1 u N2: the pairs in the denominator."""
        return self.P1 | self.P2 | self.N1 | self.N2

    def counts(self, *, ordered: bool = True) -> dict[str, int]:
        """Members of each set, as ordered pairs or as unordered ones, {p, q} counted once."""
        masks = {name: getattr(self, name) for name in SETS}
        if not ordered:
            masks = {name: (mask | mask.T).triu() for name, mask in masks.items()}
        return {name: int(mask.sum()) for name, mask in masks.items()}


class Rows(NamedTuple):
    """What decides the set of a pair: one entry per row."""

    row: Int[Tensor, " R"]  # K * i + k
    sample: Int[Tensor, " R"]  # i
    pan: Bool[Tensor, " R"]  # True: an O row, False: an A row
    label: Int[Tensor, " R"]  # r(y_i)

    def at(self, part: slice | Int[Tensor, " S"]) -> "Rows":
        """Choose some of the rows."""
        return Rows(*(entry[part] for entry in self))


def as_labels(y: Labels) -> Real[Tensor, " B"]:
    """Take labels as a tensor; numbers that are no tensor keep the precision that they have.

    Raises:
        ValueError: not one label per sample.
    """
    if not isinstance(y, Tensor):
        values = np.array(y)
        y = torch.from_numpy(values if values.dtype.kind == "f" else values.astype(np.float64))
    if y.ndim != 1:
        raise ValueError(f"y {tuple(y.shape)} must be (B,): one label per sample")
    return y


def sentiment_class(y: Labels) -> Int[Tensor, " B"]:
    """Round sentiment intensities to their class r(y), half to even.

    Formula: r(0.5) = 0, r(1.5) = 2, r(-0.5) = -0.0, which is class 0.

    Args:
        y: labels, in [-3, 3] on MOSI and MOSEI, in [-1, 1] on CH-SIMS.

    Returns:
        One whole number per sample.

    Raises:
        ValueError: a label is NaN or infinite, its place is named; or y is not (B,).

    Source: paper, Hierarchical Contrastive Learning, r(.).
    Differs: nothing; the paper leaves ties open, numpy and torch round them half to even.
    """
    y = as_labels(y)
    if y.is_floating_point() and not y.isfinite().all():
        place = int((~y.isfinite()).nonzero()[0])
        raise ValueError(f"y[{place}] is {float(y[place])}: every sample needs a finite label")
    return y.round().to(torch.int64)


def rows_of(y: Labels, reps: Sequence[str] = REPS) -> Rows:
    """Describe every row of a batch: its sample, kind (O or A) and sentiment class.

    Raises:
        ValueError: a name is unknown or given twice; lists the near names.
    """
    for name in reps:
        if name not in REPS:
            known = f"known are {', '.join(REPS)}"
            raise ValueError(f"unknown representation {name!r}{near_names(name, REPS)}: {known}")
    if len(set(reps)) != len(reps):
        raise ValueError(f"a representation is named twice in {tuple(reps)}: name each once")
    label = sentiment_class(y)
    K, B, device = len(reps), len(label), label.device
    pan = torch.tensor([name.startswith("O") for name in reps], dtype=torch.bool, device=device)
    return Rows(
        row=torch.arange(K * B, device=device),
        sample=torch.arange(B, device=device).repeat_interleave(K),
        pan=pan.repeat(B),
        label=label.repeat_interleave(K),
    )


def relate(p: Rows, q: Rows, *, n1: str = "symmetric", without: Sequence[str] = ()) -> PairMasks:
    """Compare rows p (down) with rows q (across): the block of the four masks that they span.

    Source: paper, Hierarchical Contrastive Learning; each line below is one set of the paper.
    """
    same_kind = p.pan[:, None] == q.pan
    same_sample = p.sample[:, None] == q.sample
    same_class = p.label[:, None] == q.label
    itself = p.row[:, None] == q.row
    sets = {
        "P1": same_kind & same_sample & ~itself,
        "P2": same_kind & ~same_sample & same_class,
        "N1": ~same_kind if n1 == "symmetric" else p.pan[:, None] & ~q.pan,
        "N2": same_kind & ~same_class,
    }
    return PairMasks(**{k: torch.zeros_like(m) if k in without else m for k, m in sets.items()})


def pair_masks(
    y: Labels,
    reps: Sequence[str] = REPS,
    *,
    n1: str = "symmetric",
    without: Sequence[str] = (),
) -> PairMasks:
    """Build the four pair sets of a batch as masks over ordered pairs (p, q), p the anchor.

    Formula, for every sample i of the batch B, X standing for O and for A:
        P1_i = {(X_m^i, X_n^i) | m != n}                            modality level, together
        P2_i = {(X_m^i, X_n^j) | r(y_i) = r(y_j), i != j}           sample level, together
        N1_i = {(O_m^i, A_n^j) | any j, i too}                      knowledge level, apart
        N2_i = {(X_m^i, X_n^j) | r(y_i) != r(y_j), i != j}          sample level, apart

    Args:
        y: labels of the batch.
        reps: which representations each sample has, in row order; any subset of `REPS`.
        n1: "symmetric": A rows have N1 pairs too; "literal": only O rows, as the set is written.
        without: sets to leave empty, e.g. ``("N1",)``.

    Returns:
        Masks of R x R, R = len(reps) * B, row = len(reps) * i + k.

    Raises:
        ValueError: an unknown name, reading or set; lists the known ones.

    Source: paper, Hierarchical Contrastive Learning and the appendix's 18 x 18 matrix.
    Differs: symmetric N1 is the default, as the appendix draws it; pairs are ordered throughout.
    """
    check_sets(n1, without)
    rows = rows_of(y, reps)
    return relate(rows, rows, n1=n1, without=without)


def row_names(n_samples: int, reps: Sequence[str] = REPS) -> list[str]:
    """Name the rows in order: ``"O_t^1"`` is O_t of the first sample."""
    return [f"{name}^{i}" for i in range(1, n_samples + 1) for name in reps]


def pair_table(
    y: Labels,
    reps: Sequence[str] = REPS,
    *,
    n1: str = "symmetric",
    without: Sequence[str] = (),
) -> pd.DataFrame:
    """List the pairs by name: columns set, p, q, one line per ordered pair.

    Args:
        y: labels of the batch.
        reps: which representations each sample has.
        n1: reading of N1, as in `pair_masks`.
        without: sets to leave empty.

    Returns:
        Sorted by set (P1, P2, N1, N2), then by rows; names such as ``"O_t^1"``, samples count
        from 1.

    Source: paper, Hierarchical Contrastive Learning.
    Differs: nothing beyond `pair_masks`.
    """
    masks = pair_masks(y, reps, n1=n1, without=without)
    names = np.array(row_names(len(sentiment_class(y)), reps), dtype=object)
    tables = []
    for name in SETS:
        p, q = getattr(masks, name).nonzero().cpu().numpy().T
        tables.append(pd.DataFrame({"set": name, "p": names[p], "q": names[q]}))
    return pd.concat(tables, ignore_index=True)


def check_sets(n1: str, without: Sequence[str]) -> None:
    """Refuse an unknown reading of N1, or a set that is none of the four.

    Raises:
        ValueError: names the setting, the value and the known ones.
    """
    if n1 not in N1_READINGS:
        raise ValueError(f"n1={n1!r}{near_names(n1, N1_READINGS)}: known are {N1_READINGS}")
    if isinstance(without, str):
        raise ValueError(f"without={without!r}: a tuple of sets is needed, e.g. ({without!r},)")
    for name in without:
        if name not in SETS:
            raise ValueError(f"without: unknown set {name!r}{near_names(name, SETS)}: {SETS}")
