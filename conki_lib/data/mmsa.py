"""MMSA's pickles: a dict of splits, each a dict of columns; read, and written back."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.packing import SPLIT_NAMES, SPLITS, Range
from conki_lib.data.pickles import BadFile, PickledArray, Piece, StreamedArray, write_pickle
from conki_lib.data.raw import ALIGNED, PaddedSequences, RawCorpus, guess_language
from conki_lib.data.store import FeatureStore, SplitView
from conki_lib.disk import in_one_step

SEPARATOR = "$_$"
_YOUTUBE = re.compile(r"([-\w]{11})_(\d+)")  # a video id has 11 characters, "_" may be among them
_MANY = 10**7  # parts of a column or text; more is a pickle made to hang its reader


@dataclass(frozen=True)
class Release:
    """A file published by MMSA, known by its SHA-256."""

    name: str
    file: str
    label_range: Range
    counts: tuple[int, int, int]


_MOSI, _MOSEI = (1284, 229, 686), (16326, 1871, 4659)
RELEASES = {
    "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524": Release(
        "mosi", "MOSI/Processed/unaligned_50.pkl", (-3, 3), _MOSI
    ),
    "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9": Release(
        "mosi", "MOSI/Processed/aligned_50.pkl", (-3, 3), _MOSI
    ),
    "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f": Release(
        "mosei", "MOSEI/Processed/unaligned_50.pkl", (-3, 3), _MOSEI
    ),
    "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791": Release(
        "mosei", "MOSEI/Processed/aligned_50.pkl", (-3, 3), _MOSEI
    ),
    "c9e20c13ec0454d98bb9c1e520e490c75146bfa2dfeeea78d84de047dbdd442f": Release(
        "sims", "SIMS/Processed/unaligned_39.pkl", (-1, 1), (1368, 456, 457)
    ),
}


def is_mmsa(content: Any) -> bool:
    """Does a pickle's content have the layout: splits, each with labels or with rows?"""
    return isinstance(content, dict) and any(_is_split(content.get(s)) for s in SPLIT_NAMES)


def _is_split(columns: Any) -> bool:
    return isinstance(columns, dict) and "regression_labels" in columns


def read_mmsa(path: Path, content: dict[str, Any]) -> RawCorpus:
    """Describe the corpus that a pickle holds; no feature is read.

    Args:
        path: the file, for messages.
        content: what `read_pickle` gave.

    Raises:
        BadFile: a column is missing or does not fit; names split and column.
    """
    splits = _splits(path, content)
    utterances = pd.concat([s.table().assign(standard=n) for n, s in splits.items()])
    if utterances.empty:
        raise BadFile(f"{path}: there is no utterance in it: get it again")
    utterances = _with_ids(utterances.reset_index(drop=True))
    cleaned: dict[str, int] = {}
    notes = {f"no split {s!r}": "the file does not hold it" for s in SPLITS if s not in splits}
    sequences, nbytes = {}, {}
    for m in ("v", "a"):
        parts = {f"{path}: split {s.name!r}": s.sequences(m) for s in splits.values()}
        held = {name: part for name, part in parts.items() if part is not None}
        if held and len(held) < len(parts):
            raise BadFile(f"{path}: {MODALITY_NAMES[m]!r} is in some splits only; get it again")
        if held:
            sequences[m] = PaddedSequences(m, held, cleaned)
            nbytes[m] = sum(_size(rows) for rows, _ in held.values())
    if not utterances["text"].str.strip().any():
        notes["text"] = "no utterance of the file has any"
    language = guess_language(utterances["text"].tolist())
    small = language == "zh" or "y_T" in utterances
    limits = (-1, 1) if small else (-3, 3)
    return RawCorpus(
        path, "mmsa", utterances, sequences, language, limits, [path], nbytes, cleaned, notes
    )


def _splits(path: Path, content: dict[str, Any]) -> dict[str, "_Split"]:
    """The splits by their usual names; none that holds labels may be left over."""
    found: dict[str, _Split] = {}
    for name, columns in content.items():
        split = SPLIT_NAMES.get(name)
        if split and split not in found:
            found[split] = _Split(path, name, columns)
        elif split or _is_split(columns):
            raise BadFile(
                f"{path}: split {name!r} {'is there twice' if split else 'is not known'}; known "
                f"are {', '.join(SPLIT_NAMES)}: rename it, or take it out"
            )
    return {s: found[s] for s in SPLITS if s in found}


@dataclass
class _Split:
    path: Path
    name: str
    columns: Any

    def problem(self, what: str) -> BadFile:
        return BadFile(
            f"{self.path}: split {self.name!r}: {what}; such a file is a dict of train, valid and "
            f"test, each with regression_labels, id, raw_text, vision and audio of one length: get "
            f"it again or correct it"
        )

    def table(self) -> pd.DataFrame:
        """id (raw), text and labels of the split."""
        if not _is_split(self.columns):
            held = (
                ", ".join(map(str, self.columns)) if isinstance(self.columns, dict) else "no dict"
            )
            raise self.problem(f"regression_labels is missing (it holds: {held or 'nothing'})")
        table = pd.DataFrame({"y": self.y})
        for letter in "TVA":
            if f"regression_labels_{letter}" in self.columns:
                table[f"y_{letter}"] = self.labels(f"regression_labels_{letter}")
        table["text"] = self.texts()
        table["raw_id"] = self.ids()
        return table

    @cached_property
    def y(self) -> np.ndarray:
        """The labels, of which each utterance has one."""
        return self.numbers("regression_labels")

    def numbers(self, key: str) -> np.ndarray:
        try:
            return np.array(_leaves(self.columns[key], _MANY), np.float64)
        except (TypeError, ValueError) as error:
            raise self.problem(f"{key} is no list of numbers ({error})") from error

    def labels(self, key: str) -> np.ndarray:
        return self.sized(key, self.numbers(key))

    def sized(self, key: str, values: Any) -> Any:
        if len(values) != len(self.y):
            raise self.problem(f"{key} has {len(values)} rows, regression_labels has {len(self.y)}")
        return values

    def texts(self) -> list[str]:
        if "raw_text" not in self.columns:
            return [""] * len(self.y)
        values = self.columns["raw_text"]
        values = np.asarray(values).reshape(-1) if isinstance(values, PickledArray) else values
        return self.each("raw_text", lambda v: " ".join(_texts(v, _MANY)), values)

    def ids(self) -> list[tuple[str, ...]]:
        """Each id as the tuple of texts that it is made of; the row where there are no ids."""
        if "id" not in self.columns:
            return [(f"{self.name}{SEPARATOR}{i}",) for i in range(len(self.y))]
        values = self.columns["id"]
        values = np.asarray(values) if isinstance(values, PickledArray) else values
        return self.each("id", _id, values)

    def each(self, key: str, read: Callable[[Any], Any], values: Any) -> list[Any]:
        """Read every row of a column, and say which row cannot be read."""
        if not isinstance(values, list | tuple | np.ndarray) or not getattr(values, "ndim", 1):
            raise self.problem(f"{key} is {type(values).__name__}, no list or array of rows")
        found = []
        for i, value in enumerate(self.sized(key, values)):
            try:
                found.append(read(value))
            except ValueError as error:
                raise self.problem(f"{key} of row {i} {error}") from error
        return found

    def sequences(self, m: str) -> tuple[Any, np.ndarray | None] | None:
        """Rows of one modality with the stated lengths, or None."""
        name = MODALITY_NAMES[m]
        if name not in self.columns:
            return None
        rows, lengths = self.columns[name], self.columns.get(f"{name}_lengths")
        if not isinstance(rows, PickledArray | list):
            raise self.problem(f"{name} is {type(rows).__name__}, no array and no list of arrays")
        if isinstance(rows, PickledArray) and (
            len(rows.shape) not in (1, 2, 3) or (len(self.y) and 0 in rows.shape[1:])
        ):
            raise self.problem(f"{name} has the shape {rows.shape} instead of (N, l, d)")
        if lengths is not None:
            lengths = self.labels(f"{name}_lengths")
            if not (np.abs(lengths) < 2**53).all():
                raise self.problem(f"{name}_lengths holds what is no length")
            lengths = lengths.astype(np.int64)
        return self.sized(name, rows), lengths


def _size(rows: Any) -> int:
    if isinstance(rows, PickledArray) and rows.dtype.kind != "O":
        return rows.nbytes
    return sum(getattr(row, "nbytes", 8) for row in rows)


def _leaves(value: Any, most: int, depth: int = 4) -> list[Any]:
    """The values in nested lists and arrays, in order; refused before they are too many to walk."""
    found, waiting, seen = [], [(value, 0)], 0
    while waiting:
        value, level = waiting.pop()
        seen += 1
        value = np.asarray(value) if isinstance(value, PickledArray) else value
        value = value.reshape(-1).tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(value, list | tuple):
            found.append(value)
        elif level == depth or seen + len(waiting) + len(value) > most + depth:
            raise ValueError("is nested too deep" if level == depth else "has too many parts")
        else:
            waiting.extend((part, level + 1) for part in reversed(value))
    return found


def _texts(value: Any, most: int) -> list[str]:
    """The texts that an id or a text is made of, however it is nested."""
    return [_text(part) for part in _leaves(value, most)]


def _id(value: Any) -> tuple[str, ...]:
    parts = tuple(_texts(value, 16))
    if not any(parts):
        raise ValueError("is missing: name it, or leave out the key `id`, which numbers all rows")
    return parts


def _text(value: Any) -> str:
    if isinstance(value, Piece):
        value = value.text()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):  # half a surrogate pair cannot be written
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float | int | np.generic | None):
        missing = value is None or value != value
        return "" if missing else f"{value:.15g}" if isinstance(value, float) else str(value)
    raise ValueError(f"is or holds a {type(value).__name__}, no text")


def _with_ids(table: pd.DataFrame) -> pd.DataFrame:
    """Turn all forms of ids into unique texts ``video$_$clip``, with their two parts as columns.

    ``[vid, start, end]`` gives the clip ``start-end``; a video id alone is numbered in its split.
    """
    pairs = [split_id(parts) for parts in table.pop("raw_id")]
    table.insert(0, "video", [video for video, _ in pairs])
    table.insert(1, "clip", [clip for _, clip in pairs])
    numbers = table[table["clip"].isna()].groupby(["video", "standard"]).cumcount().astype(str)
    table["clip"] = table["clip"].fillna(numbers)
    table.insert(0, "id", table["video"] + SEPARATOR + table["clip"])
    return table


def split_id(parts: tuple[str, ...]) -> tuple[str, str | None]:
    """Video and clip of an id: ``("vid$_$3",)``, ``("vid[3]",)``, ``("vid", "1.5", "4")``.

    Ids may hold ``-`` and ``_`` themselves: ``_3`` counts as the clip only behind the eleven
    characters of a YouTube id. The clip is None if the id names none.
    """
    if len(parts) > 1:
        return parts[0], "-".join(parts[1:])
    text = parts[0] if parts else ""
    if SEPARATOR in text:
        video, clip = text.rsplit(SEPARATOR, 1)
        return video, clip
    match = ALIGNED.fullmatch(text) or _YOUTUBE.fullmatch(text)
    return (match[1], match[2]) if match else (text, None)


def export_mmsa(
    store: FeatureStore,
    path: str | Path,
    *,
    tokenizer: Callable[..., Any] | None = None,
    max_tokens: int = 50,
    max_steps: int | None = None,
) -> Path:
    """Write one fold of a store as an MMSA pickle, so that other models of the field can read it.

    Sequences are padded at the back with zeros to the longest; arrays are written in pieces, the
    file appears when it is complete. Ids become ``video$_$clip``, or stay as they are where two
    utterances would get the same.

    Args:
        store: opened with the fold that is wanted.
        path: the file to write; one that exists is replaced.
        tokenizer: a transformers tokenizer; adds ``text_bert`` (token ids, mask, segments), which
            models on BERT need. Without it they must tokenise ``raw_text`` themselves.
        max_tokens: word pieces per utterance in ``text_bert``.
        max_steps: cut sequences to so many steps; default: none is cut.

    Returns:
        The path.

    Differs: from MMSA's files by the missing ``text`` (BERT states), which no text backbone needs.
    """
    path = Path(path)
    longest = {m: _longest(store, m, max_steps) for m in store.info.widths}
    with in_one_step(path) as aside, aside.open("wb") as file:
        splits = {s: _columns(store, s, longest, tokenizer, max_tokens) for s in store.splits}
        write_pickle(file, splits)
    return path


def _longest(store: FeatureStore, m: str, max_steps: int | None) -> int:
    longest = max(int(store[s].lengths(m).max()) for s in store.splits)
    return min(longest, max_steps or longest)


def _columns(
    store: FeatureStore,
    split: str,
    longest: dict[str, int],
    tokenizer: Callable[..., Any] | None,
    max_tokens: int,
) -> dict[str, Any]:
    view = store[split]
    table, y = view.table, view.y
    columns: dict[str, Any] = {
        "raw_text": table["text"].tolist(),
        "id": _export_ids(store)[view.rows].tolist(),
        "regression_labels": y,
        "classification_labels": (np.sign(y) + 1).astype(np.int64),
        "annotations": [("Negative", "Neutral", "Positive")[int(k) + 1] for k in np.sign(y)],
    }
    for letter in "TAV":
        if f"y_{letter}" in table:
            columns[f"regression_labels_{letter}"] = table[f"y_{letter}"].to_numpy(np.float32)
    for m, length in longest.items():
        shape = (len(view), length, store.info.widths[m])
        columns[MODALITY_NAMES[m]] = StreamedArray(shape, np.dtype("<f4"), _padded(view, m, length))
        columns[f"{MODALITY_NAMES[m]}_lengths"] = np.minimum(view.lengths(m), length).tolist()
    if tokenizer is not None:
        options = dict(padding="max_length", truncation=True, max_length=max_tokens)
        tokens = tokenizer(columns["raw_text"], return_token_type_ids=True, **options)
        kinds = ("input_ids", "attention_mask", "token_type_ids")
        columns["text_bert"] = np.stack([np.array(tokens[k], np.int64) for k in kinds], axis=1)
    return columns


def _export_ids(store: FeatureStore) -> np.ndarray:
    ids = store.utterances["video"] + SEPARATOR + store.utterances["clip"]
    return np.array(store.utterances["id"] if ids.duplicated().any() else ids, object)


def _padded(view: SplitView, m: str, length: int) -> Iterator[np.ndarray]:
    for row in view.rows:
        frames = view.store.frames(m, int(row))[:length]
        yield np.pad(frames, ((0, length - len(frames)), (0, 0)))[None]
