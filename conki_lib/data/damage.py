"""What people have in place of a data file: pages, pointers, archives, zeros, half of it."""

import re
from pathlib import Path
from typing import NamedTuple

from conki_lib.data.mmsa import RELEASES

AGAIN = (
    "get it again from where it is published (a drive may want a browser, or a tool that follows "
    "its confirmation), and compare its size"
)
_UNPACK = "unpack it and give the file or folder inside"
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


class Damage(NamedTuple):
    """What a file is instead, in one word and in a phrase, and what to do."""

    kind: str
    what: str
    way_out: str


def damaged(path: Path) -> Damage | None:
    """Say by its first and last bytes what a file is in place of data; None if nothing shows."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        tail = file.read()
    if not size:
        return Damage("empty", "an empty file", AGAIN)
    if not head.strip(b"\0"):
        what = "that begins with zeros" if tail.strip(b"\0") else "of zeros"
        return Damage("zeros", f"a file {what} ({size:,} bytes)", f"a stalled download; {AGAIN}")
    return _sent(head) or _archive(head) or _cut(size, head, tail)


def _sent(head: bytes) -> Damage | None:
    """Text that a server sent or a repository holds instead, with any byte order mark."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        head = head.decode("utf-16", "replace").encode()
    head = head.removeprefix(b"\xef\xbb\xbf")
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"oid sha256:([0-9a-f]{64})", head)
        release = RELEASES.get(found[1].decode()) if found else None
        pointed = f" to MMSA's {release.file}" if release else ""
        way_out = "run `git lfs pull` in its repository, or download the file"
        return Damage("git-lfs", f"a git-lfs pointer{pointed}, not the file itself", way_out)
    if _HTML.match(head):
        title = re.search(rb"<title[^>]*>(.*?)</title>", head, re.I | re.S)
        said = f" ({ascii(title[1].decode('utf-8', 'replace').strip()[:80])})" if title else ""
        way_out = f"the server sent a page (a quota, a login) instead of the data; {AGAIN}"
        return Damage("html", f"an HTML page{said}", way_out)
    if _ANSWER.match(head):
        said = ascii(head[:80].decode("utf-8", "replace"))
        return Damage("answer", f"a server's error, not the data ({said})", AGAIN)
    return None


def _archive(head: bytes) -> Damage | None:
    packed = [what for magic, what in _PACKED.items() if head.startswith(magic)]
    packed += ["a tar archive"] if head[257:262] == b"ustar" else []
    return Damage("archive", packed[0], _UNPACK) if packed else None


def _cut(size: int, head: bytes, tail: bytes) -> Damage | None:
    if head[:1] != b"\x80" or tail.endswith(b"."):
        return None
    if tail.endswith(bytes(64)):
        way_out = f"space was reserved but never filled, the download stopped; {AGAIN}"
        return Damage("truncated", "a pickle whose end is zeros", way_out)
    return Damage("truncated", f"a truncated pickle ({size:,} bytes, no end)", AGAIN)
