"""CMU-MultimodalSDK's ``.csd`` files: features, words and labels of a folder, cut into utterances.

Source: the layout ``/<root>/data/<key>/{features,intervals}``; a key is a video, or ``video[k]``
after alignment. Differs: from the SDK's own alignment, which copies a row into every segment that
it touches; here a row belongs to the segment that holds its midpoint, so none is counted twice.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.damage import refuse_damaged
from conki_lib.data.packing import COLUMNS, LABELS, SPLITS
from conki_lib.data.pickles import BadFile
from conki_lib.data.raw import ALIGNED, RawCorpus, guess_language

ROLES = {
    "labels": ("label", "opinion", "sentiment", "emotion"),
    "v": ("facet", "openface", "vision", "visual", "video", "face"),
    "a": ("covarep", "opensmile", "acoustic", "audio"),
    "unused": ("phon", "glove", "vector", "bert"),
    "words": ("word", "transcript", "text"),
}
EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")


class CsdFile:
    """One ``.csd`` file: rows of features with their times, per key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_damaged(path)
        try:
            self.file = h5py.File(path, "r")
        except OSError as error:
            cut = "truncated" in str(error)
            what = "a truncated HDF5 file" if cut else f"no readable HDF5 file ({error})"
            raise BadFile(f"{path} is {what}: get it again") from error
        groups = {k: v for k, v in self.file.items() if isinstance(v, h5py.Group)}
        roots = [k for k, v in groups.items() if isinstance(v.get("data"), h5py.Group)]
        if len(roots) != 1:
            raise BadFile(
                f"{path} is an HDF5 file, but no .csd: one group <name>/data is needed, there "
                f"{'is none' if not roots else 'are ' + ', '.join(roots)}"
            )
        self.root = roots[0]
        self.data = self.file[self.root]["data"]

    @cached_property
    def width(self) -> int:
        """Features per row."""
        return int(np.prod(self._first.shape[1:]))

    @property
    def _first(self) -> h5py.Dataset:
        for key in self.data:
            return self._dataset(key, "features")
        raise BadFile(f"{self.path}: {self.root}/data is empty: get the file again")

    def _dataset(self, key: str, name: str) -> h5py.Dataset:
        try:
            found = self.data[key][name]
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise BadFile(f"{self.path}: {self.root}/data/{key} has no {name}") from error
        if not isinstance(found, h5py.Dataset) or not found.ndim:
            raise BadFile(f"{self.path}: {self.root}/data/{key}/{name} holds no rows")
        return found

    def role(self) -> str:
        """``words``, ``labels``, ``v``, ``a`` or ``unused``: by names, then by content."""
        names = f"{self.root} {self.path.stem}".lower()
        for role, hints in ROLES.items():
            if any(hint in names for hint in hints):
                return role
        if self._first.dtype.kind in "SOU":
            return "words"
        return {1: "labels", 7: "labels", 74: "a", 35: "v"}.get(self.width, "unused")

    def unsorted(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Times (n, 2) and features (n, d) of a key as they stand in the file."""
        features = np.asarray(self._dataset(key, "features")[()])
        try:
            times = np.asarray(self._dataset(key, "intervals")[()], np.float64).reshape(-1, 2)
        except (TypeError, ValueError) as error:
            raise BadFile(f"{self.path}: {key}: intervals are no pairs of seconds") from error
        features = features.reshape(len(features), int(np.prod(features.shape[1:])))
        if len(times) != len(features):
            raise BadFile(
                f"{self.path}: {key} has {len(features)} rows and {len(times)} intervals: "
                f"get the file again"
            )
        return times, features

    def rows(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Times and features of a key, sorted by time; rows without time are left out."""
        times, features = self.unsorted(key)
        order = np.lexsort((times[:, 1], times[:, 0]))
        order = order[np.isfinite(times[order]).all(axis=1)]
        return times[order], features[order]


@dataclass
class CsdSequences:
    """Per utterance the rows of one file whose midpoint lies in the segment, in order of time."""

    source: CsdFile
    m: str
    segments: list[tuple[str, str, float, float]]  # video, clip, start, end
    cleaned: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[np.ndarray]:
        absent, rows = 0, lru_cache(1)(self.source.rows)
        for video, clip, start, end in self.segments:
            key = next((k for k in (f"{video}[{clip}]", video) if k in self.source.data), None)
            if key is None:
                absent += 1
                yield np.zeros((0, self.source.width), np.float32)
                continue
            times, features = rows(key)
            if key == video:
                middle = times.mean(axis=1)
                features = features[(middle >= start) & (middle < end)]
            yield features
        if absent:
            self.cleaned[f"{MODALITY_NAMES[self.m]}.video not in the file"] = absent


def read_csd(
    folder: Path,
    *,
    folds: Mapping[str, Any] | str | Path | None = None,
    roles: Mapping[str, str] | None = None,
) -> RawCorpus:
    """Describe the corpus in a folder of ``.csd`` files; features are read when iterated.

    Args:
        folder: holds labels, and any of words, vision features, audio features.
        folds: ``{"train": [video ids], "valid": [...], "test": [...]}``, or several such by name,
            or a JSON file of that form; default: ``folds.json`` in the folder.
        roles: ``{"v": "FACET_4.2.csd"}`` where names and content do not tell, or two files compete.

    Raises:
        BadFile: a file is damaged or of no known role, no labels, no folds, a video in two splits.
    """
    files = _by_role(folder, dict(roles or {}))
    cleaned: dict[str, int] = {}
    table = _segments(files["labels"], cleaned)
    table = table.assign(**_fold_columns(folder, folds, table["video"], cleaned))
    segments = list(table[["video", "clip", "start", "end"]].itertuples(index=False, name=None))
    table["text"] = _texts(files["words"], segments) if "words" in files else ""
    sequences = {m: CsdSequences(files[m], m, segments, cleaned) for m in ("v", "a") if m in files}
    nbytes = {m: files[m].path.stat().st_size for m in sequences}
    used = [f"{MODALITY_NAMES.get(r, r)}: {f.path.name}" for r, f in files.items()]
    notes, paths = {"files": ", ".join(used)}, [f.path for f in files.values()]
    language, table = guess_language(table["text"].tolist()), table.drop(columns=["start", "end"])
    return RawCorpus(
        folder, "csd", table, sequences, language, (-3, 3), paths, nbytes, cleaned, notes
    )


def _by_role(folder: Path, roles: dict[str, str]) -> dict[str, CsdFile]:
    given = {name: role for role, name in roles.items()}
    unknown = [f for f in given if not (folder / f).is_file()]
    unknown += [r for r in roles if r not in ROLES]
    if unknown:
        raise BadFile(
            f"{folder}: roles name {unknown[0]!r}; files of the folder are meant, under the keys "
            f"{', '.join(ROLES)}"
        )
    found: dict[str, CsdFile] = {}
    for path in sorted(folder.glob("*.csd")):
        source = CsdFile(path)
        role = given.get(path.name) or source.role()
        if role == "unused" or (role in roles and path.name not in given):
            continue
        if role in found:
            raise BadFile(
                f"{folder}: {found[role].path.name} and {path.name} both look like "
                f"{MODALITY_NAMES.get(role, role)}: choose by roles={{{role!r}: {path.name!r}}} "
                f"(--role {role}={path.name}) or move one away"
            )
        found[role] = source
    if "labels" not in found:
        raise BadFile(
            f"{folder}: no .csd file with labels (e.g. 'CMU_MOSI_Opinion_Labels.csd'); add it, or "
            f"name it by roles={{'labels': ...}} (--role labels=FILE)"
        )
    return found


def _segments(labels: CsdFile, cleaned: dict[str, int]) -> pd.DataFrame:
    """One row per labelled segment, by video and time; the clip is its place in the file."""
    if labels._first.dtype.kind not in "fiu" or not labels.width:
        raise BadFile(f"{labels.path}: labels are {labels._first.dtype}, numbers are needed")
    rows, dropped = [], 0
    for key in labels.data:
        match = ALIGNED.fullmatch(key)
        video, clip = (match[1], match[2]) if match else (key, None)
        times, values = labels.unsorted(key)
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise BadFile(f"{labels.path}: {key}: labels are no numbers ({error})") from error
        for k, ((start, end), value) in enumerate(zip(times, values, strict=True)):
            if not np.isfinite([start, end, value[0]]).all():
                dropped += 1
                continue
            number = str(k) if clip is None else clip if len(times) == 1 else f"{clip}.{k}"
            emotions = dict(zip(EMOTIONS, value[1:], strict=False)) if len(value) == 7 else {}
            rows.append(
                {"video": video, "clip": number, "y": value[0], **emotions}
                | {"start": min(start, end), "end": max(start, end)}
            )
    if dropped:
        cleaned["segments without label or time"] = dropped
    if not rows:
        raise BadFile(f"{labels.path}: no labelled segment: get the file again")
    table = pd.DataFrame(rows).sort_values(["video", "start", "end"], kind="stable")
    table.insert(0, "id", table["video"] + "$_$" + table["clip"])
    return table.reset_index(drop=True)


def _texts(words: CsdFile, segments: list[tuple[str, str, float, float]]) -> list[str]:
    """Words of each segment in order of time, pauses (``sp``) left out."""
    if words._first.dtype.kind not in "SOU":
        raise BadFile(f"{words.path} holds numbers, not words: name another by --role words=FILE")
    texts = []
    for rows in CsdSequences(words, "t", segments):
        spoken = rows[:, 0].tolist() if rows.dtype.kind in "SOU" else []
        decoded = (w.decode("utf-8", "replace") if isinstance(w, bytes) else w for w in spoken)
        texts.append(" ".join(w for w in map(str.strip, decoded) if w not in ("", "sp")))
    return texts


def _fold_columns(
    folder: Path, folds: Any, videos: pd.Series, cleaned: dict[str, int]
) -> dict[str, pd.Series]:
    """One column per fold: the split of each row's video, or None; what does not match is said."""
    where = "folds"
    if not isinstance(folds, Mapping):
        where = str(folds or folder / "folds.json")
        folds = _read_folds(Path(where))
    if not isinstance(folds, Mapping) or not folds:
        raise BadFile(f"{where}: splits with lists of video ids are needed")
    named = folds if not set(folds) & set(SPLITS) else {"standard": folds}
    columns = {}
    for fold, splits in named.items():
        here = f"{where}, fold {fold!r}"
        if not str(fold).strip() or fold in (*COLUMNS, *LABELS, *EMOTIONS, "start", "end"):
            raise BadFile(f"{here}: that name is taken or empty; choose another")
        split_of = _split_of(here, splits)
        column = videos.map(split_of).astype(object)
        for split in [s for s in splits if splits[s] and s not in set(column)]:
            raise BadFile(
                f"{here}, {split}: none of its videos is labelled in {folder} (there are "
                f"{', '.join(videos.unique()[:3])}, ...): correct the ids"
            )
        for what, lost in (
            (f"videos of {fold} that are not labelled", sorted(set(split_of) - set(videos))),
            (f"labelled videos in no split of {fold}", sorted(set(videos[column.isna()]))),
        ):
            if lost:
                cleaned[what] = len(lost)
                warnings.warn(
                    f"{where}: {len(lost)} {what}, e.g. {lost[0]}: check the ids", stacklevel=2
                )
        columns[fold] = column.where(column.notna(), None)
    return columns


def _read_folds(path: Path) -> Any:
    if not path.is_file():
        raise BadFile(
            f"{path} is missing: .csd files do not say which videos are train, valid and test. "
            'Write that file, {"train": ["video", ...], "valid": [...], "test": [...]}, or pass '
            "such a dict as folds (a file: --folds FILE)"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise BadFile(f"{path} is no JSON ({error}): correct it") from error


def _split_of(where: str, splits: Any) -> dict[str, str]:
    if not isinstance(splits, Mapping) or set(splits) - set(SPLITS):
        given = list(splits) if isinstance(splits, Mapping) else splits
        raise BadFile(f"{where}: lists under {', '.join(SPLITS)} are needed, not {given!r}")
    found: dict[str, str] = {}
    for split, ids in splits.items():
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise BadFile(f"{where}, {split}: a list of video ids is needed, not {ids!r}")
        for video in ids:
            if found.setdefault(str(video), split) != split:
                raise BadFile(
                    f"{where}: video {video!r} is in {found[str(video)]} and in {split}: training "
                    f"data would leak; leave it in one"
                )
    if not found:
        raise BadFile(f"{where}: no video is named")
    return found
