"""Pickles: nothing is run, nothing is loaded, everything readable comes back equal."""

import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from conki_lib.data import pickles
from conki_lib.data.pickles import (
    ALLOWED,
    OPCODES,
    BadFile,
    PickledArray,
    Piece,
    StreamedArray,
    UnsafePickle,
    read_pickle,
    write_pickle,
)

GLOBALS = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}


def plain(value: Any) -> Any:
    """The value with arrays loaded."""
    if isinstance(value, PickledArray):
        return plain(np.asarray(value))
    if isinstance(value, Piece):
        return value.text()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value)
    return value


def dump(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


# --- what is refused ------------------------------------------------------------------------


def test_the_lists_of_names_and_opcodes_are_exact() -> None:
    assert set(ALLOWED) == GLOBALS
    refused = {op.name for op in pickletools.opcodes} - OPCODES
    assert refused == {
        *("PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"),
        *("NEXT_BUFFER", "READONLY_BUFFER", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
    }


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "name"),
    [(eval, "eval"), (exec, "exec"), (os.system, "system"), (getattr, "getattr"),
     (os.remove, "remove"), (subprocess.call, "call"), (__import__, "__import__"),
     (np.load, "numpy.load"), (np.loadtxt, "numpy.loadtxt"), (bytes, "bytes")],
)  # fmt: skip
def test_calls_are_refused_by_name_and_do_nothing(
    tmp_path: Path, function: Any, name: str, protocol: int
) -> None:
    made = tmp_path / "made"
    code = f"open({str(made)!r}, 'w').close()"
    argument = f"touch {made}" if name == "system" else code
    bad = dump(tmp_path / "bad.pkl", {"train": [np.zeros(3), Call(function, argument)]}, protocol)
    with pytest.raises(UnsafePickle, match=f"bad.pkl.*{name}"):
        read_pickle(bad)
    assert not made.exists()


def test_the_attack_would_work_on_plain_pickle(tmp_path: Path) -> None:
    made = tmp_path / "made"
    bad = dump(tmp_path / "bad.pkl", Call(eval, f"open({str(made)!r}, 'w').close()"))
    pickle.loads(bad.read_bytes())
    assert made.exists()


P = b"\x80\x04"
NDARRAY, RECONSTRUCT = b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n"
DTYPE, ENCODE = b"cnumpy\ndtype\n", b"c_codecs\nencode\n"


@pytest.mark.parametrize(
    ("stream", "named"),
    [
        (b"(S'ls'\nios\nsystem\n.", "INST"),
        (b"(cnumpy\nndarray\no.", "OBJ"),
        (P + NDARRAY + b")\x81.", "NEWOBJ"),
        (P + NDARRAY + b")}\x92.", "NEWOBJ_EX"),
        (b"Pid\n.", "PERSID"),
        (P + b"K\x01Q.", "BINPERSID"),
        (P + b"\x82\x01.", "EXT1"),
        (P + b"\x83\x01\x00.", "EXT2"),
        (P + b"\x84\x01\x00\x00\x00.", "EXT4"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x05K\x01\x98.", "READONLY_BUFFER"),
        (P + b"\x8c\x08builtins\x8c\x04eval\x93.", "builtins.eval"),
        (b"cposix\nsystem\n.", "posix.system"),
        (b"cnt\nsystem\n.", "nt.system"),
        (P + b"\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", "numpy.ndarray.dumps"),
        (P + b"\x8c\x05numpy\x8c\x0b__builtins_\x93.", "numpy.__builtins_"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "fromfile"),
        (b"cconki_lib.data.pickles\nread_pickle\n.", "read_pickle"),
        # calls of what may be named, but not called, or not so
        (P + NDARRAY + b")R.", "numpy.ndarray"),
        (P + RECONSTRUCT + DTYPE + b"K\x00\x85C\x01b\x87R.", "class numpy.dtype"),
        (P + RECONSTRUCT + b"\x8c\x02osK\x00\x85C\x01b\x87R.", "class str"),
        (P + b"\x8c\x04eval)R.", "a call of str"),
        (P + ENCODE + b"\x8c\x01x\x8c\x05rot13\x86R.", "rot13"),
        # the result of one call is called, or gets a state
        (P + DTYPE + b"\x8c\x02f4\x85R)R.", "a call of _Dtype"),
        (P + DTYPE + b"}b.", "state of numpy.dtype"),
        (P + ENCODE + b"}\x8c\x08__code__Nsb.", "state of _codecs.encode"),
        (P + b"}}\x8c\x01aK\x01sb.", "state of dict"),
        (P + b"C\x01x}b.", "state of bytes"),
    ],
)  # fmt: skip
def test_tricks_are_refused_by_name(tmp_path: Path, stream: bytes, named: str) -> None:
    bad = tmp_path / "bad.pkl"
    bad.write_bytes(stream)
    with pytest.raises(UnsafePickle, match=named.replace(".", r"\.")):
        read_pickle(bad)


STATE = b"(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
F4 = DTYPE + b"\x8c\x02f4\x85R"
EMPTY = RECONSTRUCT + NDARRAY + b"K\x00\x85C\x01b\x87R"


@pytest.mark.parametrize(
    "stream",
    [
        P + DTYPE + b"\x8c\x02f4\x85R" + STATE.replace(b"NNN", b"N(K\x01tN") + b"b.",  # fields
        P + EMPTY + b"(K\x01K\x00\x85" + DTYPE + b"\x8c\x02V4\x85R\x89C\x00tb.",
        # 4 bytes under a shape that claims 10**12, a negative shape, pointers as objects
        P + EMPTY + b"(K\x01\x8a\x06\x00\x10\xa5\xd4\xe8\x00\x85" + F4 + b"\x89C\x04abcdtb.",
        P + EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + DTYPE + b"\x8c\x02f4\x85R\x89C\x00tb.",
        P + EMPTY + b"(K\x01K\x01\x85" + DTYPE + b"\x8c\x02O8\x85R\x89C\x08abcdefghtb.",
        P + EMPTY + b"(K\x01K\x01\x85" + DTYPE + b"\x8c\x02f4\x85R\x89]K\x01atb.",
        P + b"h\x05.", P + b"0.", P + b"}K\x01s.", P + b"\xff\xff.", b"hello",
        P + b"]K\x01K\x02s.", P + b"}]K\x01s.", P + b"K\x01K\x02a.",
        P + b"\x8a\xff.", P + b"\x8d" + b"\xff" * 8 + b"abc.", b"\x80\x09N.",
    ],
)  # fmt: skip
def test_nonsense_is_an_error_that_names_the_file(tmp_path: Path, stream: bytes) -> None:
    bad = tmp_path / "bad.pkl"
    bad.write_bytes(stream)
    with pytest.raises(BadFile, match=r"bad\.pkl.*again"):
        np.asarray(read_pickle(bad).dtype)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_bytes_raise_bad_file_or_give_data(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    value = {"train": {"x": np.arange(6.0), "id": ["a", "b"], "o": np.array(["x", None], object)}}
    stream = bytearray(pickle.dumps(value, data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(stream)
    try:
        read_pickle(path)
    except BadFile as error:
        assert "damaged.pkl" in str(error)


# --- what is read ---------------------------------------------------------------------------

ARRAYS = st_numpy.arrays(
    st.sampled_from(["<f4", ">f4", "<f8", "f2", "i8", "<i4", "u1", "?", "U5", "S3"]).map(np.dtype),
    st_numpy.array_shapes(max_dims=4, max_side=6),
)


@settings(max_examples=150, deadline=None)
@given(array=ARRAYS, protocol=st.integers(2, 5), axes=st.randoms(), order=st.booleans())
def test_arrays_of_all_kinds_come_back_equal(
    array: np.ndarray, protocol: int, axes: Any, order: bool, tmp_path_factory: Any
) -> None:
    if order:
        array = array.transpose(axes.sample(range(array.ndim), array.ndim))
    row = array[0] if protocol > 2 else array  # protocol 2 writes b"" as a call of bytes
    path = dump(tmp_path_factory.getbasetemp() / "one.pkl", [array, array, row], protocol)
    first, second, scalar = read_pickle(path)
    assert first is second
    assert first.shape == array.shape and first.dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(first), array)
    np.testing.assert_array_equal(np.asarray(scalar), row)
    for i, row in enumerate(first):
        np.testing.assert_array_equal(row, array[i])


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("arrange", [np.asarray, np.asfortranarray, lambda a: a.transpose(1, 0, 2)])
@pytest.mark.parametrize("dtype", ["f4", ">f8"])
def test_large_arrays_stay_in_the_file(
    tmp_path: Path, protocol: int, arrange: Any, dtype: str
) -> None:
    array = arrange(np.random.default_rng(0).normal(size=(30, 20, 9)).astype(dtype))
    path = dump(tmp_path / "x.pkl", {"x": array, "list": list(array)}, protocol)
    found = read_pickle(path, tmp_path)
    assert isinstance(found["x"].raw, Piece)
    for i in (len(array) - 1, 0, 13):
        np.testing.assert_array_equal(found["x"][i], array[i])
    np.testing.assert_array_equal(np.asarray(found["x"]), array)
    np.testing.assert_array_equal([np.asarray(x) for x in found["list"]], array)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]  # the spool of protocol 2 has no name


def test_mixed_content_comes_back(tmp_path: Path) -> None:
    value = {
        "texts": ["a", "ä" * 5000, ""],
        "objects": np.array(["x", None, "y" * 5000, 3.5, [1, 2]], object),
        "nested": np.array([np.zeros(2), np.ones(3)], object),
        "scalars": [np.float32(1.5), np.int64(-3), np.str_("é"), np.bool_(True)],
        "numbers": [1, -(2**70), 0.1, True, None, float("nan")],
        "tuple": (1, "b", b"bytes"),
        "zero": np.array(3.0),
    }
    for protocol in range(3, 6):
        found = plain(read_pickle(dump(tmp_path / "x.pkl", value, protocol)))
        assert found["texts"] == value["texts"]
        assert found["objects"].tolist() == value["objects"].tolist()
        assert [plain(x).tolist() for x in found["nested"]] == [[0, 0], [1, 1, 1]]
        assert found["scalars"] == value["scalars"]
        assert type(found["scalars"][0]) is np.float32
        assert repr(found["numbers"]) == repr(value["numbers"])
        assert found["tuple"] == value["tuple"]
        assert found["zero"].shape == () and found["zero"] == 3


def test_both_names_of_numpys_modules_and_python_2(tmp_path: Path) -> None:
    stream = pickle.dumps(np.arange(3), 4)
    here, there = b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    assert here in stream or there in stream
    for old, new in ((here, there), (there, here)):
        (tmp_path / "x.pkl").write_bytes(_unframed(stream).replace(old, new))
        assert np.asarray(read_pickle(tmp_path / "x.pkl")).tolist() == [0, 1, 2]
    python2 = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x00@tb."
    )
    (tmp_path / "x.pkl").write_bytes(python2)
    assert np.asarray(read_pickle(tmp_path / "x.pkl")).tolist() == [1, 2]


def _unframed(stream: bytes) -> bytes:
    return stream[:2] + stream[11:]


def test_every_truncation_is_named(tmp_path: Path) -> None:
    value = {"train": {"x": np.ones((40, 50)), "id": ["a", "b"], "y": [0.5, np.float32(1)]}}
    for protocol in (3, 4, 5):
        stream = pickle.dumps(value, protocol)
        for size in [*range(2, 300, 3), *range(300, len(stream), 1009), len(stream) - 1]:
            (tmp_path / "cut.pkl").write_bytes(stream[:size])
            with pytest.raises(BadFile, match=r"cut\.pkl.*truncated.*again"):
                read_pickle(tmp_path / "cut.pkl")


# --- what is written ------------------------------------------------------------------------


def test_a_streamed_file_is_an_ordinary_pickle(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(20, 30, 4)).astype("f4")
    blocks = (array[i : i + 7] for i in range(0, 20, 7))
    with (tmp_path / "x.pkl").open("wb") as file:
        write_pickle(
            file, {"train": {"x": StreamedArray(array.shape, array.dtype, blocks), "t": ["a"]}}
        )
    for read in (lambda path: pickle.loads(path.read_bytes()), read_pickle):
        found = plain(read(tmp_path / "x.pkl"))
        np.testing.assert_array_equal(found["train"]["x"], array)
        assert found["train"]["t"] == ["a"]


def test_a_text_that_names_numpy_is_written_as_it_is(tmp_path: Path) -> None:
    words = ["cnumpy._core.multiarray\nscalar\n", "x" * 300 + "cnumpy._core."]
    value = {
        "t": words,
        "y": [np.float32(0.5), np.array([1.0, 2.0])],
        "cnumpy._core.": b"cnumpy._core.",
    }
    with (tmp_path / "x.pkl").open("wb") as file:
        write_pickle(file, value)
    data = (tmp_path / "x.pkl").read_bytes()
    named = [arg for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL"]
    assert named and not any("_core" in name for name in named)  # numpy 1 finds them too
    for read in (lambda path: pickle.loads(path.read_bytes()), read_pickle):
        found = plain(read(tmp_path / "x.pkl"))
        assert found["t"] == words and found["cnumpy._core."] == b"cnumpy._core."
        assert found["y"][0] == 0.5 and found["y"][1].tolist() == [1.0, 2.0]


def test_blocks_must_fill_the_shape(tmp_path: Path) -> None:
    with (tmp_path / "x.pkl").open("wb") as file, pytest.raises(ValueError, match="differ from it"):
        write_pickle(file, StreamedArray((3, 2), np.dtype("f4"), [np.zeros((2, 2))]))


PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("pickles", sys.argv[3])  # alone: the package would import torch
sys.modules["pickles"] = module = module_from_spec(spec)
spec.loader.exec_module(module)
def peak():  # ru_maxrss would start at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
base = peak()
found = module.read_pickle(sys.argv[1], Path(sys.argv[2]))
total = sum(float(np.abs(row).sum()) for row in found["x"])
print(peak() - base, total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc")
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_reading_row_by_row_needs_no_memory(tmp_path: Path, protocol: int) -> None:
    array = np.random.default_rng(0).random((400, 500, 50), np.float32)  # 40 MB
    path = dump(tmp_path / "x.pkl", {"x": array}, protocol)
    command = [sys.executable, "-c", PEAK, path, tmp_path, pickles.__file__]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    extra, total = map(float, done.stdout.split())
    assert extra < (100 if protocol == 2 else 12)
    assert total == pytest.approx(array.sum(), rel=1e-3)


# --- made to crash or to hang -----------------------------------------------------------------

BOMB = b")" + b"2\x86" * 60  # t = (t, t), sixty times
CODECS, MAKE = b"c_codecs\nencode\n", b"cnumpy.core.numeric\n_frombuffer\n"
TRAPS = {
    "deep key": (P + b"})" + b"\x85" * 200_000 + b"K\x01s.", "a dict key that is a tuple"),
    "key": (P + b"}" + BOMB + b"K\x01s.", "a dict key that is a tuple"),
    "keys": (P + b"}(" + BOMB + b"K\x01u.", "a dict key that is a tuple"),
    "dict": (P + b"(" + BOMB + b"K\x01d.", "a dict key that is a tuple"),
    "encoding": (P + CODECS + b"\x8c\x01x" + BOMB + b"\x86R.", "_codecs.encode to"),
    "shape": (P + MAKE + b"(C\x00" + DTYPE + b"\x8c\x02f4\x85R" + BOMB + b"\x8c\x01CtR.", "shape"),
    "dtype": (P + MAKE + b"(C\x00" + DTYPE + BOMB + b"\x85RK\x00\x8c\x01CtR.", "dtype"),
    "axes": (
        P + MAKE + b"(C\x00" + DTYPE + b"\x8c\x02f4\x85RK\x00K\x00\x86\x8c\x01K"
        + BOMB + BOMB + b"\x86tR.", "axes in the order"
    ),
}  # fmt: skip
READ = """
import sys
from conki_lib.data.pickles import BadFile, read_pickle
for path in sys.argv[1:]:
    try:
        read_pickle(path)
    except BadFile as error:
        print(str(error).isprintable() and str(error), flush=True)
"""


def test_pickles_made_to_crash_or_hang_are_refused(tmp_path: Path) -> None:
    for name, (stream, _) in TRAPS.items():
        (tmp_path / f"{name}.pkl").write_bytes(stream)
    command = [sys.executable, "-c", READ, *(tmp_path / f"{name}.pkl" for name in TRAPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for said, (name, (_, message)) in zip(done.stdout.splitlines(), TRAPS.items(), strict=True):
        assert f"{name}.pkl" in said and message in said


def test_names_are_printed_without_their_control_characters(tmp_path: Path) -> None:
    bad = tmp_path / "x.pkl"
    bad.write_bytes(P + b"c\x1b[31mos\nsystem\n.")
    with pytest.raises(UnsafePickle, match=r"\\x1b\[31mos\.system"):
        read_pickle(bad)
    bad.write_bytes(b"cnumpy\r\ndtype\r\n.")
    with pytest.raises(BadFile, match=r"text mode \(CRLF\); copy it as binary"):
        read_pickle(bad)


def test_what_stands_behind_the_end_is_not_passed_over(tmp_path: Path) -> None:
    bad = dump(tmp_path / "x.pkl", [1])
    bad.write_bytes(bad.read_bytes() * 2)
    with pytest.raises(BadFile, match=r"x\.pkl: behind the end .* 17 bytes more: another"):
        read_pickle(bad)
