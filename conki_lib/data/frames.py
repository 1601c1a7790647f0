"""Own data: a table and arrays, from files, pandas or Hugging Face datasets, become a store."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.packing import LABELS, SPLIT_NAMES, Range
from conki_lib.data.pickles import BadFile
from conki_lib.data.raw import guess_language
from conki_lib.data.store import source_of, write_store

_READERS = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".jsonl": pd.read_json}


def from_frame(
    frame: Any,
    arrays: Mapping[str, Any],
    destination: str | Path,
    *,
    name: str | None = None,
    language: str | None = None,
    label_range: Range = (-3, 3),
) -> Path:
    """Write a corpus of one's own as a store.

    Args:
        frame: a DataFrame; a .csv, .parquet or .jsonl file; a Hugging Face dataset, or a dict of
            such by split. Columns: y and split (train, valid or validation, test) are needed; id,
            text, video and clip are taken where they exist (clips are numbered within a video
            where they do not); further ones are kept.
        arrays: ``"v"`` and ``"a"``, as far as there are: a folder of ``<id>.npy``, the name of a
            column that holds the frames, a mapping from ids, or a sequence in the order of rows;
            each array is (frames, features) or (features,).
        destination: folder of the new store.
        name: of the corpus; default: the destination's.
        language: ``"en"``, ``"zh"``; guessed by default.
        label_range: smallest and largest label.

    Returns:
        The destination.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: a column or an array is missing, or a value does not fit; names the row.
    """
    is_file = isinstance(frame, str | Path)
    if is_file and not Path(frame).is_file():
        raise FileNotFoundError(f"{frame}: there is no such file; check the path")
    named = frame if is_file else f"the {type(frame).__name__}"
    table = _as_table(frame)
    wrong = [c for c in ("y", "split") if c not in table]
    if wrong:
        raise ValueError(f"{named}: column {wrong[0]!r} is missing among {list(table)}")
    unknown = set(table["split"].dropna()) - set(SPLIT_NAMES)
    if unknown:
        raise ValueError(
            f"{named}: split {sorted(map(str, unknown))[0]!r} is none of {', '.join(SPLIT_NAMES)}"
        )
    ids = table["id"] if "id" in table else pd.Series(range(len(table)), table.index)
    table["id"] = ids.astype(str).where(ids.notna(), None)
    for column, default in (("text", ""), ("video", table["id"])):
        table[column] = table[column] if column in table else default
    if "clip" not in table:
        table["clip"] = table.groupby("video", dropna=False).cumcount().astype(str)
    sequences = {m: _sequences(m, given, table) for m, given in arrays.items()}
    held = [given for given in arrays.values() if isinstance(given, str) and given in table]
    table["standard"] = table.pop("split").map(SPLIT_NAMES)
    return write_store(
        destination,
        table.drop(columns=held),
        sequences,
        name=name or Path(destination).name,
        language=language or guess_language(table["text"].fillna("").astype(str).tolist()),
        label_range=label_range,
        sources=[source_of(frame)] if is_file else [],
        folds=("standard",),
    )


def _as_table(frame: Any) -> pd.DataFrame:
    if isinstance(frame, Mapping):
        parts = [_as_table(part).assign(split=split) for split, part in frame.items()]
        return pd.concat(parts, ignore_index=True)
    if isinstance(frame, pd.DataFrame):
        return frame.reset_index(drop=True)
    if hasattr(frame, "to_pandas"):
        return frame.to_pandas().reset_index(drop=True)
    path = Path(frame)
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: {', '.join(_READERS)} are read; pass a DataFrame for others")
    options: dict[str, Any] = {}  # "007" stays "007", and the text "NA" is a text
    if path.suffix == ".csv":
        options = {"dtype": dict.fromkeys(("id", "video", "clip", "text"), str)}
        blank = dict.fromkeys(("id", "video", "split", *LABELS), [""])
        options |= {"keep_default_na": False, "na_values": blank}
    elif path.suffix == ".jsonl":
        options = {"lines": True, "dtype": False}
    try:
        return _READERS[path.suffix](path, **options)
    except ValueError as error:
        raise BadFile(f"{path} cannot be read ({error}): correct it, in UTF-8") from error


def _sequences(m: str, given: Any, table: pd.DataFrame) -> Iterator[np.ndarray]:
    """One array per row; what is missing is said before anything is written."""
    ids = table["id"].tolist()
    if isinstance(given, str) and given in table:
        given = table[given].tolist()
    if isinstance(given, str | Path):
        files = [Path(given) / f"{i}.npy" for i in ids]
        missing = [(row, file) for row, file in enumerate(files) if not file.is_file()]
        if missing:
            row, file = missing[0]
            raise ValueError(
                f"{MODALITY_NAMES[m]}: {file} is missing for row {row} (and {len(missing) - 1} "
                f"others); write an array (0, features) for an utterance without frames"
            )
        return (_frames(_load(file)) for file in files)
    if isinstance(given, Mapping):
        missing = [i for i in ids if i not in given]
        if missing:
            raise ValueError(f"{MODALITY_NAMES[m]}: no array for the id {missing[0]!r}, a text")
        return (_frames(given[i]) for i in ids)
    if not isinstance(given, Sequence | np.ndarray):
        raise ValueError(
            f"{MODALITY_NAMES[m]}: a folder, a column's name, a mapping or a sequence is needed, "
            f"not {type(given).__name__}"
        )
    return (_frames(array) for array in given)


def _load(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadFile(f"{file} is no array of numbers ({error}): write it by numpy.save") from error


def _frames(array: Any) -> np.ndarray:
    """(l, d) from an array or nested lists; one vector is one frame."""
    if not isinstance(array, np.ndarray) or array.dtype == np.dtype(object):
        try:
            array = np.array([np.asarray(row, np.float32) for row in array], np.float32)
        except (TypeError, ValueError):
            return np.zeros((), object)  # refused where it is written, with its row
    return array.reshape(1, -1) if array.ndim == 1 and array.size else array
