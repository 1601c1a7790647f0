"""Checks of an utterance table, and frames packed in one stream into one safetensors file."""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from conki_lib.config import MODALITY_NAMES

Range = tuple[float | int, float | int]  # smallest and largest label
VERSION = 1
SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {s: s for s in SPLITS} | {"validation": "valid", "val": "valid", "dev": "valid"}
SEQUENCES = ("v", "a")
COLUMNS = ("id", "video", "clip", "text", "y")
LABELS = ("y", "y_T", "y_V", "y_A")
_HEADER = 1024  # bytes kept free for the safetensors header, which is known only at the end


@dataclass
class Contents:
    """A corpus in memory or as streams: the arguments of `write_store` that a reader finds."""

    utterances: pd.DataFrame
    sequences: dict[str, Iterable[np.ndarray]] = field(default_factory=dict)
    cleaned: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def checked_table(
    utterances: pd.DataFrame,
    name: str,
    label_range: Range,
    folds: Sequence[str] | None,
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return the table with clean columns and the names of its folds, or say which row is wrong."""
    missing = [c for c in COLUMNS if c not in utterances]
    if missing:
        raise ValueError(
            f"{name}: column {missing[0]!r} is missing; needed are {', '.join(COLUMNS)}"
        )
    table = utterances.reset_index(drop=True).copy()
    for column, default in (("text", ""), ("video", table["id"]), ("clip", "")):
        table[column] = table[column].astype(object).where(table[column].notna(), default)
    if (nameless := table["id"].isna()).any():
        raise ValueError(f"{name}: row {int(nameless.idxmax())} has no id; each needs one")
    for column in COLUMNS[:4]:
        table[column] = table[column].astype(str)
    folds = tuple(folds) if folds is not None else find_folds(table)
    if not folds or len(table) == 0:
        raise ValueError(
            f"{name}: {'no fold' if len(table) else 'no utterance'}; a column such as 'standard' "
            "holding train / valid / test is needed, with at least one row"
        )
    for fold in folds:
        table[fold] = _split_column(table, fold, name)
    _check_ids(table, folds, name)
    for column in [c for c in LABELS if c in table]:
        table[column] = _label_column(table, column, label_range, name)
    return table, folds


def find_folds(table: pd.DataFrame) -> tuple[str, ...]:
    """Name the columns that hold split names only; a column ``standard`` always counts."""
    found = []
    for column in [c for c in table.columns if c not in COLUMNS + LABELS]:
        values = set(table[column].dropna().unique())
        if column == "standard" or (values and values <= set(SPLITS)):
            found.append(column)
    return tuple(found)


def _split_column(table: pd.DataFrame, fold: str, name: str) -> pd.Series:
    if fold not in table:
        raise ValueError(f"{name}: there is no column {fold!r} for the fold of that name")
    column = table[fold].astype(object).where(table[fold].notna(), None)
    wrong = ~column.isin([*SPLITS, None])
    if wrong.any():
        row = int(wrong.idxmax())
        raise ValueError(
            f"{name}: row {row} (id {table['id'][row]!r}): split {column[row]!r} of fold {fold!r}; "
            f"known are {', '.join(SPLITS)}, or null for rows outside the fold"
        )
    return column


def _check_ids(table: pd.DataFrame, folds: Sequence[str], name: str) -> None:
    repeated = table["id"].duplicated()
    if not repeated.any():
        return
    second = int(repeated.idxmax())
    first = int((table["id"] == table["id"][second]).idxmax())
    where = f"{name}: rows {first} and {second} have the same id {table['id'][second]!r}"
    for fold in folds:
        splits = {table[fold][first], table[fold][second]} - {None}
        if len(splits) > 1:
            raise ValueError(
                f"{where}, shared by the splits {' and '.join(sorted(splits))} of fold {fold!r}: "
                "training data would leak; remove it from one of them, or make the ids unique"
            )
    raise ValueError(
        f"{where}: ids must be unique; remove one row or rename it, "
        "or let `conki convert --number-duplicates` number them"
    )


def _label_column(table: pd.DataFrame, column: str, label_range: Range, name: str) -> pd.Series:
    low, high = label_range
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"label_range: {low:g} to {high:g} is no range; the lower end comes first")
    values = pd.to_numeric(table[column], errors="coerce").astype("float64")
    no_number = ~np.isfinite(values)
    if column != "y":
        no_number &= table[column].notna()
    wrong = no_number if no_number.any() else (values < low) | (values > high)
    if not wrong.any():
        return values
    row = int(wrong.idxmax())
    where = f"{name}: row {row} (id {table['id'][row]!r}): label {column} = {table[column][row]}"
    if no_number.any():
        raise ValueError(f"{where} is no number; correct it, or leave that utterance out")
    widest = float(np.ceil(values.abs().max()))
    raise ValueError(
        f"{where} is outside [{low:g}, {high:g}] ({int(wrong.sum())} such rows): correct it, or, "
        "if the corpus really uses a wider range, widen it by hand: "
        f"label_range=({-widest:g}, {widest:g}), or --label-range {-widest:g} {widest:g}"
    )


@dataclass
class _Moments:
    """Mean and variance per feature over a stream of frames, in float64 (Chan's update)."""

    n: int = 0
    mean: Any = 0.0
    squares: Any = 0.0
    width: int = 0

    def add(self, frames: np.ndarray) -> None:
        frames = frames.astype(np.float64)
        n, mean = len(frames), frames.mean(axis=0)
        shift, total = mean - self.mean, self.n + n
        self.squares = (
            self.squares + ((frames - mean) ** 2).sum(axis=0) + shift**2 * (self.n * n / total)
        )
        self.mean = self.mean + shift * (n / total)
        self.n = total

    def stats(self) -> dict[str, list[float]]:
        mean = np.broadcast_to(np.asarray(self.mean, dtype=np.float64), (self.width,))
        std = np.sqrt(np.broadcast_to(np.asarray(self.squares), (self.width,)) / max(self.n, 1))
        # a constant feature leaves rounding noise behind: far below its own size it counts as 0
        std = np.where(std <= 1e-7 * np.abs(mean), 1.0, std)
        return {"mean": mean.tolist(), "std": std.tolist()}


@dataclass
class Packed:
    """What is known of one modality after its stream has been written."""

    width: int
    offsets: np.ndarray
    start: int
    moments: dict[str, _Moments]
    cleaned: Counter[str] = field(default_factory=Counter)


def write_features(
    path: Path,
    table: pd.DataFrame,
    sequences: Mapping[str, Iterable[np.ndarray]],
    folds: Sequence[str],
    digest: Any,
) -> dict[str, Packed]:
    """Stream the values into a safetensors file; header and offsets stand first, filled in last."""
    present = [m for m in SEQUENCES if m in sequences]
    room = (len(table) + 1) * 8  # bytes of one modality's offsets
    packed: dict[str, Packed] = {}
    entries: dict[str, Any] = {"__metadata__": {"format": "conki-store", "version": str(VERSION)}}
    with path.open("wb") as file:
        file.write(bytes(_HEADER + len(present) * room))
        for m in present:
            packed[m] = _write_values(file, m, sequences[m], table, folds, digest)
        for k, (m, p) in enumerate(packed.items()):
            key, shape = MODALITY_NAMES[m], [int(p.offsets[-1]), p.width]
            entries[f"{key}.offsets"] = _entry("I64", [len(p.offsets)], k * room, 8)
            entries[f"{key}.values"] = _entry("F32", shape, p.start, 4)
            file.seek(_HEADER + k * room)
            file.write(p.offsets.tobytes())
            digest.update(p.offsets.tobytes())
        header = json.dumps(entries, separators=(",", ":")).encode().ljust(_HEADER - 8)
        file.seek(0)
        file.write(struct.pack("<Q", len(header)) + header)
    return packed


def _entry(dtype: str, shape: list[int], start: int, itemsize: int) -> dict[str, Any]:
    end = start + math.prod(shape) * itemsize
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _write_values(
    file: BinaryIO,
    m: str,
    arrays: Iterable[np.ndarray],
    table: pd.DataFrame,
    folds: Sequence[str],
    digest: Any,
) -> Packed:
    ids = table["id"].tolist()
    train = {fold: (table[fold] == "train").to_numpy(dtype=bool) for fold in folds}
    packed = Packed(
        0,
        np.zeros(len(ids) + 1, dtype="<i8"),
        file.tell() - _HEADER,
        {f: _Moments() for f in folds},
    )
    row = -1
    for row, array in enumerate(arrays):
        where = f"{MODALITY_NAMES[m]} of row {row}"
        if row == len(ids):
            raise ValueError(f"{where}: there are more sequences than the {len(ids)} utterances")
        frames = _frames(array, packed, f"{where} (id {ids[row]!r})")
        silent = not frames.any()
        if silent:
            packed.cleaned["empty"] += 1
            frames = np.zeros((1, packed.width), dtype="<f4")
        for fold, chosen in train.items():
            if chosen[row] and not silent:
                packed.moments[fold].add(frames)
        packed.offsets[row + 1] = packed.offsets[row] + len(frames)
        data = memoryview(frames).cast("B")
        file.write(data)
        digest.update(data)
    if row + 1 != len(ids):
        raise ValueError(
            f"{MODALITY_NAMES[m]}: {row + 1} sequences for {len(ids)} utterances; each needs one"
        )
    for moments in packed.moments.values():
        moments.width = packed.width
    return packed


def _frames(array: Any, packed: Packed, where: str) -> np.ndarray:
    """Check one sequence against the modality's width and return it clean, contiguous, float32."""
    array = np.asarray(array)
    if array.ndim != 2 or array.dtype.kind not in "fiub":
        raise ValueError(
            f"{where}: an array (l, d) of numbers is needed, not shape {array.shape} {array.dtype}"
        )
    packed.width = packed.width or array.shape[1]
    if array.shape[1] != packed.width or packed.width == 0:
        raise ValueError(f"{where} is {array.shape[1]} wide, the rows before it {packed.width}")
    with np.errstate(over="ignore"):
        frames = np.ascontiguousarray(array, dtype="<f4")
    bad = ~np.isfinite(frames)
    if bad.any():
        given = array[bad]
        packed.cleaned["nan"] += int(np.isnan(given).sum())
        packed.cleaned["+inf"] += int((given == np.inf).sum())
        packed.cleaned["-inf"] += int((given == -np.inf).sum())
        packed.cleaned["overflow"] += int(np.isfinite(given).sum())
        frames = np.where(bad, np.float32(0), frames)
    return frames


def canonical(table: pd.DataFrame, name: str, language: str, label_range: Range) -> bytes:
    """Write what is not in the sequences in one fixed form, for the fingerprint."""
    columns = {c: table[c].astype(object).where(table[c].notna(), None).tolist() for c in table}
    head = [VERSION, name, language, [float(x) for x in label_range]]
    return json.dumps([head, columns], sort_keys=True, default=str).encode()
