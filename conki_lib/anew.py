"""FRESH=1: earlier runs move aside and all is trained anew, over as many starts as it takes.

The file ``runs/.<profile>.fresh`` says how far that is: "moving", then "begun". Committed records
do not count while it is there; it goes away when all runs that a pipeline names are finished.
"""

import contextlib
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from conki_lib.records import runs_dir, write_text

_MOVING, _BEGUN = "moving", "begun"


def mark(profile: str) -> Path:
    """The file that says so."""
    return runs_dir(profile).parent / f".{profile}.fresh"


def is_begun(profile: str) -> bool:
    """Has a profile been begun anew, and not been finished yet?"""
    return mark(profile).is_file()


def is_interrupted(profile: str) -> bool:
    """Was it killed before all earlier runs were moved?"""
    return is_begun(profile) and mark(profile).read_text() == _MOVING


def begin(profile: str) -> str:
    """Move earlier runs aside, unless a profile that was begun anew goes on.

    Returns:
        What was done, for the user.

    Raises:
        RuntimeError: a process works on one of the runs; names it. Nothing was moved.
        DiskError: the folder of runs cannot be written.
    """
    if is_begun(profile) and not is_interrupted(profile):
        return (
            f"{profile!r} goes on as begun anew; remove {mark(profile)} to count committed records"
        )
    write_text(mark(profile), _MOVING)
    try:
        moved = set_aside(profile)
    except RuntimeError:
        end(profile)
        raise
    write_text(mark(profile), _BEGUN)
    return f"{profile!r} begins anew" + (f"; earlier runs moved to {moved}" if moved else "")


def end(profile: str) -> None:
    """All is trained: committed records count again."""
    mark(profile).unlink(missing_ok=True)


def set_aside(profile: str) -> Path | None:
    """Move a profile's finished and unfinished runs to ``runs/replaced/``; delete nothing.

    Raises:
        RuntimeError: see `begin`.
    """
    folder = runs_dir(profile)
    if not folder.is_dir():
        return None
    target = folder.parent / "replaced" / f"{profile}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)  # before the look at locks: who comes now begins a folder of its own
    with contextlib.ExitStack() as idle:
        for path in sorted(target.glob("*.lock")):
            try:
                idle.enter_context(FileLock(path).acquire(timeout=0))
            except Timeout:
                target.rename(folder)
                raise RuntimeError(
                    f"nothing was moved, since a process works on {folder / path.stem}, maybe one "
                    "that outlived its pipeline: wait until it has ended, or stop it"
                ) from None
    return target
