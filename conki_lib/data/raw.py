"""What a reader of public files hands over: a table, streams of raw sequences, remarks."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.packing import Range
from conki_lib.data.pickles import BadFile

ALIGNED = re.compile(r"(.+)\[(\d+)\]")  # a video and its clip, as the SDK names what it aligned


@dataclass
class RawCorpus:
    """A corpus as it lies in the files: nothing repaired, no feature read yet.

    ``sequences[m]`` can be iterated again and again; each pass reads the files anew, one
    utterance at a time, cut to its true length. `cleaned` is complete after a pass.
    """

    path: Path
    format: str
    utterances: pd.DataFrame
    sequences: dict[str, Iterable[np.ndarray]]
    language: str
    label_range: Range
    files: list[Path]
    nbytes: dict[str, int]
    cleaned: dict[str, int]
    notes: dict[str, str]

    def number_duplicates(self) -> None:
        """Give utterances that share id and split a number, also behind the clip; counted."""
        table = self.utterances.copy()
        same = [c for c in ("id", "standard") if c in table]
        nth = table.groupby(same, dropna=False).cumcount()
        for column in ("id", "clip"):
            numbered = table[column] + "#" + (nth + 1).astype(str)
            table[column] = table[column].where(nth == 0, numbered)
        self.utterances = table
        self.cleaned["duplicate ids numbered"] = int((nth > 0).sum())


def guess_language(texts: Sequence[str]) -> str:
    """``"zh"`` if a tenth of the utterances or more hold Chinese characters, else ``"en"``."""
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in texts)
    return "zh" if chinese and chinese * 10 >= len(texts) else "en"


def last_frame(frames: Float[np.ndarray, "l d_in"] | np.ndarray) -> int:
    """Number of frames up to the last one that is not all zeros; NaN is not zero."""
    held = np.flatnonzero((frames != 0).any(axis=1))
    return int(held[-1]) + 1 if len(held) else 0


def _frames(row: Any) -> np.ndarray:
    """(l, d_in) from an array or nested lists; one vector is one frame."""
    lists = (list, tuple)
    if isinstance(row, lists) and any(
        isinstance(value, lists) for frame in row if isinstance(frame, lists) for value in frame
    ):  # NumPy would look through all of it, however deep it is
        raise ValueError("nested too deep")
    frames = np.asarray(row)
    frames = frames.reshape(1, -1) if frames.ndim == 1 else frames
    if frames.ndim != 2 or frames.dtype.kind not in "fiub" or (len(frames) and not frames.size):
        raise ValueError(f"shape {frames.shape}, {frames.dtype}")
    return frames


@dataclass
class PaddedSequences:
    """Sequences of one modality, padded at the back with zeros, cut to their true length.

    True length = max(stated length, last non-zero frame + 1), at most what the array holds.

    Args:
        m: ``"v"`` or ``"a"``.
        parts: per split, under the name that errors give it: anything with rows of shape (l, d_in)
            or (d_in,), and the stated lengths.
        cleaned: counts are entered here at the end of each pass.
    """

    m: str
    parts: dict[str, tuple[Any, np.ndarray | None]]
    cleaned: dict[str, int]

    def __iter__(self) -> Iterator[np.ndarray]:
        raised = cut = 0
        for name, (rows, stated) in self.parts.items():
            for i, row in enumerate(rows):
                try:
                    frames = _frames(row)
                except (TypeError, ValueError) as error:
                    raise BadFile(
                        f"{name}: {MODALITY_NAMES[self.m]} of row {i} is no array (l, d) of "
                        f"numbers ({error}): correct it, or get the file again"
                    ) from error
                last = last_frame(frames)
                length = last if stated is None else int(stated[i])
                raised += length < last
                cut += length > len(frames)
                yield frames[: max(length, last)]
        name = MODALITY_NAMES[self.m]
        for what, n in (("length below the last frame", raised), ("length beyond the array", cut)):
            if n:
                self.cleaned[f"{name}.{what}"] = n
