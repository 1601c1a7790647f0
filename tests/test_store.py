"""The packed store: round trip, cleaning, refusals, laziness, nothing half-finished."""

import errno
import json
import multiprocessing
import os
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from conki_lib.data import aside, packing
from conki_lib.data.formats import inspect_path
from conki_lib.data.store import open_store, write_store


def table(n=6, **columns):
    base = {
        "id": [f"u{i}" for i in range(n)],
        "video": [f"v{i // 2}" for i in range(n)],
        "clip": [str(i % 2) for i in range(n)],
        "text": [f"text {i}" for i in range(n)],
        "y": np.linspace(-3, 3, n),
        "standard": ["train"] * (n - 2) + ["valid", "test"],
    }
    return pd.DataFrame(base | columns)


def frames(n=6, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(i + 1, d)).astype("float32") for i in range(n)]


def write(path, utterances=None, sequences=None, **options):
    settings = {"name": "toy", "language": "en", "label_range": (-3.0, 3.0)} | options
    utterances = table() if utterances is None else utterances
    sequences = {"v": frames(d=3), "a": frames(d=2, seed=1)} if sequences is None else sequences
    return write_store(path, utterances, sequences, **settings)


def test_round_trip_through_own_reader_and_safetensors(tmp_path):
    opened = open_store(write(tmp_path / "toy"))
    assert opened.info.counts == {"standard": {"train": 4, "valid": 1, "test": 1}}
    assert opened.info.widths == {"v": 3, "a": 2}
    assert opened.info.modalities == ("t", "v", "a")
    for i, utterance in enumerate(opened["train"]):
        np.testing.assert_array_equal(utterance.inputs["v"], frames(d=3)[i])
        np.testing.assert_array_equal(utterance.inputs["a"], frames(d=2, seed=1)[i])
        assert (utterance.id, utterance.video, utterance.index) == (f"u{i}", f"v{i // 2}", i)
    assert opened["test"][0].id == "u5" and opened["test"][-1].y == 3.0
    assert list(opened["train"].lengths("v")) == [1, 2, 3, 4]
    with safe_open(tmp_path / "toy" / "features.safetensors", "np") as file:
        assert set(file.keys()) == {
            "vision.values", "vision.offsets", "audio.values", "audio.offsets"
        }  # fmt: skip
        np.testing.assert_array_equal(file.get_tensor("vision.values"), np.concatenate(frames()))
        np.testing.assert_array_equal(file.get_tensor("audio.offsets"), [0, 1, 3, 6, 10, 15, 21])


def test_text_only_corpus(tmp_path):
    opened = open_store(write(tmp_path / "toy", sequences={}))
    assert opened.info.modalities == ("t",) and opened["train"][0].inputs == {}
    with safe_open(tmp_path / "toy" / "features.safetensors", "np") as file:
        assert list(file.keys()) == []


def test_no_text_is_no_text_modality(tmp_path):
    opened = open_store(write(tmp_path / "toy", table(text=[None] * 6)))
    assert opened.info.modalities == ("v", "a") and opened["train"][0].text == ""


def test_sequences_are_consumed_one_at_a_time(tmp_path):
    alive = []

    def stream():
        for array in frames():
            alive.append(array.shape)
            yield array

    opened = open_store(write(tmp_path / "toy", sequences={"v": stream()}))
    assert len(alive) == 6 and opened.info.widths == {"v": 3}


def test_cleaning_is_counted(tmp_path):
    dirty = [np.ones((2, 3)) for _ in range(6)]
    dirty[0][0] = [np.nan, np.inf, -np.inf]
    dirty[1][1, 2] = 1e300  # finite, but not as float32
    dirty[2] = np.zeros((4, 3))
    dirty[3] = np.zeros((0, 3))
    dirty[4] = np.full((2, 3), np.nan)  # nothing is left of it
    opened = open_store(write(tmp_path / "toy", sequences={"v": dirty}, cleaned={"other": 2}))
    assert opened.info.cleaned == {
        "other": 2,
        "vision.nan": 7,
        "vision.+inf": 1,
        "vision.-inf": 1,
        "vision.overflow": 1,
        "vision.empty": 3,
    }
    v = [opened.frames("v", i) for i in range(6)]
    assert [len(x) for x in v] == [2, 2, 1, 1, 1, 2]
    np.testing.assert_array_equal(v[0], [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(v[1], [[1, 1, 1], [1, 1, 0]])
    assert not v[2].any() and not v[3].any() and not v[4].any()


def test_train_statistics_are_those_of_valid_train_frames(tmp_path):
    rng = np.random.default_rng(3)
    v = [rng.normal(1e4, 1.0, (5, 2)) * [1, 0.5] for _ in range(6)]
    for x in v:
        x[:, 1] = 7.3  # constant: deviation 1
    v[1] = np.zeros((3, 2))  # becomes a placeholder, which is left out
    utterances = table(other=["test", None, "train", "train", None, "valid"])
    opened = open_store(write(tmp_path / "toy", utterances, {"v": v}), "other")
    assert opened.folds == ("standard", "other") and len(opened["train"]) == 2
    chosen = np.concatenate([v[2], v[3]]).astype("float32").astype("float64")
    mean, std = opened.stats("v")
    np.testing.assert_allclose(mean, chosen.mean(0), rtol=1e-7)
    np.testing.assert_allclose(std[0], chosen[:, 0].std(), rtol=1e-6)
    assert std[1] == 1
    standard = np.concatenate([v[0], v[2], v[3]]).astype("float32").astype("float64")
    recorded = opened.info.stats["standard"]["v"]
    np.testing.assert_allclose(recorded["std"][0], standard[:, 0].std(), rtol=1e-9)


@pytest.mark.parametrize(
    ("utterances", "words"),
    [
        (table().drop(columns="clip"), ["'clip' is missing"]),
        (table(id=["a", "b", "c", "b", "d", "e"]), ["rows 1 and 3", "'b'", "unique"]),
        (table(id=["a", "b", "c", "d", "e", "a"]), ["rows 0 and 5", "train", "test", "leak"]),
        (table(y=[0, 1, 2, 5, 0, -4.0]), ["row 3", "'u3'", "5.0", "label_range=(-5, 5)"]),
        (table(y=[0, 1, np.nan, 0, 0, 0]), ["row 2", "'u2'", "no number"]),
        (table(standard=["train", "dev"] * 3), ["row 1", "'dev'", "train, valid, test"]),
        (table().drop(columns="standard"), ["no fold", "'standard'"]),
        (table().iloc[:0], ["no utterance"]),
    ],
)
def test_bad_tables_are_refused_before_anything_is_written(tmp_path, utterances, words):
    with pytest.raises(ValueError) as caught:
        write(tmp_path / "toy", utterances)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_range_can_be_widened_by_hand(tmp_path):
    for nonsense in ((1, -1), (0, float("nan")), (0, float("inf"))):
        with pytest.raises(ValueError, match="is no range"):
            write(tmp_path / "t", table(), label_range=nonsense)
    opened = open_store(write(tmp_path / "t", table(y=[5.0] * 6), label_range=(-5, 5)))
    assert opened.info.label_range == (-5, 5)


@pytest.mark.parametrize(
    ("v", "words"),
    [
        (frames(5), "5 sequences for 6"),
        (frames(7), "more sequences than the 6"),
        ([*frames(5), np.ones((2, 4))], r"row 5 \(id 'u5'\) is 4 wide"),
        ([*frames(5), np.ones(4)], r"row 5 \(id 'u5'\).*shape \(4,\)"),
        ([*frames(5), np.array([["a", "b", "c"]])], "numbers"),
    ],
)
def test_sequences_that_do_not_fit_leave_nothing(tmp_path, v, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "toy", sequences={"v": v})
    assert list(tmp_path.iterdir()) == []


def test_no_space_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    # after the values, before the header; other users of struct, pytest-xdist's among them, keep it
    monkeypatch.setattr(packing, "struct", SimpleNamespace(pack=full))
    with pytest.raises(OSError, match="no space left.*CONKI_DATA"):
        write(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_never_overwritten_unasked(tmp_path):
    write(tmp_path / "toy")
    before = open_store(tmp_path / "toy").fingerprint
    with pytest.raises(FileExistsError, match="holds a store"):
        write(tmp_path / "toy")
    again = write(tmp_path / "toy", table(y=[0.0] * 6), overwrite=True)
    assert open_store(again).fingerprint != before
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="no store"):
        write(tmp_path / "mine", overwrite=True)


def test_fingerprint_depends_on_every_part(tmp_path):
    prints = [
        open_store(write(tmp_path / "a")).fingerprint,
        open_store(write(tmp_path / "b", table(y=[1.0] * 6))).fingerprint,
        open_store(write(tmp_path / "c", table(text=["x"] * 6))).fingerprint,
        open_store(write(tmp_path / "d", sequences={"v": frames(seed=9)})).fingerprint,
        open_store(write(tmp_path / "e", table(standard=["train"] * 6))).fingerprint,
    ]
    assert len(set(prints)) == 5
    assert open_store(write(tmp_path / "f")).fingerprint == prints[0]


def _in_process(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def _die_while_writing(path):
    def stream():
        yield from frames(3)
        os._exit(9)

    write(path, sequences={"v": stream()})


def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path):
    assert _in_process(_die_while_writing, tmp_path / "[toy]") == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".[toy].partial-")
    with pytest.raises(FileNotFoundError, match="no corpus at"):
        open_store(tmp_path / "[toy]")
    write(tmp_path / "[toy]")  # the next writer clears away, at once
    assert [p.name for p in tmp_path.iterdir()] == ["[toy]"]


def _die_while_replacing(path, renames):
    rename = type(path).rename

    def count(self, target):
        nonlocal renames
        if not renames:
            os._exit(9)
        renames -= 1
        return rename(self, target)

    def die(*_, **__):
        os._exit(9)

    type(path).rename, aside.shutil = count, SimpleNamespace(rmtree=die)
    write(path, table(y=[0.0] * 6), overwrite=True)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_writer_killed_while_replacing_loses_neither_store(tmp_path, renames):
    old = open_store(write(tmp_path / "toy")).fingerprint
    assert _in_process(_die_while_replacing, tmp_path / "toy", renames) == 9
    assert len(list(tmp_path.iterdir())) == 2
    aside.clear_away(tmp_path / "toy")
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]
    assert (open_store(tmp_path / "toy").fingerprint == old) == (renames < 2)


def test_convert_sees_a_store_that_a_killed_writer_had_set_aside(tmp_path):
    from conki_lib.data import convert

    old = open_store(write(tmp_path / "toy")).fingerprint
    assert _in_process(_die_while_replacing, tmp_path / "toy", 1) == 9
    assert not (tmp_path / "toy").exists()
    with pytest.raises(FileExistsError, match="exists already"):
        convert(tmp_path / "file.pkl", tmp_path / "toy")
    assert open_store(tmp_path / "toy").fingerprint == old


def test_a_folder_swept_before_its_lock_is_given_up(tmp_path, monkeypatch):
    lock, taken = aside.FileLock, []

    def slow(path):
        if not taken:  # another process clears away between the folder and its lock
            taken.append(path)
            aside.clear_away(tmp_path / "toy")
        return lock(path)

    monkeypatch.setattr(aside, "FileLock", slow)
    write(tmp_path / "toy")
    assert taken and [p.name for p in tmp_path.iterdir()] == ["toy"]


def test_two_writers_at_once_leave_one_complete_store(tmp_path):
    def stream():
        for i, array in enumerate(frames()):
            if i == 3:  # the other one is quicker
                write(tmp_path / "toy", sequences={"v": frames()})
            yield array

    with pytest.raises(FileExistsError, match="another process"):
        write(tmp_path / "toy", sequences={"v": stream()})
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]
    assert len(open_store(tmp_path / "toy")["train"]) == 4


def test_missing_and_damaged_stores_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="conki fetch mosi-open"):
        open_store(tmp_path / "mosi-open")
    with pytest.raises(FileNotFoundError, match="conki convert SOURCE"):
        open_store(tmp_path / "mosei")
    path = write(tmp_path / "toy")
    with pytest.raises(ValueError, match="no fold 'standard1'; did you mean 'standard'"):
        open_store(path, "standard1")
    with pytest.raises(KeyError, match="train, valid, test"):
        open_store(path)["dev"]
    features = (path / "features.safetensors").read_bytes()
    (path / "features.safetensors").write_bytes(features[:-4])
    with pytest.raises(ValueError, match="cut off"):
        open_store(path)
    (path / "features.safetensors").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="damaged"):
        open_store(path)
    (path / "features.safetensors").write_bytes(features)
    info = json.loads((path / "info.json").read_text())
    (path / "info.json").write_text(json.dumps(info | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        open_store(path)
    (path / "info.json").unlink()
    with pytest.raises(FileNotFoundError, match="info.json is missing"):
        open_store(path)


@pytest.mark.parametrize("what", ["offsets", "table", "column", "text alone"])
def test_tables_and_offsets_that_do_not_fit_are_damaged(tmp_path, what):
    path = write(tmp_path / "toy", sequences={} if what == "text alone" else None)
    if what == "offsets":
        content = bytearray((path / "features.safetensors").read_bytes())
        with safe_open(path / "features.safetensors", "np") as file:
            last = file.get_tensor("vision.offsets")[-1].astype("<i8").tobytes()
        content[content.rindex(last)] += 1
        (path / "features.safetensors").write_bytes(content)
    else:
        held = pd.read_parquet(path / "utterances.parquet")
        held = held.drop(columns="standard") if what == "column" else held.head(3)
        held.to_parquet(path / "utterances.parquet")
    with pytest.raises(ValueError, match="damaged or cut off.*remove the folder, then run"):
        inspect_path(path)


def test_a_store_is_written_where_a_link_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("there", "not_there"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "there").mkdir()
    for name in ("there", "not_there"):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink() and len(open_store(tmp_path / name)["train"]) == 4


def test_opening_reads_nothing_but_the_description(make_tiny_store):
    opened = open_store(make_tiny_store())
    lazy = {"utterances", "_values", "_offsets"}
    assert not lazy & set(vars(opened))
    assert len(opened["train"]) == 8 and not lazy & set(vars(opened))
    first = opened["train"][0]
    assert lazy <= set(vars(opened))
    copied = pickle.loads(pickle.dumps(opened["train"]))
    assert not lazy & set(vars(copied.store)) and copied[0].id == first.id


def test_frames_are_views_that_cannot_be_changed(make_tiny_store):
    opened = open_store(make_tiny_store())
    view = opened.frames("v", 0)
    assert not view.flags.writeable and view.base is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        utterance = opened["train"][0]
    utterance.inputs["v"] += 1  # a copy: the user's own
    np.testing.assert_array_equal(opened.frames("v", 0) + 1, utterance.inputs["v"])
