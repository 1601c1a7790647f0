"""What a corpus holds and what is wrong with it, counted in one pass over raw files or a store."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate
from tqdm import tqdm

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.packing import SPLITS, Range, find_folds
from conki_lib.data.raw import RawCorpus, last_frame
from conki_lib.data.store import FeatureStore


@dataclass
class Scan:
    """Lengths and defects of one modality's sequences, collected one utterance at a time."""

    lengths: list[int] = field(default_factory=list)
    found: dict[str, list[int]] = field(default_factory=dict)  # defect -> rows
    width: int = 0
    low: Any = np.inf
    high: Any = -np.inf

    def add(self, frames: np.ndarray) -> None:
        """Count the next utterance."""
        row, last = len(self.lengths), last_frame(frames)
        self.lengths.append(len(frames))
        self.width = self.width or frames.shape[1]
        alike = frames.shape[1] == self.width
        if not alike:
            self.found.setdefault("sequences of another width than the first", []).append(row)
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(frames, np.float32))
        spoken = (frames != 0).any(axis=1)
        silent = not spoken[:last].all()
        for defect, true in (
            ("sequences that are empty or zero throughout", not last),
            ("sequences with values that are not finite in float32", not finite.all()),
            ("lengths beyond the last non-zero frame", 0 < last < len(frames)),
            ("sequences with a zero frame inside", silent),
        ):
            self.found.setdefault(defect, []).extend([row] if true else [])
        if last and alike:
            held = frames[spoken], finite[spoken]
            self.low = np.minimum(self.low, np.where(held[1], held[0], np.inf).min(axis=0))
            self.high = np.maximum(self.high, np.where(held[1], held[0], -np.inf).max(axis=0))

    @property
    def constant(self) -> list[int]:
        """Features that have one value in all frames but the silent ones."""
        return np.flatnonzero(np.broadcast_to(self.low >= self.high, (self.width,))).tolist()


def scan(sequences: Mapping[str, Iterable[np.ndarray]], n: int) -> dict[str, Scan]:
    """Go once through the n sequences of each modality, with a progress bar."""
    scans = {}
    for m, rows in sequences.items():
        scans[m] = Scan()
        name = MODALITY_NAMES[m]
        for frames in tqdm(rows, name, n, leave=False, unit=" sequences", disable=None):
            scans[m].add(frames)
    return scans


def defects(
    table: pd.DataFrame, folds: Sequence[str], label_range: Range, scans: dict[str, Scan]
) -> pd.DataFrame:
    """List every check with what it found: columns check, found, of, share, examples."""
    ids, rows = table["id"].astype(str).tolist(), []

    def add(check: str, found: Iterable[Any], of: int) -> None:
        found = list(found)
        shown = ", ".join(map(str, found[:3])) + (", ..." if len(found) > 3 else "")
        rows.append((check, len(found), of, len(found) / max(of, 1), shown))

    def add_rows(check: str, wrong: Any) -> None:
        add(check, (ids[i] for i in np.flatnonzero(wrong)), len(table))

    add_rows("ids that stand there already", table["id"].duplicated())
    for fold in folds:
        inside = table[table[fold].notna()]
        for column in ("id", "video"):
            splits = inside.groupby(column, sort=False)[fold].nunique()
            add(f"{column}s in several splits of {fold}", splits[splits > 1].index, len(splits))
        add_rows(f"utterances outside {fold}", table[fold].isna())
    silent = table["text"].fillna("").astype(str).str.strip() == ""
    if not silent.all():  # else the corpus has no text
        add_rows("texts that are empty", silent)
    for y in (c for c in ("y", "y_T", "y_V", "y_A") if c in table):
        low, high = label_range
        wrong = ~table[y].between(low, high) & (table[y].notna() | (y == "y"))  # others may lack
        add_rows(f"labels {y} outside [{low:g}, {high:g}]", wrong)
    for m, s in scans.items():
        for check, wrong in s.found.items():
            add(f"{MODALITY_NAMES[m]}: {check}", (ids[i] for i in wrong), len(table))
        add(f"{MODALITY_NAMES[m]}: features that never change", s.constant, s.width)
    return pd.DataFrame(rows, columns=["check", "found", "of", "share", "examples"])


def audit(store: FeatureStore) -> pd.DataFrame:
    """Check a corpus: ids, splits, speakers (videos), texts, labels, lengths, constant features.

    Returns:
        One row per check: check, found, of (how many were looked at), share, examples.
    """
    table = store.utterances
    return defects(table, store.folds, store.info.label_range, _scan_store(store))


def _scan_store(store: FeatureStore) -> dict[str, Scan]:
    n = len(store.utterances)
    return scan({m: map(partial(store.frames, m), range(n)) for m in store.info.widths}, n)


@dataclass(frozen=True)
class Inspection:
    """What `inspect_path` found; ``str()`` gives the text that ``conki inspect`` prints."""

    path: Path
    summary: dict[str, Any]
    counts: pd.DataFrame
    lengths: pd.DataFrame
    labels: pd.DataFrame
    defects: pd.DataFrame

    def __str__(self) -> str:
        found = self.defects[self.defects["found"] > 0].drop(columns="share")
        parts = [
            tabulate(self.summary.items(), tablefmt="plain", maxcolwidths=[None, 76]),
            _table("Utterances", self.counts),
            _table("Frames per utterance", self.lengths),
            _table("Labels", self.labels),
            _table(f"Defects ({len(self.defects)} checks)", found)
            if len(found)
            else f"Defects\nnone in {len(self.defects)} checks",
        ]
        return "\n\n".join(parts)


def _table(title: str, frame: pd.DataFrame) -> str:
    shown = tabulate(frame, headers="keys", showindex=False, floatfmt="g", intfmt=",")
    return f"{title}\n{shown}"


def inspect_store(store: FeatureStore) -> Inspection:
    """Describe a store: what `info.json` says, lengths, labels, defects."""
    info = store.info
    summary = {
        "path": store.path,
        "what": f"store {info.name!r}, format {info.version}",
        "language": info.language,
        "labels": f"{info.label_range[0]:g} to {info.label_range[1]:g}",
        "widths": _named(info.widths),
        "cleaned": _named(info.cleaned) or "nothing",
        "sources": ", ".join(f"{s['file']} ({s['sha256'][:12]})" for s in info.sources) or "none",
        **info.notes,
        "fingerprint": store.fingerprint,
    }
    return _inspection(
        store.path, summary, store.utterances, store.folds, info.label_range, _scan_store(store)
    )


def inspect_raw(raw: RawCorpus) -> Inspection:
    """Describe files that are not converted yet, in one pass over them."""
    scans = scan(raw.sequences, len(raw.utterances))
    summary = {
        "path": raw.path,
        "what": {"mmsa": "MMSA pickle", "csd": "folder of .csd files"}[raw.format],
        "size": f"{sum(p.stat().st_size for p in raw.files) / 1e6:,.1f} MB",
        "language": raw.language,
        "widths": _named({m: s.width for m, s in scans.items()}),
        "repaired when converted": _named(raw.cleaned) or "nothing but what stands below",
        **raw.notes,
    }
    folds = find_folds(raw.utterances)
    return _inspection(raw.path, summary, raw.utterances, folds, raw.label_range, scans)


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{MODALITY_NAMES.get(k, k)} {n:,}" for k, n in counts.items())


def _inspection(
    path: Path,
    summary: dict[str, Any],
    table: pd.DataFrame,
    folds: Sequence[str],
    label_range: Range,
    scans: dict[str, Scan],
) -> Inspection:
    counts = [{"fold": f, **table[f].value_counts().reindex(SPLITS, fill_value=0)} for f in folds]
    lengths = []
    for m, s in scans.items():
        for split in SPLITS:
            rows = (table[folds[0]] == split).to_numpy(bool)
            held = np.array(s.lengths)[rows]
            if len(held):
                quantiles = np.quantile(held, [0, 0.5, 0.95, 1]).round(1).tolist()
                named = dict(zip(("least", "median", "95 %", "most"), quantiles, strict=True))
                lengths.append({"modality": MODALITY_NAMES[m], "split": split, **named})
    step = 1 if max(map(abs, label_range)) > 1 else 0.2
    nearest = (np.rint(table["y"] / step) * step + 0.0).round(1)
    labels = pd.crosstab(nearest, table[folds[0]].fillna("none")).reset_index()
    labels = labels[["y", *(s for s in (*SPLITS, "none") if s in labels)]]
    return Inspection(
        path,
        summary,
        pd.DataFrame(counts),
        pd.DataFrame(lengths),
        labels.rename(columns={"y": f"nearest multiple of {step:g}"}),
        defects(table, folds, label_range, scans),
    )
