"""What a reader of public files hands over: a table, streams of raw sequences, remarks."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from conki_lib.config import MODALITY_NAMES

Range = tuple[float | int, float | int]


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
    name: str | None = None
    cleaned: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def guess_language(texts: Sequence[str]) -> str:
    """``"zh"`` if a tenth of the utterances or more hold Chinese characters, else ``"en"``."""
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in texts)
    return "zh" if chinese and chinese * 10 >= len(texts) else "en"


def last_frame(frames: Float[np.ndarray, "l d_in"] | np.ndarray) -> int:
    """Number of frames up to the last one that is not all zeros; NaN is not zero."""
    held = np.flatnonzero((frames != 0).any(axis=1))
    return int(held[-1]) + 1 if len(held) else 0


@dataclass
class PaddedSequences:
    """Sequences of one modality, padded at the back with zeros, cut to their true length.

    True length = max(stated length, last non-zero frame + 1), at most what the array holds.

    Args:
        m: ``"v"`` or ``"a"``.
        parts: per split: anything with rows of shape (l, d_in) or (d_in,), and the stated lengths.
        cleaned: counts are entered here at the end of each pass.
    """

    m: str
    parts: list[tuple[Any, np.ndarray | None]]
    cleaned: dict[str, int]

    def padded(self) -> Iterator[tuple[np.ndarray, int | None]]:
        """Each utterance as it lies in the file: all frames, and the stated length."""
        for rows, stated in self.parts:
            for i, row in enumerate(rows):
                frames = np.asarray(row)
                frames = frames.reshape(1, -1) if frames.ndim == 1 else frames
                yield frames, None if stated is None else int(stated[i])

    def __iter__(self) -> Iterator[np.ndarray]:
        raised = cut = 0
        for frames, stated in self.padded():
            last = last_frame(frames)
            if stated is not None:
                raised += stated < last
                cut += stated > len(frames)
            yield frames[: max(stated or 0, last)]
        name = MODALITY_NAMES[self.m]
        for what, n in (("length below the last frame", raised), ("length beyond the array", cut)):
            if n:
                self.cleaned[f"{name}.{what}"] = int(n)
