"""What people have in place of a data file: pages, pointers, archives, zeros, half of it."""

import re
from pathlib import Path

from conki_lib.data.mmsa import RELEASES
from conki_lib.data.pickles import BadFile

AGAIN = (
    "get it again from where it is published (a drive may want a browser, or a tool that follows "
    "its confirmation), and compare its size"
)
_PACKED = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "a gzip file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\xfd7zXZ": "an xz file",
    b"BZh": "a bzip2 file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
}
_TAGS = rb"!doctype html|html|head|body|script|meta|title|\?xml"
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)*<(" + _TAGS + rb")", re.I | re.S)
_ANSWER = re.compile(rb'\s*\{\s*"error"')
_ENDS = 4096  # bytes looked at, at either end


def refuse_damaged(path: Path, origin: str | Path | None = None) -> None:
    """Look at a file's first and last bytes for what stands there in place of data.

    Args:
        path: any file.
        origin: what the message names instead, where the file is a copy.

    Raises:
        BadFile: says what the file is, and the way out.
    """
    if found := _damage(path):
        raise BadFile(f"{origin or path} is {found}")


def _damage(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        tail = file.read()
    if not size:
        return f"an empty file: {AGAIN}"
    if not head.strip(b"\0"):
        what = "that begins with zeros" if tail.strip(b"\0") else "of zeros"
        return f"a file {what} ({size:,} bytes): a stalled download; {AGAIN}"
    return _sent(head) or _archive(head) or _cut(size, head, tail)


def _sent(head: bytes) -> str | None:
    """Text that a server sent or a repository holds instead, with any byte order mark."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        head = head.decode("utf-16", "replace").encode()
    head = head.removeprefix(b"\xef\xbb\xbf")
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"oid sha256:([0-9a-f]{64})", head)
        release = RELEASES.get(found[1].decode()) if found else None
        pointed = f" to MMSA's {release.file}" if release else ""
        return (
            f"a git-lfs pointer{pointed}, not the file itself: run `git lfs pull` in its "
            "repository, or download the file"
        )
    if _HTML.match(head):
        title = re.search(rb"<title[^>]*>(.*?)</title>", head, re.I | re.S)
        said = f" ({ascii(title[1].decode('utf-8', 'replace').strip()[:80])})" if title else ""
        why = "the server sent a page (a quota, a login) instead of the data"
        return f"an HTML page{said}: {why}; {AGAIN}"
    if _ANSWER.match(head):
        said = ascii(head[:80].decode("utf-8", "replace"))
        return f"a server's error, not the data ({said}): {AGAIN}"
    return None


def _archive(head: bytes) -> str | None:
    packed = [what for magic, what in _PACKED.items() if head.startswith(magic)]
    packed += ["a tar archive"] if head[257:262] == b"ustar" else []
    return f"{packed[0]}: unpack it and give the file or folder inside" if packed else None


def _cut(size: int, head: bytes, tail: bytes) -> str | None:
    if head[:1] != b"\x80" or tail.endswith(b"."):
        return None
    if tail.endswith(bytes(64)):
        why = "space was reserved but never filled, the download stopped"
        return f"a pickle whose end is zeros: {why}; {AGAIN}"
    return f"a truncated pickle ({size:,} bytes, no end): {AGAIN}"
