"""Folders that appear when they are complete: written aside under a lock, renamed at the end."""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from conki_lib.disk import explained

_WAY_OUT = "free some space, or choose another folder (of fetched corpora: by CONKI_DATA)"


@contextmanager
def written_aside(destination: Path, overwrite: bool) -> Iterator[Path]:
    """Give a new folder beside the destination; rename it at the end, remove it on any error.

    Args:
        destination: where the folder appears; its parent is made.
        overwrite: replace what stands there; it comes back if that fails.

    Raises:
        FileExistsError: another process was quicker.
        DiskError: the disk is full or read-only; what was written so far is removed.
    """
    destination = destination.resolve()  # the folder that a link names, not the link
    with explained(f"the store {destination.name!r}", destination.parent, _WAY_OUT):
        destination.parent.mkdir(parents=True, exist_ok=True)
        clear_away(destination)
        folder, lock = _locked_folder(destination)
        try:
            yield folder
            _move_in(folder, destination, overwrite)
        finally:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)
            clear_away(destination)


def clear_away(destination: Path) -> None:
    """Remove what killed writers left, and put back a folder that one of them was replacing.

    A folder belongs to a living writer as long as its lock is held.
    """
    starts = (glob.escape(str(_beside(destination, kind, ""))) for kind in ("partial", "replaced"))
    for key in {path.rpartition("-")[2] for start in starts for path in glob.glob(f"{start}*")}:
        folder, old = (_beside(destination, kind, key) for kind in ("partial", "replaced"))
        with suppress(Timeout, OSError):
            folder.mkdir(exist_ok=True)
            with FileLock(folder / ".lock").acquire(timeout=0):
                if old.exists() and not destination.exists():
                    old.rename(destination)
                shutil.rmtree(old, ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)


def _beside(destination: Path, kind: str, key: str) -> Path:
    return destination.parent / f".{destination.name}.{kind}-{key}"


def _locked_folder(destination: Path) -> tuple[Path, FileLock]:
    """Make a folder and lock it; one that `clear_away` took in between is given up for another."""
    while True:
        prefix = _beside(destination, "partial", "")
        folder = Path(tempfile.mkdtemp(prefix=prefix.name, dir=prefix.parent))
        lock = FileLock(folder / ".lock")
        with suppress(Timeout, FileNotFoundError):
            lock.acquire(timeout=0)
            folder.chmod(0o755)
            if (folder / ".lock").exists():
                return folder, lock


def _move_in(folder: Path, destination: Path, overwrite: bool) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = _beside(destination, "replaced", folder.name.rpartition("-")[2])
    if overwrite and destination.exists():
        destination.rename(old)
    try:
        folder.rename(destination)
    except OSError as error:
        if old.exists():
            old.rename(destination)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(
                f"{destination}: another process has built it meanwhile; use that one"
            ) from error
        raise
    (destination / ".lock").unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)
