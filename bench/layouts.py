"""Generators of files in the public layouts, of any size and with planted defects; small BERTs.

For tests and benchmarks: the values are noise. Large files are written in pieces.
"""

import json
import pickle
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.pickles import StreamedArray, write_pickle
from conki_lib.data.store import write_store
from conki_lib.data.synthetic import TARGET, Domain, generate

#: sizes of the published unaligned file: utterances, steps and widths
MOSEI = dict(counts=(16326, 1871, 4659), steps={"v": 500, "a": 500}, widths={"v": 35, "a": 74})

DEFECTS = {
    "nan": "NaN in the third train sequence",
    "inf": "+inf and -inf there",
    "overflow": "a float64 value that float32 cannot hold, there",
    "zeros": "the first train sequence is zero throughout",
    "silence": "a zero frame inside the second train sequence",
    "short length": "the second train sequence's stated length is 1",
    "long length": "the third train sequence's stated length is beyond the array",
    "label": "the second test label is 4.5",
    "shared id": "the first test id is the first train id",
    "empty text": "the second train text is empty",
    "constant": "the last feature is 1 in all frames that are not zero",
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # pieces of every BERT
_WORDS = ("it", "is", "really", "a", "very", "good", "bad", "film", "sort", "of")
_BLOCK = 32


def mmsa_layout(
    *,
    counts: tuple[int, ...] = (6, 3, 3),
    steps: dict[str, int] | None = None,
    widths: dict[str, int] | None = None,
    dtype: str = "f4",
    aligned: bool = False,
    unimodal: bool = False,
    ids: str = "text",
    defects: Collection[str] = (),
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Describe an MMSA file: per split its columns, features as `StreamedArray`.

    Args:
        counts: utterances in train, valid, test.
        steps: frames per modality.
        widths: features per modality.
        dtype: of the features.
        aligned: no stated lengths.
        unimodal: labels per modality, as in CH-SIMS, in [-1, 1], and Chinese text.
        ids: ``text`` (``vid$_$clip``), ``video`` (``[vid]``) or ``times`` (``[vid, start, end]``).
        defects: names of `DEFECTS`.
        seed: of everything random.
    """
    unknown = set(defects) - set(DEFECTS)
    if unknown:
        raise ValueError(f"unknown defects {sorted(unknown)}: known are {', '.join(DEFECTS)}")
    steps, widths = steps or {"v": 9, "a": 7}, widths or {"v": 4, "a": 3}
    content: dict[str, dict[str, Any]] = {}
    for k, (split, n) in enumerate(zip(("train", "valid", "test"), counts, strict=True)):
        rng = np.random.default_rng((seed, k))
        columns = _table(rng, split, n, ids, unimodal)
        for m, length in steps.items():
            lengths = rng.integers(1, length + 1, n)
            shape = (n, length, widths[m])
            planted = frozenset(defects) if split == "train" else frozenset(defects) & {"constant"}
            blocks = _Blocks(shape, dtype, lengths, planted, (seed, k, ord(m)))
            columns[MODALITY_NAMES[m]] = StreamedArray(shape, np.dtype(dtype), blocks)
            if not aligned:
                columns[f"{MODALITY_NAMES[m]}_lengths"] = _stated(lengths, length, planted)
        content[split] = columns
    _plant_table(content, defects)
    return content


def _table(
    rng: np.random.Generator, split: str, n: int, ids: str, unimodal: bool
) -> dict[str, Any]:
    high = 1 if unimodal else 3
    y = np.round(rng.uniform(-high, high, n), 1).astype(np.float32)
    videos = [f"{split[:2]}-_{i // 3:05d}_x" for i in range(n)]
    forms = {
        "text": [f"{v}$_${i % 3}" for i, v in enumerate(videos)],
        "video": np.array(videos).reshape(-1, 1),
        "times": np.array(
            [[v, str(i % 3 * 2.5), str(i % 3 * 2.5 + 2)] for i, v in enumerate(videos)]
        ),
    }
    columns: dict[str, Any] = {
        "raw_text": [" ".join(rng.choice(_WORDS, rng.integers(2, 9))) for _ in range(n)],
        "id": forms[ids],
        "regression_labels": y,
        "classification_labels": np.sign(y) + 1,
        "annotations": [("Negative", "Neutral", "Positive")[int(s) + 1] for s in np.sign(y)],
    }
    if unimodal:
        columns["raw_text"] = [f"这部电影很好{i}" for i in range(n)]
        for letter in "TAV":
            columns[f"regression_labels_{letter}"] = rng.permutation(y)
    return columns


@dataclass(frozen=True)
class _Blocks:
    """Padded features of one split in blocks of rows; each pass gives the same values."""

    shape: tuple[int, int, int]
    dtype: str
    lengths: np.ndarray
    defects: frozenset[str]
    seed: tuple[int, ...]

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(self.seed)
        n, steps, width = self.shape
        for start in range(0, n, _BLOCK):
            lengths = self.lengths[start : start + _BLOCK]
            block = rng.standard_normal((len(lengths), steps, width), np.float32)
            block = block.astype(self.dtype)
            block[np.arange(steps) >= lengths[:, None]] = 0
            if start == 0:
                _plant(block, self.defects)
            if "constant" in self.defects:
                block[(block != 0).any(axis=-1), -1] = 1
            yield block


def _plant(block: np.ndarray, defects: frozenset[str]) -> None:
    """Put the defects of features into the first three sequences of a split."""
    if defects & {"nan", "inf", "overflow"}:
        block[2, : min(4, len(block[2]))] = 1
    if "nan" in defects:
        block[2, 0, 0] = np.nan
    if "inf" in defects:
        block[2, 1, :2] = np.inf, -np.inf
    if "overflow" in defects and block.dtype == np.float64:
        block[2, 2, 0] = 1e300
    if "silence" in defects or "short length" in defects:
        block[1, :3] = [[0.5]] if "silence" not in defects else [[0.5], [0], [0.5]]
    if "zeros" in defects:
        block[0] = 0


def _stated(lengths: np.ndarray, steps: int, defects: frozenset[str]) -> list[int]:
    stated = lengths.tolist()
    if "short length" in defects:
        stated[1] = 1
    if "long length" in defects:
        stated[2] = steps + 5
    return stated


def _plant_table(content: dict[str, dict[str, Any]], defects: Collection[str]) -> None:
    train, test = content["train"], content["test"]
    if "label" in defects:
        test["regression_labels"][1] = 4.5
    if "shared id" in defects:
        test["id"][0] = train["id"][0]
    if "empty text" in defects:
        train["raw_text"][1] = " "


def whole(content: dict[str, dict[str, Any]], lists: bool = False) -> dict[str, dict[str, Any]]:
    """The layout with its features in memory: as arrays, or as lists of arrays."""

    def arrays(value: Any) -> Any:
        if not isinstance(value, StreamedArray):
            return value
        array = np.concatenate(list(value.blocks))
        return list(array) if lists else array

    return {s: {k: arrays(v) for k, v in columns.items()} for s, columns in content.items()}


def write_mmsa_layout(path: str | Path, *, protocol: int | None = None, **options: Any) -> Path:
    """Write `mmsa_layout` to a file: in pieces, or by ``pickle.dump`` with a protocol."""
    path = Path(path)
    content = mmsa_layout(**options)
    with path.open("wb") as file:
        if protocol is None:
            write_pickle(file, content)
        else:
            pickle.dump(whole(content), file, protocol)
    return path


CSD_ODDITIES = {
    "unsorted": "rows are stored in random order",
    "negative": "the first row of each video starts before 0",
    "nan": "NaN among the features",
    "pauses": "every third word is sp",
    "absent": "the first video has no vision",
    "untimed": "one row of each video has NaN as its time",
}


def write_csd_layout(
    folder: str | Path,
    *,
    videos: int = 4,
    segments: int = 3,
    rows: int = 10,
    widths: dict[str, int] | None = None,
    aligned: bool = False,
    emotions: bool = False,
    oddities: Collection[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Write a folder of ``.csd`` files with ``folds.json``; features tell time and video.

    Feature 0 of a row is its midpoint in seconds, feature 1 the video's number, so that a test can
    say where each row belongs. Segment k of a video lasts from 2k to 2k + 1.5 seconds.

    Returns:
        The folds: video ids per split.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"vi-{k}_{'x' * 6}" for k in range(videos)]
    labels, words, sequences = {}, {}, {m: {} for m in (widths or {"v": 35, "a": 74})}
    for k, video in enumerate(names):
        spans = np.array([[2.0 * s, 2.0 * s + 1.5] for s in range(segments)])
        y = np.round(rng.uniform(-3, 3, (segments, 7 if emotions else 1)), 1)
        labels[video] = (spans, y)
        texts = [b"sp" if "pauses" in oddities and i % 3 == 2 else b"w%d" % i for i in range(rows)]
        words[video] = (_times(rng, rows, segments, oddities), np.array(texts)[:, None])
        for m, width in (widths or {"v": 35, "a": 74}).items():
            if "absent" in oddities and k == 0 and m == "v":
                continue
            times = _times(rng, rows, segments, oddities)
            features = rng.standard_normal((rows, width))
            features[:, 0], features[:, 1] = times.mean(axis=1), k
            if "nan" in oddities:
                features[rng.integers(rows), 2:] = np.nan
            order = rng.permutation(rows) if "unsorted" in oddities else np.arange(rows)
            sequences[m][video] = (times[order], features[order])
    roots = {"v": "FACET_4.2", "a": "COVAREP", "words": "words", "labels": "Opinion Segment Labels"}
    for part, data in {**sequences, "words": words, "labels": labels}.items():
        held = _aligned(data, labels) if aligned else data
        _write_csd(folder / f"CMU_TOY_{roots[part].replace(' ', '_')}.csd", roots[part], held)
    folds = {"train": names[: videos - 2], "valid": names[-2:-1], "test": names[-1:]}
    (folder / "folds.json").write_text(json.dumps(folds), encoding="utf-8")
    return folds


def _times(
    rng: np.random.Generator, rows: int, segments: int, oddities: Collection[str]
) -> np.ndarray:
    starts = np.sort(rng.uniform(0, 2 * segments, rows))
    times = np.stack([starts, starts + rng.uniform(0, 0.4, rows)], axis=1)
    if "negative" in oddities:
        times[0] = -0.1, 0.3
    if "untimed" in oddities:
        times[rows // 2] = np.nan
    return times


def _aligned(data: dict[str, Any], labels: dict[str, Any]) -> dict[str, Any]:
    """Cut each video into entries ``video[k]``, one per labelled segment."""
    cut = {}
    for video, (times, features) in data.items():
        middle = times.mean(axis=1)
        for k, (start, end) in enumerate(labels[video][0]):
            inside = (middle >= start) & (middle < end)
            cut[f"{video}[{k}]"] = (times[inside], features[inside])
    return cut


def _write_csd(path: Path, root: str, data: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        for key, (times, features) in data.items():
            file[f"{root}/data/{key}/intervals"] = times
            file[f"{root}/data/{key}/features"] = features
        for name, value in {"root name": root, "version": 1, "description": "generated"}.items():
            entry = file.create_dataset(f"{root}/metadata/{name}", (1,), h5py.string_dtype())
            entry[0] = json.dumps(value)


def save_bert(
    folder: Path, words: Iterable[str], *, d: int = 16, layers: int = 2, heads: int = 2,
    ff: int | None = None, weights: bool = True, pooler: bool = True, **config: Any,
) -> str:  # fmt: skip
    """Save a BERT of random weights to a folder.

    Args:
        folder: is made.
        words: pieces that its tokenizer knows beside the special ones.
        d: width.
        layers: of the encoder.
        heads: of each layer.
        ff: feed-forward width, 2 d by default.
        weights: save them too; else configuration and tokenizer alone, to draw weights later.
        pooler: has BERT's pooler.
        **config: further settings of `BertConfig`.

    Returns:
        The folder as the name of a text backbone.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    known = [*SPECIAL, *words]
    BertTokenizer(vocab={word: i for i, word in enumerate(known)}).save_pretrained(folder)
    sizes = dict(hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads)
    sizes |= dict(intermediate_size=ff or 2 * d, vocab_size=len(known))
    chosen = BertConfig(**{**sizes, **config})
    chosen.save_pretrained(folder)
    if weights:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            BertModel(chosen, add_pooling_layer=pooler).save_pretrained(folder)
    return str(folder)


def write_synthetic(
    destination: Path,
    domain: Domain = TARGET,
    *,
    sizes: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> Path:
    """Write the store of a generated corpus in other sizes, or by another seed."""
    contents = generate(replace(domain, sizes=sizes or domain.sizes), seed)
    options = dict(name=domain.name, language="en", label_range=(-3.0, 3.0), notes=contents.notes)
    return write_store(destination, contents.utterances, contents.sequences, **options)
