"""Read pickles of numpy arrays without running or loading them, and write such files in pieces.

A global is only a *name* here: a few names are known (see `ALLOWED`), each stands for a few lines
of this module, everything else is refused before anything happens. Bytes of arrays stay where they
are, in the file; the reader notes offset and size and goes on, so a file of 10 GB is opened in the
memory that its texts need.
"""

import codecs
import io
import math
import pickle
import pickletools
import re
import struct
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO

import numpy as np

OPCODES = set(
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES BYTEARRAY8 EMPTY_LIST EMPTY_DICT "
    "EMPTY_TUPLE LIST DICT TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS GET BINGET "
    "LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)
_LONG = {  # opcodes whose argument may be large -> format of its length
    "BINBYTES": "<I",
    "BINBYTES8": "<Q",
    "BYTEARRAY8": "<Q",
    "BINUNICODE": "<I",
    "BINUNICODE8": "<Q",
    "BINSTRING": "<i",
}
_DTYPE = re.compile(r"[<>=|]?(b1|f[248]|[iu][1248]|[US]\d{1,6}|O8?)")
_SMALL = 4096  # bytes; longer arguments stay in the file
_CHUNK = 1 << 24


class BadFile(ValueError):
    """A file that is not what it should be; the message names it, what it is and the way out."""


class UnsafePickle(BadFile):
    """A pickle that asks for something outside `ALLOWED` and `OPCODES`."""


class _Refused(Exception):
    """What a pickle asks for and does not get."""


@dataclass
class Piece:
    """Bytes that stay in the file; with `utf8` a text whose latin-1 encoding is meant."""

    file: BinaryIO
    offset: int
    size: int
    scratch: Path | None = None
    utf8: bool = False

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """Read `size` bytes from `start` on; all by default."""
        self.file.seek(self.offset + start)
        return self.file.read(self.size - start if size is None else size)

    def text(self) -> str:
        """The text these bytes hold."""
        return self.read().decode("utf-8", "surrogatepass")

    def as_bytes(self) -> "Piece":
        """The piece in which a byte is a byte: what is meant by `utf8`, in an unnamed file."""
        decode = codecs.getincrementaldecoder("utf-8")().decode
        spool = tempfile.TemporaryFile(dir=self.scratch)  # has no name: gone with the process
        for start in range(0, self.size, _CHUNK):
            part = self.read(start, min(_CHUNK, self.size - start))
            spool.write(decode(part, start + _CHUNK >= self.size).encode("latin-1"))
        piece = Piece(spool, 0, spool.tell())
        weakref.finalize(piece, spool.close)
        return piece


@dataclass(eq=False)
class PickledArray:
    """An array of a pickle: shape and dtype are known, the values are read when asked for.

    ``array[i]`` reads one row, ``np.asarray(array)`` reads all.
    """

    dtype: np.dtype = np.dtype(object)
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] | None = None  # transposes what is stored in C order; None: as it is
    raw: Any = field(default=None, repr=False)  # Piece | bytes | list of objects
    _stored: tuple[int, ...] = ()
    _block: tuple[int, Any] = field(default=(0, ()), repr=False)

    def fill(self, stored: Any, dtype: Any, axes: Any, raw: Any) -> "PickledArray":
        """Take shape and order as stored, dtype and values, checked against each other."""
        stored = (stored,) if isinstance(stored, int) else tuple(stored)
        if not isinstance(dtype, _Dtype) or not all(isinstance(n, int) and n >= 0 for n in stored):
            raise ValueError(f"an array with shape {short(stored)} and dtype {short(dtype)}")
        if axes is not None and (
            not all(isinstance(k, int) for k in axes) or sorted(axes) != list(range(len(stored)))
        ):
            raise ValueError(f"an array of {len(stored)} axes in the order {short(axes)}")
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw  # Python 2
        self.dtype, self.raw, self._stored, self.axes = dtype.resolve(), raw, stored, axes
        self.shape = stored if axes is None else tuple(stored[k] for k in axes)
        if not isinstance(raw, list if self.dtype.kind == "O" else bytes | bytearray | Piece):
            raise ValueError(f"an array of {self.dtype} whose values are {type(raw).__name__}")
        if not (isinstance(raw, Piece) and raw.utf8):
            self._check()
        return self

    def fill_ordered(self, shape: Any, dtype: Any, fortran: Any, raw: Any) -> "PickledArray":
        """Take an array in C or Fortran order, as ``ndarray.__setstate__`` does."""
        if not fortran or isinstance(shape, int) or len(shape) < 2:
            return self.fill(shape, dtype, None, raw)
        return self.fill(shape[::-1], dtype, tuple(range(len(shape)))[::-1], raw)

    def _check(self) -> None:
        held = self.raw.size if isinstance(self.raw, Piece) else len(self.raw)
        if held != math.prod(self.shape) * (1 if self.dtype.kind == "O" else self.dtype.itemsize):
            raise ValueError(f"an array {self.shape} of {self.dtype} over {held} values or bytes")

    def _values(self) -> Any:
        if isinstance(self.raw, Piece) and self.raw.utf8:
            self.raw = self.raw.as_bytes()
            self._check()
        return self.raw

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        raw = self._values()
        if isinstance(raw, Piece) and self.axes is None:
            size = self.nbytes // len(self)
            return np.frombuffer(raw.read(i * size, size), self.dtype).reshape(self.shape[1:])
        start, block = self._block
        if not start <= i < start + len(block):
            self._block = (0, block := ())  # frees the old one before the new one is read
            self._block = start, block = self._read_block(i)
        return block[i - start]

    def _read_block(self, i: int) -> tuple[int, np.ndarray]:
        """Row i and its neighbours: of rows scattered over the file, 128 MB are read at a time."""
        if not isinstance(self.raw, Piece):
            return 0, np.asarray(self)
        n = max(1, 8 * _CHUNK * len(self) // max(1, self.nbytes))
        mapped = np.memmap(self.raw.file, self.dtype, "r", self.raw.offset, self._stored)
        start = i // n * n
        return start, np.array(mapped.transpose(self.axes)[start : start + n])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raw = self._values()
        whole = _in_memory(raw.read() if isinstance(raw, Piece) else raw, self.dtype)
        whole = whole.reshape(self._stored).transpose(self.axes or range(len(self._stored)))
        return whole if dtype is None else whole.astype(dtype)


def _in_memory(raw: Any, dtype: np.dtype) -> np.ndarray:
    """One-dimensional array over bytes, or of objects."""
    if dtype.kind != "O":
        return np.frombuffer(raw, dtype)
    flat = np.empty(len(raw), object)
    for k, value in enumerate(raw):
        flat[k] = value.text() if isinstance(value, Piece) else value
    return flat


class _Dtype:
    """A dtype as the pickle describes it: code, then byte order; no fields, no sub-arrays."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def resolve(self) -> np.dtype:
        """The numpy dtype, if it is a plain one."""
        if not isinstance(self.code, str) or not _DTYPE.fullmatch(self.code):
            raise ValueError(
                f"dtype {short(self.code)}; bool, int, float, str, bytes, object are read"
            )
        return np.dtype(self.code).newbyteorder(self.order)

    def build(self, state: Any) -> None:
        """Take the byte order of ``dtype.__setstate__``'s tuple; refuse structured dtypes."""
        plain = isinstance(state, tuple) and len(state) > 4 and state[2:5] == (None, None, None)
        if not plain or state[1] not in tuple("<>=|"):
            raise ValueError(f"a structured dtype {short(self.code)}")
        self.order = state[1]


# --- what the allowed names stand for ---------------------------------------------------------


def _encode(text: Any, encoding: Any = "utf-8") -> bytes | Piece:
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise _Refused(f"_codecs.encode to {short(encoding)}")
    if isinstance(text, Piece):
        return replace(text, utf8=True)
    return text.encode("latin-1")


def _ndarray(*_: Any) -> None:
    raise _Refused("a call of numpy.ndarray")


def _reconstruct(kind: Any, *_: Any) -> PickledArray:
    if kind is not _ndarray:
        raise _Refused(f"an array of the class {_describe(kind)}")
    return PickledArray()


def _scalar(dtype: _Dtype, raw: Any) -> Any:
    kind = dtype.resolve()
    if not kind.itemsize:  # the empty text
        return kind.type()
    return _in_memory([raw] if kind.kind == "O" else raw, kind)[0]


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> PickledArray:
    if order == "K" and axes is not None:
        return PickledArray().fill(shape, dtype, tuple(axes), raw)
    return PickledArray().fill_ordered(shape, dtype, order == "F", raw)


#: (module, name) -> what stands in for it; the exact list of what a pickle may name.
ALLOWED = {
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _ndarray,
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}


def _describe(value: Any) -> str:
    named = [".".join(name) for name, stub in ALLOWED.items() if stub is value]
    return named[0] if named else type(value).__name__


class _Dispatch(dict):
    """Handlers by opcode; whatever has none is refused by its name."""

    def __missing__(self, code: int) -> Any:
        op = pickletools.code2op.get(chr(code))
        if op is None:
            raise ValueError(f"byte {code:#x} is no opcode of a pickle")
        raise _Refused(f"the opcode {op.name} (other classes, or objects outside the file)")


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, cut down to `OPCODES` and `ALLOWED`."""

    dispatch = _Dispatch(
        (ord(op.code), pickle._Unpickler.dispatch[ord(op.code)])
        for op in pickletools.opcodes
        if op.name in OPCODES
    )

    def __init__(self, file: BinaryIO, scratch: Path | None) -> None:
        super().__init__(file, encoding="latin-1")
        self.file, self.scratch = file, scratch
        self.size = file.seek(0, 2)
        file.seek(0)

    def find_class(self, module: str, name: str) -> Any:
        if "\r" in module + name:
            raise ValueError("copied in text mode (CRLF); copy it as binary")
        if (module, name) not in ALLOWED:
            raise _Refused(ascii(f"{module}.{name}")[1:-1])
        return ALLOWED[module, name]

    def load_frame(self) -> None:
        self.read(8)  # frames are for reading ahead; offsets are wanted here

    def load_reduce(self) -> None:
        args, called = self.stack.pop(), self.stack.pop()
        if not any(called is stub for stub in ALLOWED.values()):
            raise _Refused(f"a call of {_describe(called)}")
        self.append(called(*args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Dtype):
            target.build(state)
        elif isinstance(target, PickledArray) and isinstance(state, tuple):
            target.fill_ordered(*state[-4:])
        else:
            raise _Refused(f"to set the state of {_describe(target)}")

    def load_long_argument(self, name: str) -> None:
        (size,) = struct.unpack(_LONG[name], self.read(struct.calcsize(_LONG[name])))
        start = self.file.tell()
        if not 0 <= size <= self.size - start:
            self.file.seek(0, 2)
            raise EOFError
        if size > _SMALL:
            self.file.seek(size, 1)
            self.append(Piece(self.file, start, size, self.scratch))
            return
        data = self.read(size)
        if "UNICODE" in name:
            self.append(data.decode("utf-8", "surrogatepass"))
        else:
            self.append(data.decode("latin-1") if name == "BINSTRING" else data)

    def load_keyed(self, name: str) -> None:
        """Fill a dict. Of all keys only tuples have parts, whose hash may crash or never end."""
        for key in self.stack[-2:-1] if name == "SETITEM" else self.stack[::2]:
            if isinstance(key, tuple):
                raise _Refused("a dict key that is a tuple")
        pickle._Unpickler.dispatch[getattr(pickle, name)[0]](self)

    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build


for _name in ("SETITEM", "SETITEMS", "DICT"):
    _Unpickler.dispatch[getattr(pickle, _name)[0]] = partial(_Unpickler.load_keyed, name=_name)
for _name in _LONG:
    _Unpickler.dispatch[getattr(pickle, _name)[0]] = partial(
        _Unpickler.load_long_argument, name=_name
    )


class _Reader(io.BufferedReader):
    """A file that stays open as long as an array refers to it, and then closes itself."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n"):
            raise EOFError
        return line

    def __del__(self) -> None:
        self.close()


def read_pickle(path: str | Path, scratch: Path | None = None) -> Any:
    """Read a pickle of arrays, texts, numbers, lists and dicts; arrays come as `PickledArray`.

    Nothing of the pickle is run, and of long arrays nothing is read: they refer to the open file.

    Args:
        path: the pickle, of any protocol.
        scratch: folder of the unnamed temporary file that the arrays of a protocol-2 pickle need
            when they are read (such files hold them as text, which has no fixed width).

    Raises:
        UnsafePickle: it names something outside `ALLOWED`; the message says what.
        BadFile: it is truncated or damaged.
    """
    unpickler = _Unpickler(_Reader(io.FileIO(path)), scratch)
    try:
        content = unpickler.load()
    except _Refused as error:
        raise UnsafePickle(
            f"{path}: this pickle wants {error}, which arrays do not need and which could run "
            f"code; nothing of it was run. Only numpy arrays, texts, numbers, lists and dicts are "
            f"read: do not load this file by other means unless you trust its maker"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, OverflowError,
            pickle.UnpicklingError, struct.error) as error:  # fmt: skip
        at = unpickler.file.tell()
        if at >= unpickler.size:
            raise BadFile(
                f"{path}: this pickle is truncated: it ends after {at:,} bytes in the middle of "
                f"the data; the download or copy stopped early, get the file again"
            ) from error
        raise BadFile(
            f"{path}: this pickle cannot be read near byte {at:,} ({type(error).__name__}: {error})"
            f"; it is damaged or holds something else than arrays, texts and numbers: get it "
            f"again, or export it as such"
        ) from error
    if (end := unpickler.file.tell()) < unpickler.size:
        raise BadFile(
            f"{path}: behind the end of this pickle stand {unpickler.size - end:,} bytes more: "
            f"another pickle, or a damaged copy; keep the first {end:,} bytes, or get it again"
        )
    return content


@dataclass(frozen=True)
class StreamedArray:
    """An array to be written whose rows come in blocks: never in memory as a whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterable[np.ndarray]


def write_pickle(file: BinaryIO, value: Any) -> None:
    """Write nested dicts whose leaves are anything picklable or a `StreamedArray`; protocol 4.

    Readable by every pickle module, under numpy 1 and numpy 2.

    Raises:
        ValueError: the blocks of an array do not add up to its shape.
    """
    file.write(b"\x80\x04")
    _write(file, value)
    file.write(b".")


def _write(file: BinaryIO, value: Any) -> None:
    if isinstance(value, dict):
        file.write(b"}(")
        for key, item in value.items():
            file.write(_plain(key))
            _write(file, item)
        file.write(b"u")
    elif isinstance(value, StreamedArray):
        _write_array(file, value)
    else:
        file.write(_plain(value))


def _plain(value: Any) -> bytes:
    """The opcodes of a value without header, memo and STOP, so that they can stand anywhere.

    numpy's names become those of numpy 1, which numpy 2 knows; the same bytes in a text stay.
    """
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=3)
    pickler.fast = True
    pickler.dump(value)
    data = buffer.getvalue()
    named = [at for op, _, at in pickletools.genops(data) if op.name == "GLOBAL"]
    parts = (data[start:end] for start, end in pairwise([2, *named, len(data) - 1]))
    return b"".join(re.sub(rb"^cnumpy\._core\.", b"cnumpy.core.", part) for part in parts)


def _write_array(file: BinaryIO, array: StreamedArray) -> None:
    """``_reconstruct(ndarray, (0,), b"b")``, then the state with the values as one bytes object."""
    size = math.prod(array.shape) * array.dtype.itemsize
    file.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + _plain((0,)))
    file.write(b"C\x01b\x87R(K\x01" + _plain(array.shape) + _plain(array.dtype) + b"\x89\x8e")
    file.write(struct.pack("<Q", size))
    for block in array.blocks:
        data = np.ascontiguousarray(block, array.dtype)
        file.write(data.data.cast("B") if data.size else b"")
        size -= data.nbytes
    if size:
        raise ValueError(
            f"blocks of an array of shape {array.shape} differ from it by {size} bytes"
        )
    file.write(b"tb")
