"""What lies at a path, said before it is read; and the way from public files to a store."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from conki_lib.config import MODALITY_NAMES
from conki_lib.data.aside import clear_away
from conki_lib.data.csd import CsdFile, read_csd
from conki_lib.data.damage import AGAIN, refuse_damaged
from conki_lib.data.inspection import Inspection, inspect_raw, inspect_store
from conki_lib.data.mmsa import RELEASES, is_mmsa, read_mmsa
from conki_lib.data.packing import SPLITS, Range
from conki_lib.data.pickles import BadFile, read_pickle
from conki_lib.data.raw import RawCorpus
from conki_lib.data.store import FEATURES, INFO, UTTERANCES, open_store, write_store

_READABLE = {"mmsa": "an MMSA pickle", "csd": "a folder of .csd files"}


def recognise(
    path: str | Path,
    scratch: Path | None = None,
    *,
    folds: Mapping[str, Any] | str | Path | None = None,
    roles: Mapping[str, str] | None = None,
) -> RawCorpus:
    """Describe the corpus at a path, told by first and last bytes; no array is read.

    Args:
        path: an MMSA pickle, or a folder of ``.csd`` files.
        scratch: see `read_pickle`.
        folds: see `convert`.
        roles: see `convert`.

    Raises:
        FileNotFoundError: there is nothing.
        BadFile: it is neither; says what it is and the way out.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, folds, roles)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file or folder; check the path")
    raw = _file(path, scratch)
    if folds is not None or roles is not None:
        raise ValueError(f"{path}: folds and roles are for .csd files, its splits stand in it")
    return raw


def _is_store(path: Path) -> bool:
    """A store, or what is left of one."""
    return any((path / file).is_file() for file in (INFO, FEATURES, UTTERANCES))


def _folder(path: Path, folds: Any, roles: Mapping[str, str] | None) -> RawCorpus:
    if _is_store(path):
        raise BadFile(f"{path} is a store already, or what is left of one: try open_store")
    if any(path.glob("*.csd")):
        return read_csd(path, folds=folds, roles=roles)
    raise BadFile(
        f"{path} is a folder without .csd files: give an MMSA pickle, or a folder with .csd files "
        "(labels, words, features)"
    )


def _file(path: Path, scratch: Path | None) -> RawCorpus:
    refuse_damaged(path)
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        CsdFile(path)
        raise BadFile(f"{path} is a single .csd file: give its folder, {path.parent}")
    if head[:1] not in b"\x80(}]c":
        raise BadFile(
            f"{path} is no known format (first bytes {head!r}): MMSA pickles and folders of .csd "
            f"files are read; if it should be one, {AGAIN}"
        )
    content = read_pickle(path, scratch)
    if is_mmsa(content):
        return read_mmsa(path, content)
    keys = f" with {', '.join(map(str, list(content)[:6]))}" if isinstance(content, dict) else ""
    raise BadFile(
        f"{path} is a foreign pickle: a {type(content).__name__}{keys}: a dict of train, valid and "
        "test is needed, each a dict with regression_labels, id, raw_text, vision, audio"
    )


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    name: str | None = None,
    format: str | None = None,
    language: str | None = None,
    label_range: Range | None = None,
    folds: Mapping[str, Any] | str | Path | None = None,
    roles: Mapping[str, str] | None = None,
    number_duplicates: bool = False,
) -> Path:
    """Turn an MMSA pickle, or a folder of ``.csd`` files, into a store.

    What is not given is guessed from the content. Arrays stay in the file until their rows are
    written one by one, so that memory does not grow with the file; the store appears when complete.

    Args:
        source: the pickle, or the folder.
        destination: folder of the new store.
        name: default: the known release's, else the destination's name.
        format: ``"mmsa"`` or ``"csd"``.
        language: ``"en"`` or ``"zh"``.
        label_range: smallest and largest label; default (-3, 3), or (-1, 1) as in CH-SIMS.
        folds: for ``.csd``: video ids per split, see `read_csd`.
        roles: for ``.csd``: which file is what, where it cannot be guessed.
        number_duplicates: tell utterances of one split with the same id apart by numbers, which
            are counted; default: they are an error. One id in two splits always is.

    Returns:
        The destination.

    Raises:
        BadFile: not such a file; says what it is and the way out.
        ValueError: labels outside the range, ids in two splits and the like; names the row.
    """
    destination = Path(destination)
    folders = (destination.absolute(), *destination.absolute().parents)
    scratch = next(folder for folder in folders if folder.is_dir())
    clear_away(destination)
    if destination.exists() and any(destination.iterdir() if destination.is_dir() else [1]):
        raise FileExistsError(f"{destination} exists already: remove it, or choose another name")
    if format not in (None, *_READABLE):
        raise ValueError(f"format={format!r}: 'mmsa' and 'csd' are known; leave it out to guess")
    raw = recognise(source, scratch, folds=folds, roles=roles)
    if format not in (None, raw.format):
        what = _READABLE[raw.format]
        raise BadFile(f"{source} is {what}, not of the format {format!r}: leave out format")
    if number_duplicates:
        raw.number_duplicates()
    total = sum(path.stat().st_size for path in raw.files) + sum(raw.nbytes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="checksum") as bar:
        sources = [_hashed(path, bar) for path in raw.files]
        release = RELEASES.get(sources[0]["sha256"])
        notes = {"format": raw.format, **raw.notes}
        if raw.format == "mmsa":
            notes |= _release_note(raw, sources[0]["sha256"])
        try:
            return write_store(
                destination,
                raw.utterances,
                {m: _watched(raw, m, bar) for m in raw.sequences},
                name=name or (release.name if release else destination.name),
                language=language or raw.language,
                label_range=label_range or (release.label_range if release else raw.label_range),
                sources=sources,
                cleaned=raw.cleaned,
                notes=notes,
            )
        except BadFile:
            raise
        except ValueError as error:
            raise BadFile(f"{source}: {error}") from error


def inspect_path(
    path: str | Path,
    *,
    folds: Mapping[str, Any] | str | Path | None = None,
    roles: Mapping[str, str] | None = None,
) -> Inspection:
    """Describe a store, an MMSA pickle or a folder of ``.csd`` files, without converting it.

    Files are streamed, one utterance at a time; what `convert` would refuse is listed, not raised.

    Args:
        path: of the store, the file or the folder.
        folds: see `convert`.
        roles: see `convert`.

    Raises:
        BadFile: it is none of these; says what it is.
    """
    if _is_store(Path(path)):
        return inspect_store(open_store(path))
    beside = Path(path).absolute().parent  # temporary files of many GB may be needed
    scratch = beside if os.access(beside, os.W_OK) else None
    raw = recognise(path, scratch, folds=folds, roles=roles)
    if raw.format == "mmsa":
        with tqdm(total=raw.path.stat().st_size, unit="B", unit_scale=True, desc="checksum") as bar:
            raw.notes |= _release_note(raw, _hashed(raw.path, bar)["sha256"])
    return inspect_raw(raw)


def _hashed(path: Path, bar: tqdm) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return {"file": path.name, "sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def _watched(raw: RawCorpus, m: str, bar: tqdm) -> Iterator[np.ndarray]:
    bar.set_description(MODALITY_NAMES[m])
    share = raw.nbytes[m] / len(raw.utterances)
    for frames in raw.sequences[m]:
        yield frames
        bar.update(share)


def _release_note(raw: RawCorpus, sha: str) -> dict[str, str]:
    """Name the known release; warn of a file that looks like one and is another."""
    if sha in RELEASES:
        return {"release": f"MMSA's {RELEASES[sha].file}, by its SHA-256"}
    counts = tuple(int((raw.utterances["standard"] == split).sum()) for split in SPLITS)
    alike = {r.file: s for s, r in RELEASES.items() if r.counts == counts}
    if not alike:
        return {"release": f"none of those that MMSA published, by its SHA-256 {sha}"}
    expected = "; ".join(f"{file} has {s}" for file, s in alike.items())
    note = f"as many utterances as {', '.join(alike)}, but another SHA-256, {sha}: {expected}"
    warnings.warn(
        f"{raw.path}: {note}. It is read all the same; if you meant the release, compare the "
        f"files: this is another export of it, or damaged inside",
        stacklevel=3,
    )
    return {"release": note}
