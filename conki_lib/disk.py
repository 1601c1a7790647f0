"""Where corpora lie; one clear error for disks that are full, read-only or over quota; folders
that keep within a bound."""

import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from conki_lib.config import ROOT

WORDS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ENOTDIR: "a file stands where a folder is needed",
}


def data_root(root: Path | str | None = None) -> Path:
    """The folder that holds all stores: `root`, else $CONKI_DATA, else ``data/`` of the project."""
    return Path(root or ROOT / (os.environ.get("CONKI_DATA") or "data"))


def corpus_path(name: str, root: Path | str | None = None) -> Path:
    """The folder of a corpus's store, whether it is there or not."""
    return data_root(root) / name


class DiskError(OSError):
    """Something could not be written; the message names the folder and the way out."""


def disk_problem(folder: Path) -> int | None:
    """Try to write a little into a folder, without a trace.

    Returns:
        The number of the error where it is one of `WORDS`, else None.
    """
    while not folder.is_dir() and folder != folder.parent:
        if folder.exists():
            return errno.ENOTDIR
        folder = folder.parent
    try:
        _probe(folder)
    except OSError as error:
        return error.errno if error.errno in WORDS else None
    return None


def make_writable(what: str, folder: Path, way_out: str) -> None:
    """Make a folder and try to write into it, before the work whose result shall lie there.

    Raises:
        DiskError: see `explained`.
    """
    with explained(what, folder, way_out):
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder)


def _probe(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 16))  # an empty file fits on a full disk


@contextmanager
def explained(what: str, folder: Path, way_out: str) -> Iterator[None]:
    """Say clearly what could not be written, and where, if the disk is why something failed.

    On a full disk safetensors raises an error of its own, PyTorch a RuntimeError and NumPy an
    OSError without a number, none of which names the cause reliably; so the disk is asked.

    Args:
        what: is being written: ``"the checkpoint"``.
        folder: where; it need not exist yet.
        way_out: what the user can do.

    Raises:
        DiskError: the disk is full or cannot be written; any other error passes unchanged.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        named = getattr(error, "filename", None)  # another disk may be full, a file that is read
        elsewhere = isinstance(named, str) and not _lies_in(named, folder)
        if elsewhere or code not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            code = disk_problem(folder)
        if code is None:
            raise
        raise DiskError(code, f"{WORDS[code]} for {what} in {folder}: {way_out}") from error


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A name to write to, renamed in the end: a reader sees the old file or the whole new one.

    Raises:
        DiskError: it could not be written; what was there is kept.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with explained(path.name, path.parent, "make it writable, or free some space"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(path)
        finally:
            with suppress(OSError):  # a disk that is read-only
                partial.unlink(missing_ok=True)


def _lies_in(path: str, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())


# ---- folders of folders that keep within a bound ------------------------------------------------


class _Look(NamedTuple):
    opened: float  # when it was last written or opened
    size: int
    path: Path


RESERVED = "reserved"  # as long as what shall be written beside it, though it takes no space


def make_room(folder: Path, size: int, *, largest: int, kept: float) -> Path | None:
    """Make a new folder for so many bytes within a folder of folders that is bounded.

    Until they fit, what was not opened lately is removed, oldest first. To open is to touch a file
    in there. What killed writers have left goes the same way.

    Args:
        folder: holds folders.
        size: bytes that shall be added.
        largest: bytes of all together.
        kept: seconds; folders that were opened since may be in use, and stay.

    Returns:
        The new folder, its name hidden; `RESERVED` in there counts until the writer removes it.
        None where the bytes do not fit, be it within the bound or on the disk.
    """
    with FileLock(folder / "room.lock"):
        looks = sorted(_look(path) for path in folder.iterdir() if path.is_dir())
        held, now = sum(look.size for look in looks), time.time()

        def fits() -> bool:
            return held + size <= largest and size <= 0.8 * shutil.disk_usage(folder).free

        for look in looks:
            if fits() or now - look.opened <= kept:
                break
            held -= look.size * remove_at_once(look.path)
        if not fits():
            return None
        new = folder / f".{uuid.uuid4().hex}"
        new.mkdir()
        (new / RESERVED).touch()
        with suppress(OSError):  # a file system that has no such files
            os.truncate(new / RESERVED, size)
        return new


def _look(folder: Path) -> _Look:
    try:
        stats = [path.stat() for path in (folder, *folder.iterdir())]
    except FileNotFoundError:  # it goes meanwhile
        return _Look(time.time(), 0, folder)
    return _Look(max(s.st_mtime for s in stats), sum(s.st_size for s in stats[1:]), folder)


def remove_at_once(folder: Path) -> bool:
    """Out of the way in one step, so that half of it is never taken for the whole; was it there?"""
    with suppress(OSError):
        shutil.rmtree(folder.rename(folder.with_name(f".{uuid.uuid4().hex}")), ignore_errors=True)
        return True
    return False
