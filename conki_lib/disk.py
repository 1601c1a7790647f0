"""Where corpora lie; one clear error for disks that are full, read-only or over quota."""

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    return Path(root or os.environ.get("CONKI_DATA") or ROOT / "data")


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
