"""The packed store: one folder per corpus, written in one stream, read through a memory map.

A store holds ``features.safetensors`` (``vision.values`` (sum of l_v, d_v), ``vision.offsets``
(N + 1), ``audio.*`` likewise; valid frames only, no padding), ``utterances.parquet`` (one row per
utterance) and ``info.json`` (`StoreInfo`).
"""

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import Dataset

from conki_lib.config import MODALITY_NAMES, near_names
from conki_lib.data.aside import written_aside
from conki_lib.data.packing import (
    COLUMNS,
    SEQUENCES,
    SPLITS,
    VERSION,
    Packed,
    Range,
    canonical,
    checked_table,
    write_features,
)

FEATURES, UTTERANCES, INFO = "features.safetensors", "utterances.parquet", "info.json"
FETCHABLE = (
    "synthetic",
    "synthetic-external",
    "mosi-open",
    "meld-text",
    "mmmo-open",
    "pom-open",
)


class StoreInfo(BaseModel):
    """What `info.json` says of a corpus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    language: str
    label_range: tuple[float, float]
    modalities: tuple[str, ...]
    widths: dict[str, int]
    counts: dict[str, dict[str, int]] = Field(min_length=1)
    sources: list[dict[str, Any]] = []
    cleaned: dict[str, int] = {}
    stats: dict[str, dict[str, dict[str, list[float]]]] = {}
    notes: dict[str, str] = {}
    fingerprint: str = ""
    version: int = VERSION


@dataclass(frozen=True)
class Utterance:
    """One utterance with its raw sequences ``inputs["v"]``, ``inputs["a"]``: (l, d_in), float32."""

    id: str
    video: str
    clip: str
    text: str
    y: float
    inputs: dict[str, Float[Tensor, "_ _"]]
    index: int


# --- writing --------------------------------------------------------------------------------


def source_of(path: Path | str, label: str | None = None) -> dict[str, Any]:
    """Describe a source file for `info.json`: its name (or `label`), SHA-256 and size in bytes."""
    path = Path(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": label or path.name, "sha256": digest, "bytes": path.stat().st_size}


def write_store(
    destination: Path | str,
    utterances: pd.DataFrame,
    sequences: Mapping[str, Iterable[np.ndarray]],
    *,
    name: str,
    language: str,
    label_range: Range,
    sources: Sequence[Mapping[str, Any]] = (),
    cleaned: Mapping[str, int] | None = None,
    notes: Mapping[str, str] | None = None,
    folds: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a corpus as a store: checked, streamed into a folder aside, renamed when complete.

    NaN, infinite and float32-overflowing features become 0; an empty or all-zero sequence becomes
    one zero frame; both are counted in ``info.cleaned``. Such a placeholder frame is left out of
    the train statistics. One modality is read after the other, one utterance at a time.

    Args:
        destination: folder of the new store; its parent is made.
        utterances: columns id, video, clip, text, y, one column per fold (train / valid / test, or
            null for "not in this fold"); further columns are kept as they are.
        sequences: ``"v"`` and ``"a"``, where the corpus has them: an iterable over (l, d_in)
            arrays in row order.
        name: the corpus's name, written into `info.json`.
        language: ``"en"``, ``"zh"``.
        label_range: smallest and largest allowed label.
        sources: files the corpus was read from, see `source_of`.
        cleaned: counts of what the reader repaired, added to the store's own.
        notes: remarks a user must see, by keyword.
        folds: names of the fold columns; default: every extra column that holds only split names.
        overwrite: replace a store that stands at `destination`; default: refuse.

    Returns:
        The destination.

    Raises:
        ValueError: a column is missing, ids repeat, a label is outside the range, a sequence does
            not fit; names row, id and the way out. Nothing is left behind.
        FileExistsError: something stands at the destination already.
        OSError: no space left; what was written so far is removed.
    """
    destination = Path(destination)
    _check_destination(destination, overwrite)
    if set(sequences) - set(SEQUENCES):
        raise ValueError(f"sequences: 'v' and 'a' are known, not {sorted(sequences)}")
    table, folds = checked_table(utterances, name, label_range, folds)
    with written_aside(destination, overwrite) as folder:
        digest = hashlib.sha256(canonical(table, name, language, label_range))
        table.to_parquet(folder / UTTERANCES, index=False)  # first: some columns cannot be held
        packed = write_features(folder / FEATURES, table, sequences, folds, digest)
        info = StoreInfo(
            name=name,
            language=language,
            label_range=(float(label_range[0]), float(label_range[1])),
            modalities=_modalities(table, packed),
            widths={m: p.width for m, p in packed.items()},
            counts={f: {s: int(n) for s in SPLITS if (n := (table[f] == s).sum())} for f in folds},
            sources=[dict(s) for s in sources],
            cleaned=_total(cleaned, packed),
            stats={f: {m: p.moments[f].stats() for m, p in packed.items()} for f in folds},
            notes=dict(notes or {}),
            fingerprint=digest.hexdigest(),
        )
        (folder / INFO).write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return destination


def _check_destination(destination: Path, overwrite: bool) -> None:
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not (destination / INFO).is_file():
        raise FileExistsError(
            f"{destination} exists and is no store: choose another destination, or remove it"
        )
    if not overwrite:
        raise FileExistsError(
            f"{destination} holds a store already: remove that folder to build it anew, or choose "
            "another destination"
        )


def _modalities(table: pd.DataFrame, packed: Mapping[str, Packed]) -> tuple[str, ...]:
    text = ("t",) if table["text"].str.strip().ne("").any() else ()
    return text + tuple(m for m in SEQUENCES if m in packed)


def _total(cleaned: Mapping[str, int] | None, packed: Mapping[str, Packed]) -> dict[str, int]:
    total = Counter({k: int(n) for k, n in (cleaned or {}).items()})
    for m, p in packed.items():
        total.update({f"{MODALITY_NAMES[m]}.{k}": n for k, n in p.cleaned.items()})
    return dict(total)


# --- reading --------------------------------------------------------------------------------


def open_store(path: Path | str, fold: str | None = None) -> "FeatureStore":
    """Open a store lazily: only its description is read now, tables and frames when asked for.

    Args:
        path: the store's folder.
        fold: which split of the corpus; default ``standard``, or the first where there is none.

    Raises:
        FileNotFoundError: there is no store, or it lacks a file; says what to run.
        ValueError: the store is damaged or from a newer version, or has no such fold.
    """
    return FeatureStore(path, fold)


class FeatureStore:
    """One corpus on disk, seen through one fold; ``store["train"]`` is a Dataset of `Utterance`.

    Copies made by pickling leave the table and the mapped frames behind and open them anew.
    """

    def __init__(self, path: Path | str, fold: str | None = None) -> None:
        self.path = Path(path)
        self.info = _read_info(self.path)
        folds = tuple(self.info.counts)
        self.fold = fold or ("standard" if "standard" in folds else folds[0])
        if self.fold not in folds:
            raise ValueError(
                f"{self.path} has no fold {self.fold!r}{near_names(self.fold, folds)}: "
                f"known are {', '.join(folds)}"
            )
        self._header, self._start = _read_header(self.path / FEATURES)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "info", "fold", "_header", "_start")
        return {k: v for k, v in self.__dict__.items() if k in kept}

    def __repr__(self) -> str:
        counts = ", ".join(f"{s} {n}" for s, n in self.info.counts[self.fold].items())
        return f"FeatureStore({self.info.name}, fold {self.fold}: {counts})"

    @property
    def folds(self) -> tuple[str, ...]:
        """All folds of the corpus."""
        return tuple(self.info.counts)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that this fold has."""
        return tuple(self.info.counts[self.fold])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over utterances, labels, folds and frames, computed when they were written."""
        return self.info.fingerprint

    @cached_property
    def utterances(self) -> pd.DataFrame:
        """The whole table, one row per utterance, in the order of the frames."""
        path = self.path / UTTERANCES
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        if lacking := [c for c in (*COLUMNS, *self.folds) if c not in table]:
            raise _damaged(path, f"it has no column {lacking[0]!r}")
        if any(table[f].value_counts().to_dict() != n for f, n in self.info.counts.items()):
            raise _damaged(path, f"its splits are not those that {INFO} counts")
        return table

    @cached_property
    def _values(self) -> dict[str, np.ndarray]:
        """The frames of each modality, mapped read-only."""
        return {m: self._tensor(f"{MODALITY_NAMES[m]}.values", "<f4") for m in self.info.widths}

    @cached_property
    def _offsets(self) -> dict[str, np.ndarray]:
        found = {}
        for m, values in self._values.items():
            name = f"{MODALITY_NAMES[m]}.offsets"
            found[m] = offsets = np.array(self._tensor(name, "<i8"))
            ends = len(offsets) == len(self.utterances) + 1 and (offsets[0], offsets[-1])
            if ends != (0, len(values)) or (np.diff(offsets) < 0).any():
                raise _damaged(self.path / FEATURES, f"{name} do not fit the table or the frames")
        return found

    def _tensor(self, key: str, dtype: str) -> np.ndarray:
        path = self.path / FEATURES
        try:
            entry = self._header[key]
            start, shape = self._start + entry["data_offsets"][0], tuple(entry["shape"])
            mapped = np.memmap(path, dtype, "r", offset=start, shape=shape)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"{key}: {error}") from error
        return mapped.view(np.ndarray)  # a slice of a plain array is several times cheaper

    def frames(self, m: str, row: int) -> Float[np.ndarray, "l d_in"]:
        """The frames of one utterance by its row in the store: a read-only view into the file."""
        offsets = self._offsets[m]
        return self._values[m][offsets[row] : offsets[row + 1]]

    def stats(self, m: str) -> tuple[Float[np.ndarray, " d_in"], Float[np.ndarray, " d_in"]]:
        """Mean and deviation of the fold's train frames, float32."""
        stats = self.info.stats[self.fold][m]
        return np.asarray(stats["mean"], np.float32), np.asarray(stats["std"], np.float32)

    def __getitem__(self, split: str) -> "SplitView":
        if split not in self.splits:
            raise KeyError(
                f"{self.path}: fold {self.fold!r} has no split {split!r}: known are "
                f"{', '.join(self.splits)}"
            )
        return SplitView(self, split)


class SplitView(Dataset[Utterance]):
    """One split of a fold: a map-style Dataset of `Utterance`, and its columns as arrays."""

    def __init__(self, store: FeatureStore, split: str) -> None:
        self.store = store
        self.split = split

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "split": self.split}

    @cached_property
    def rows(self) -> Int[np.ndarray, " n"]:
        """The split's rows in the store."""
        return np.flatnonzero((self.store.utterances[self.store.fold] == self.split).to_numpy(bool))

    @cached_property
    def table(self) -> pd.DataFrame:
        """The split's rows of the utterance table, numbered from 0."""
        return self.store.utterances.iloc[self.rows].reset_index(drop=True)

    @cached_property
    def columns(self) -> dict[str, list[str]]:
        """id, video, clip, text as plain lists, which are quick to index."""
        return {c: self.table[c].tolist() for c in COLUMNS[:4]}

    @cached_property
    def y(self) -> Float[np.ndarray, " n"]:
        """The labels."""
        return self.table["y"].to_numpy(np.float32)

    def lengths(self, m: str) -> Int[np.ndarray, " n"]:
        """Number of frames of ``"v"`` or ``"a"`` per utterance; 1 where the corpus lacks m."""
        if m not in self.store.info.widths:
            return np.ones(len(self), dtype=np.int64)
        return np.diff(self.store._offsets[m])[self.rows]

    def __len__(self) -> int:
        return self.store.info.counts[self.store.fold][self.split]

    def __getitem__(self, i: int) -> Utterance:
        i = range(len(self))[i]
        row = int(self.rows[i])
        inputs = {
            m: torch.from_numpy(self.store.frames(m, row).copy()) for m in self.store.info.widths
        }
        columns = {c: values[i] for c, values in self.columns.items()}
        return Utterance(**columns, y=float(self.y[i]), inputs=inputs, index=row)


def _read_info(path: Path) -> StoreInfo:
    if not path.is_dir() or not any(path.iterdir()):
        raise FileNotFoundError(f"no corpus at {path}: {_way_out(path)}")
    missing = [f for f in (INFO, UTTERANCES, FEATURES) if not (path / f).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} is no complete store, {missing[0]} is missing: remove the folder, then "
            f"{_way_out(path)}"
        )
    try:
        content = json.loads((path / INFO).read_text(encoding="utf-8"))
        version = content["version"]
        info = StoreInfo.model_validate(content) if version == VERSION else None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path / INFO, error) from error
    if info is None:
        raise ValueError(
            f"{path} has format version {version}, this library reads {VERSION}: update the "
            f"library, or remove the folder, then {_way_out(path)}"
        )
    return info


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        text = file.read(length) if length < size else b""
    try:
        header = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        end = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
    except (ValueError, KeyError, AttributeError):
        end = -1
    if end != size:
        raise _damaged(path, f"{size} bytes, its header says {end}")
    return header, 8 + length


def _damaged(path: Path, why: object) -> ValueError:
    way_out = f"remove the folder, then {_way_out(path.parent)}"
    return ValueError(f"{path} is damaged or cut off ({why}): {way_out}")


def _way_out(path: Path) -> str:
    if path.name in FETCHABLE:
        return f"run `conki fetch {path.name}`"
    return (
        f"run `conki convert SOURCE {path}` with the corpus's MMSA pickle or .csd files "
        f"(`conki fetch NAME` gets the open corpora: {', '.join(FETCHABLE)})"
    )
