"""Public files: recognised before they are read, converted whole or not at all, exported."""

import gzip
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from layouts import DEFECTS, mmsa_layout, whole, write_csd_layout, write_mmsa_layout

from conki_lib.config import MODALITY_NAMES
from conki_lib.data import export_mmsa, open_store
from conki_lib.data.formats import convert, inspect_path, recognise
from conki_lib.data.frames import from_frame
from conki_lib.data.inspection import audit
from conki_lib.data.mmsa import RELEASES, Release, split_id
from conki_lib.data.pickles import BadFile

README = Path(__file__).resolve().parents[1] / "data" / "README.md"


# --- recognised before reading ----------------------------------------------------------------


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("aligned_50.pkl", "x")


def _cut(path: Path, keep: float, fill: bool = False) -> None:
    data = write_mmsa_layout(path).read_bytes()
    kept = data[: int(len(data) * keep)]
    path.write_bytes(kept.ljust(len(data), b"\0") if fill else kept)


MOSI_SHA = next(iter(RELEASES))
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{MOSI_SHA}\nsize 5\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
ENDLESS: list[Any] = []
ENDLESS += [ENDLESS, ENDLESS]
WRONG: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "empty": (lambda p: p.write_bytes(b""), "an empty file", "get it again"),
    "zeros": (lambda p: p.write_bytes(bytes(10_000)), "a file of zeros", "get it again"),
    "zero head": (
        lambda p: p.write_bytes(bytes(9000) + b"x"),
        "a file that begins with zeros",
        "get it again",
    ),
    "html": (lambda p: p.write_bytes(PAGE), "an HTML page.*Quota exceeded", "get it again"),
    "html, BOM": (lambda p: p.write_bytes(b"\xef\xbb\xbf" + PAGE), "an HTML page", "get it again"),
    "html, UTF-16": (
        lambda p: p.write_text(PAGE.decode(), "utf-16"),
        "an HTML page.*Quota",
        "get it again",
    ),
    "script": (lambda p: p.write_text("<script>x()</script>"), "an HTML page", "get it again"),
    "answer": (lambda p: p.write_text('{"error": {"code": 403}}'), "a server's error", "again"),
    "git-lfs": (
        lambda p: p.write_text(POINTER),
        "a git-lfs pointer to MMSA's MOSI/Processed/unaligned_50.pkl",
        "git lfs pull",
    ),
    "zip": (_zip, "a zip archive", "unpack it"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x")), "a gzip file", "unpack it"),
    "7z": (lambda p: p.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(9)), "a 7z archive", "unpack it"),
    "truncated": (lambda p: _cut(p, 0.7), "truncated", "get it again"),
    "zero tail": (lambda p: _cut(p, 0.7, True), "a pickle whose end is zeros", "get it again"),
    "foreign": (
        lambda p: p.write_bytes(pickle.dumps({"weights": 1})),
        "a foreign pickle: a dict with weights",
        "a dict of train, valid and test is needed",
    ),
    "unsafe": (
        lambda p: p.write_bytes(pickle.dumps({"train": eval})),
        "wants builtins.eval",
        "do not load",
    ),
    "no format": (
        lambda p: p.write_bytes(b"id,text,y\n"),
        "no known format",
        "MMSA pickles.*again",
    ),
    "hdf5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5", "again"),
    "folder": (lambda p: p.mkdir(), "a folder without .csd files", "give an MMSA pickle"),
}


ANY_FILE = list(WRONG)[: list(WRONG).index("truncated")]  # recognised whatever was expected


@pytest.mark.parametrize("kind", WRONG)
def test_what_people_have_instead_is_named_and_left_alone(tmp_path: Path, kind: str) -> None:
    make, what, way_out = WRONG[kind]
    source = tmp_path / "unaligned_50.pkl"
    make(source)
    with pytest.raises(BadFile, match=f"unaligned_50.pkl.*{what}.*{way_out}"):
        convert(source, tmp_path / "store")
    with pytest.raises(BadFile, match=what):
        inspect_path(source)
    assert [p.name for p in tmp_path.iterdir()] == ["unaligned_50.pkl"]


def test_a_truncated_file_that_seems_to_end_is_recognised(tmp_path: Path) -> None:
    source = write_mmsa_layout(tmp_path / "x.pkl")
    source.write_bytes(source.read_bytes()[:900] + b".")
    with pytest.raises(BadFile, match="x.pkl.*(truncated|cannot be read)"):
        convert(source, tmp_path / "store")


def test_stores_folders_and_single_csd_files_are_told_apart(tmp_path: Path) -> None:
    write_csd_layout(tmp_path / "csd")
    assert recognise(tmp_path / "csd").format == "csd"
    assert recognise(write_mmsa_layout(tmp_path / "x.pkl")).format == "mmsa"
    one = next((tmp_path / "csd").glob("*.csd"))
    with pytest.raises(BadFile, match=r"single \.csd file: give its folder"):
        recognise(one)
    store = convert(tmp_path / "x.pkl", tmp_path / "store")
    with pytest.raises(BadFile, match="a store already"):
        convert(store, tmp_path / "other")
    (store / "info.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no complete store.*info\.json"):
        inspect_path(store)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        convert(tmp_path / "nowhere.pkl", tmp_path / "other")
    with pytest.raises(BadFile, match="is an MMSA pickle, not of the format 'csd'"):
        convert(tmp_path / "x.pkl", tmp_path / "other", format="csd")
    with pytest.raises(ValueError, match="format='mat'"):
        convert(tmp_path / "x.pkl", tmp_path / "other", format="mat")


# --- MMSA pickles -----------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"dtype": "f8", "protocol": 4},
    "protocol 2": {"protocol": 2, "steps": {"v": 40, "a": 50}},
    "protocol 3": {"protocol": 3},
    "protocol 5": {"protocol": 5},
    "aligned": {"aligned": True},
    "sims": {"unimodal": True, "widths": {"v": 7, "a": 2}},
    "ids [vid]": {"ids": "video"},
    "ids [vid, start, end]": {"ids": "times", "protocol": 4},
    "many rows": {"counts": (70, 33, 1)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lists", [False, True])
def test_a_store_holds_what_the_pickle_holds(tmp_path: Path, case: str, lists: bool) -> None:
    options = dict(CASES[case])
    protocol = options.pop("protocol", 4)
    content = whole(mmsa_layout(**options), lists)
    source = tmp_path / "x.pkl"
    source.write_bytes(pickle.dumps(content, protocol))
    store = open_store(convert(source, tmp_path / "toy"))
    assert store.info.name == "toy"
    assert store.info.language == ("zh" if case == "sims" else "en")
    assert store.info.label_range == ((-1, 1) if case == "sims" else (-3, 3))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert store.info.sources == [
        {"file": "x.pkl", "sha256": digest, "bytes": source.stat().st_size}
    ]
    for split, columns in content.items():
        view = store[split]
        np.testing.assert_array_equal(view.y, columns["regression_labels"])
        assert view.table["text"].tolist() == columns["raw_text"]
        for letter in "TVA" if case == "sims" else "":
            np.testing.assert_array_equal(
                view.table[f"y_{letter}"].to_numpy(np.float32),
                columns[f"regression_labels_{letter}"],
            )
        for m in ("v", "a"):
            name = MODALITY_NAMES[m]
            for i, padded in enumerate(columns[name]):
                held = np.flatnonzero(np.any(np.asarray(padded) != 0, axis=1))[-1] + 1
                stated = columns.get(f"{name}_lengths", [0] * 999)[i]
                frames = store.frames(m, int(view.rows[i]))
                np.testing.assert_array_equal(frames, padded[: max(held, stated)])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("03bSnISJMiM$_$11",), ("03bSnISJMiM", "11")),
        (("-a_b$_$c$_$2",), ("-a_b$_$c", "2")),
        (("video_0001$_$0003",), ("video_0001", "0003")),
        (("03bSnISJMiM[7]",), ("03bSnISJMiM", "7")),
        (("_0efYOjQYRc_12",), ("_0efYOjQYRc", "12")),
        (("video_12",), ("video_12", None)),
        (("03bSnISJ_12",), ("03bSnISJ_12", None)),
        (("-UacrmKiTn4", "1.5", "4"), ("-UacrmKiTn4", "1.5-4")),
    ],
)
def test_ids_of_all_forms(parts: tuple[str, ...], expected: tuple[str, str | None]) -> None:
    assert split_id(parts) == expected


def test_ids_become_unique(tmp_path: Path) -> None:
    content = whole(mmsa_layout(counts=(3, 2, 1)))
    content["train"]["id"] = np.array([["v_1"], ["v_1"], ["w-2"]])
    content["valid"]["id"] = [[b"x", 0.5, 2.0], [b"x", 2.0, 3.25]]
    del content["test"]["id"]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    table = open_store(convert(tmp_path / "x.pkl", tmp_path / "s")).utterances
    assert table["id"].tolist() == [
        *("v_1$_$0", "v_1$_$1", "w-2$_$0", "x$_$0.5-2", "x$_$2-3.25", "test$_$0")
    ]
    assert table["video"].tolist() == ["v_1", "v_1", "w-2", "x", "x", "test"]


def test_optional_columns_may_be_missing(tmp_path: Path) -> None:
    content = whole(mmsa_layout())
    for columns in content.values():
        for key in ("raw_text", "audio", "audio_lengths", "annotations", "classification_labels"):
            del columns[key]
        columns["text"] = np.zeros((len(columns["id"]), 5, 7))
    del content["valid"]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    store = open_store(convert(tmp_path / "x.pkl", tmp_path / "s"))
    assert store.info.modalities == ("v",)
    assert store.splits == ("train", "test")
    assert "no split 'valid'" in store.info.notes and "text" in store.info.notes


def test_labels_may_be_nested_and_features_single_vectors(tmp_path: Path) -> None:
    content = whole(mmsa_layout(aligned=True))
    for columns in content.values():
        columns["regression_labels"] = columns["regression_labels"].reshape(-1, 1, 1)
        columns["vision"] = columns["vision"][:, 0]
        columns["raw_text"] = np.array(columns["raw_text"], object).reshape(-1, 1)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    store = open_store(convert(tmp_path / "x.pkl", tmp_path / "s"))
    assert set(store["train"].lengths("v")) == {1}
    assert store["train"].y.tolist() == content["train"]["regression_labels"].ravel().tolist()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["train"].pop("regression_labels"), "'train'.*regression_labels is missing"),
        (lambda c: c["test"].update(id=["a"]), "'test'.*id has 1 rows, regression_labels has 3"),
        (lambda c: c["valid"].update(audio_lengths=[1]), "'valid'.*audio_lengths has 1 rows"),
        (lambda c: c["train"].update(vision=np.zeros((2, 9, 4))), "'train'.*vision has 2 rows"),
        (lambda c: c["train"].update(vision=np.zeros((6, 9, 4, 1))), "shape .6, 9, 4, 1."),
        (lambda c: c["train"].update(vision="gone"), "vision is str"),
        (lambda c: c["train"].pop("vision"), "'vision' is in some splits only"),
        (lambda c: c["test"].update(regression_labels=["good"] * 3), "no list of numbers"),
        (lambda c: c["test"]["regression_labels"].__setitem__(1, np.nan), "label y = nan is no"),
        (lambda c: c["train"].update(audio=np.zeros((6, 7, 5))), "audio of row.*wide"),
        (lambda c: c["test"]["regression_labels"].__setitem__(1, np.inf), "label y = inf is no"),
        (lambda c: c["test"].update(raw_text=None), "'test': raw_text is NoneType, no list"),
        (lambda c: c["test"].update(raw_text=5), "'test': raw_text is int, no list"),
        (lambda c: c["test"].update(raw_text=[{}] * 3), "raw_text of row 0 is or holds a dict"),
        (lambda c: c["test"].update(id=[None, "b", "c"]), "'test': id of row 0 is missing"),
        (lambda c: c["test"].update(id=None), "'test': id is NoneType, no list"),
        (lambda c: c["test"].update(id=[["v", ENDLESS], "b", "c"]), "id of row 0 is nested too"),
        (lambda c: c["test"].update(id=[["v"] * 99, "b", "c"]), "id of row 0 has too many parts"),
        (lambda c: c["test"].update(regression_labels=[ENDLESS]), "list of numbers .is nested"),
        (lambda c: c["test"].update(vision=[None] * 3), "'test': vision of row 0 is no array"),
        (lambda c: c["test"].update(vision=["a"] * 3), "'test': vision of row 0 is no array"),
        (lambda c: c["test"].update(vision=[ENDLESS] * 3), "vision of row 0.*nested too deep"),
        (lambda c: c["test"].update(vision=np.array(["a", [], 1], object)), "vision of row 0 is"),
        (lambda c: c["test"].update(vision=np.zeros((3, 10**15, 0))), "vision has the shape"),
        (lambda c: c["test"].update(vision=[np.zeros((10**15, 0))] * 3), "vision of row 0 is no"),
        (lambda c: c["test"].update(vision_lengths=["a"] * 3), "vision_lengths is no list of num"),
        (lambda c: c["test"].update(vision_lengths=[2**79] * 3), "vision_lengths holds"),
        (lambda c: c["test"].update(vision_lengths=[np.nan] * 3), "vision_lengths holds"),
        (lambda c: c.update(fold5=c.pop("test")), "split 'fold5' is not known"),
        (lambda c: c.update(dev=c["valid"]), "split 'dev' is there twice"),
        (
            lambda c: [part.update({k: v[:0] for k, v in part.items()}) for part in c.values()],
            "no utterance",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(
    tmp_path: Path, damage: Callable[[Any], Any], message: str
) -> None:
    content = whole(mmsa_layout())
    damage(content)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(BadFile, match=f"(?s)x.pkl.*{message}"):
        convert(tmp_path / "x.pkl", tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]


def test_a_split_of_another_usual_name_is_read(tmp_path: Path) -> None:
    content = whole(mmsa_layout())
    content["dev"] = content.pop("valid")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    store = open_store(convert(tmp_path / "x.pkl", tmp_path / "s"))
    assert store.splits == ("train", "valid", "test")
    assert store["valid"].table["text"].tolist() == content["dev"]["raw_text"]


def test_duplicates_in_one_split_are_numbered_on_request(tmp_path: Path) -> None:
    content = whole(mmsa_layout())
    content["train"]["id"][1] = content["train"]["id"][0]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(BadFile, match=r"x\.pkl.*rows 0 and 1.*--number-duplicates"):
        convert(tmp_path / "x.pkl", tmp_path / "s")
    store = open_store(convert(tmp_path / "x.pkl", tmp_path / "s", number_duplicates=True))
    first, second = store["train"].columns["id"][:2]
    assert second == first + "#2" and store.info.cleaned["duplicate ids numbered"] == 1
    content["test"]["id"][0] = content["train"]["id"][0]
    (tmp_path / "y.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(BadFile, match="test and train.*leak"):
        convert(tmp_path / "y.pkl", tmp_path / "t", number_duplicates=True)


def test_inspection_lists_a_width_that_changes(tmp_path: Path) -> None:
    content = whole(mmsa_layout())
    content["test"]["vision"] = np.ones((3, 9, 5), "f4")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    found = inspect_path(tmp_path / "x.pkl").defects.set_index("check")["found"]
    assert found["vision: sequences of another width than the first"] == 3


# --- planted defects --------------------------------------------------------------------------

FEATURE_DEFECTS = sorted(set(DEFECTS) - {"label", "shared id"})


def test_planted_defects_are_repaired_and_counted(tmp_path: Path) -> None:
    source = write_mmsa_layout(tmp_path / "x.pkl", dtype="f8", defects=FEATURE_DEFECTS)
    store = open_store(convert(source, tmp_path / "s"))
    for name in ("vision", "audio"):
        counts = {k: v for k, v in store.info.cleaned.items() if k.startswith(name)}
        assert counts == {
            f"{name}.length below the last frame": 1,
            f"{name}.length beyond the array": 1,
            f"{name}.empty": 1,
            f"{name}.nan": 1,
            f"{name}.+inf": 1,
            f"{name}.-inf": 1,
            f"{name}.overflow": 1,
        }
    first, second, third = (store.frames("v", i) for i in range(3))
    assert first.shape == (1, 4) and not first.any()
    assert len(second) >= 3 and not second[1].any() and second[2].any()
    assert np.isfinite(third).all() and third[0, 0] == third[1, 0] == third[2, 0] == 0
    assert len(third) == 9  # stated beyond the array: all frames there are


def test_labels_outside_the_range_are_an_error_unless_widened(tmp_path: Path) -> None:
    source = write_mmsa_layout(tmp_path / "x.pkl", defects=["label"])
    with pytest.raises(
        ValueError, match=r"row 10 .*4\.5 is outside \[-3, 3\].*label_range=\(-5, 5\)"
    ):
        convert(source, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    store = open_store(convert(source, tmp_path / "s", label_range=(-5, 5)))
    assert store.info.label_range == (-5, 5) and store["test"].y.max() == 4.5


def test_ids_in_two_splits_are_an_error(tmp_path: Path) -> None:
    source = write_mmsa_layout(tmp_path / "x.pkl", defects=["shared id"])
    with pytest.raises(ValueError, match=r"rows 0 and 9 .*tr-_00000_x\$_\$0.*test and train"):
        convert(source, tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("ids", [lambda n: [f"utt{i}" for i in range(n)], np.arange])
def test_ids_without_clips_are_not_renamed_apart_across_splits(tmp_path: Path, ids: Any) -> None:
    content = whole(mmsa_layout(counts=(6, 3, 3)))
    for columns in content.values():
        columns["id"] = ids(len(columns["id"]))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"same id.*|shared by the splits"):
        convert(tmp_path / "x.pkl", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_texts_that_are_missing_are_empty_and_numbers_keep_their_digits(tmp_path: Path) -> None:
    content = whole(mmsa_layout(counts=(4, 2, 1)))
    content["train"]["raw_text"] = [None, float("nan"), "half \ud83d", "nan"]
    content["valid"]["id"] = [["v", 1000.001, 1000.002], ["v", 1000.003, 1000.004]]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    table = open_store(convert(tmp_path / "x.pkl", tmp_path / "s")).utterances
    assert table["text"].tolist()[:4] == ["", "", "half ?", "nan"]
    assert table["clip"].tolist()[4:6] == ["1000.001-1000.002", "1000.003-1000.004"]


def test_inspection_lists_defects_without_converting(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "f8", "protocol": 2}
    source = write_mmsa_layout(tmp_path / "x.pkl", defects=list(DEFECTS), **options)
    found = inspect_path(source)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]
    counts = found.defects.set_index("check")["found"]
    expected = {
        "ids that stand there already": 1,
        "ids in several splits of standard": 1,
        "videos in several splits of standard": 1,
        "texts that are empty": 1,
        "labels y outside [-3, 3]": 1,
        "utterances outside standard": 0,
    }
    for name in ("vision", "audio"):
        expected[f"{name}: sequences that are empty or zero throughout"] = 1
        expected[f"{name}: sequences with values that are not finite in float32"] = 1
        expected[f"{name}: sequences with a zero frame inside"] = 1
        expected[f"{name}: features that never change"] = 1
    assert {k: int(counts[k]) for k in expected} == expected
    assert found.counts[["train", "valid", "test"]].iloc[0].tolist() == [6, 3, 3]
    text = str(found)
    for part in ("MMSA pickle", "vision 4, audio 3", "length below the last frame 1", "ids that"):
        assert part in text
    assert found.summary["release"].startswith("none of those that MMSA published")
    clean = inspect_path(write_mmsa_layout(tmp_path / "y.pkl", aligned=True))
    assert not clean.defects["found"].any() and "none in 16 checks" in str(clean)


def test_inspection_of_a_store_agrees_with_that_of_its_file(tmp_path: Path) -> None:
    source = write_mmsa_layout(tmp_path / "x.pkl", counts=(40, 9, 9))
    raw, stored = inspect_path(source), inspect_path(convert(source, tmp_path / "s"))
    pd.testing.assert_frame_equal(raw.lengths, stored.lengths)
    pd.testing.assert_frame_equal(raw.labels, stored.labels)
    pd.testing.assert_frame_equal(raw.defects, stored.defects)
    assert raw.labels[["train", "valid", "test"]].to_numpy().sum() == 58


def test_the_audit_sees_speakers_across_splits_and_constant_features(
    tmp_path: Path, make_tiny_store: Callable[..., Path]
) -> None:
    table = audit(open_store(make_tiny_store(sizes=(3, 2, 3)))).set_index("check")
    videos = table.loc["videos in several splits of standard"]
    assert (videos["found"], videos["of"], videos["examples"]) == (2, 4, "v1, v2")
    source = write_mmsa_layout(tmp_path / "x.pkl", defects=["constant"])
    table = audit(open_store(convert(source, tmp_path / "s"))).set_index("check")
    row = table.loc["vision: features that never change"]
    assert (row["found"], row["of"], row["examples"], row["share"]) == (1, 4, "3", 0.25)


# --- releases ---------------------------------------------------------------------------------


def test_a_known_release_gives_name_and_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_mmsa_layout(tmp_path / "x.pkl")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(RELEASES, digest, Release("mosei", "M/x.pkl", (-3, 3), (6, 3, 3)))
    info = open_store(convert(source, tmp_path / "s")).info
    assert info.name == "mosei" and "M/x.pkl" in info.notes["release"]


def test_a_lookalike_of_a_release_is_read_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_mmsa_layout(tmp_path / "x.pkl")
    monkeypatch.setitem(RELEASES, "0" * 64, Release("mosei", "M/x.pkl", (-3, 3), (6, 3, 3)))
    with pytest.warns(UserWarning, match=r"x\.pkl: as many utterances as M/x\.pkl, but another"):
        info = open_store(convert(source, tmp_path / "s")).info
    assert info.name == "s" and "0" * 64 in info.notes["release"]


def test_releases_are_those_that_were_published() -> None:
    assert {(r.name, r.file.split("/")[-1], sha[:8]) for sha, r in RELEASES.items()} == {
        ("mosi", "unaligned_50.pkl", "78e0f8b5"),
        ("mosi", "aligned_50.pkl", "d3994fd2"),
        ("mosei", "unaligned_50.pkl", "ad8b23d5"),
        ("mosei", "aligned_50.pkl", "45eccfb7"),
        ("sims", "unaligned_39.pkl", "c9e20c13"),
    }
    assert all(len(sha) == 64 for sha in RELEASES)


# --- killed, interrupted, bounded in memory -----------------------------------------------------

SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
from conki_lib.data import formats
rows = formats._watched
def slowly(*args):
    for frames in rows(*args):
        time.sleep(0.05)
        yield frames
formats._watched = slowly
print("ready", flush=True)
formats.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_conversion_leaves_nothing_that_looks_complete(
    tmp_path: Path, end: signal.Signals
) -> None:
    source = write_mmsa_layout(tmp_path / "x.pkl", counts=(500, 3, 3))
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, source, tmp_path / "s"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    while process.poll() is None and not list(tmp_path.glob(".s.partial-*/features*")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(end)
    _, shown = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert not (tmp_path / "s").exists()
    with pytest.raises(FileNotFoundError, match="conki convert"):
        open_store(tmp_path / "s")
    if end == signal.SIGINT:
        assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]
    assert re.search(r"vision: +\d+%.*[kM]?B?/.*<.*B/s", shown)  # bytes, time left, speed
    store = open_store(convert(source, tmp_path / "s"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "x.pkl"]
    assert sum(store.info.counts["standard"].values()) == 506
    other = open_store(convert(source, tmp_path / "t", name="s"))
    assert store.fingerprint == other.fingerprint


PEAK = """
import re, sys
from pathlib import Path
from conki_lib.data import formats
def peak():  # ru_maxrss would start at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
base = peak()
formats.convert(sys.argv[1], sys.argv[2])
print(peak() - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc")
@pytest.mark.parametrize("form", ["streamed", "lists", "protocol 2"])
def test_conversion_needs_little_memory(tmp_path: Path, form: str) -> None:
    n = 700 if form == "streamed" else 150
    large: dict[str, Any] = {"counts": (n, 30, 30), "steps": {"v": 500, "a": 500}}
    large |= {"widths": {"v": 35, "a": 74}, "dtype": "f8" if form == "streamed" else "f4"}
    source = tmp_path / "x.pkl"
    if form == "lists":
        source.write_bytes(pickle.dumps(whole(mmsa_layout(**large), lists=True), 4))
    else:
        write_mmsa_layout(source, protocol=2 if form == "protocol 2" else None, **large)
    assert source.stat().st_size > (3e8 if form == "streamed" else 4e7)
    command = [sys.executable, "-c", PEAK, source, tmp_path / "s"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) < (120 if form == "protocol 2" else 40)  # MB; promised: 300 and more


# --- own data and back --------------------------------------------------------------------------


def test_export_can_be_read_by_plain_pickle_and_converted_again(tmp_path: Path) -> None:
    source = write_mmsa_layout(tmp_path / "x.pkl", unimodal=True, counts=(20, 5, 5))
    store = open_store(convert(source, tmp_path / "toy"))
    exported = export_mmsa(store, tmp_path / "out" / "y.pkl", tokenizer=_tokenizer, max_tokens=4)
    assert [p.name for p in exported.parent.iterdir()] == ["y.pkl"]
    content = pickle.loads(exported.read_bytes())
    train = content["train"]
    assert train["vision"].shape == (20, int(store["train"].lengths("v").max()), 4)
    assert train["vision"].dtype == np.float32
    assert train["text_bert"].shape == (20, 3, 4)
    assert train["annotations"][0] in ("Negative", "Neutral", "Positive")
    again = open_store(convert(exported, tmp_path / "other", name="toy"))
    assert again.fingerprint == store.fingerprint


def _tokenizer(texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
    assert options == {
        "return_token_type_ids": True,
        "padding": "max_length",
        "truncation": True,
        "max_length": 4,
    }
    kinds = ("input_ids", "attention_mask", "token_type_ids")
    return {k: [[len(t), 1, 2, 3] for t in texts] for k in kinds}


def test_export_cuts_and_a_failed_one_leaves_nothing(
    tmp_path: Path, make_tiny_store: Callable[..., Path]
) -> None:
    store = open_store(make_tiny_store())
    content = pickle.loads(export_mmsa(store, tmp_path / "y.pkl", max_steps=3).read_bytes())
    assert content["train"]["audio"].shape == (8, 3, 3)
    assert max(content["train"]["audio_lengths"]) <= 3

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no tokens")

    with pytest.raises(RuntimeError, match="no tokens"):
        export_mmsa(store, tmp_path / "z.pkl", tokenizer=fail)
    assert not list(tmp_path.glob("*z.pkl*"))


def _own(folder: Path, n: int = 6) -> pd.DataFrame:
    """A folder as a user may have it: a table, and one file of frames per utterance."""
    rng = np.random.default_rng(0)
    splits = ["train"] * (n - 2) + ["validation", "test"]
    frame = pd.DataFrame(
        {"id": [f"0{i}" for i in range(n)], "text": ["NA", *"bcdef"], "y": 0.5, "split": splits}
    )
    for m, width in (("vision", 4), ("audio", 3)):
        (folder / m).mkdir(parents=True)
        for i in frame["id"]:
            np.save(folder / m / f"{i}.npy", rng.normal(size=(rng.integers(1, 9), width)))
    frame.to_csv(folder / "utterances.csv", index=False)
    frame.to_parquet(folder / "utterances.parquet")
    return frame


class HuggingFaceLike:
    """What `from_frame` needs of a `datasets.Dataset`."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame

    def to_pandas(self) -> pd.DataFrame:
        return self.frame


def test_own_data_from_files_frames_and_datasets_agree(tmp_path: Path) -> None:
    frame = _own(tmp_path)
    frame.to_json(tmp_path / "utterances.jsonl", orient="records", lines=True)
    files = {"v": str(tmp_path / "vision"), "a": tmp_path / "audio"}
    held = {m: [np.load(Path(f) / f"{i}.npy") for i in frame["id"]] for m, f in files.items()}
    columns = frame.assign(vis=[x.tolist() for x in held["v"]], aud=[list(x) for x in held["a"]])
    parts = {s: HuggingFaceLike(part.drop(columns="split")) for s, part in columns.groupby("split")}
    order = pd.concat(part.frame for part in parts.values())["id"].tolist()
    ways: dict[str, tuple[Any, Any]] = {
        "csv": (tmp_path / "utterances.csv", files),
        "parquet": (str(tmp_path / "utterances.parquet"), files),
        "jsonl": (tmp_path / "utterances.jsonl", files),
        "frame": (frame, {m: dict(zip(frame["id"], x, strict=True)) for m, x in held.items()}),
        "sequence": (frame, held),
        "columns": (columns, {"v": "vis", "a": "aud"}),
        "datasets": (parts, {"v": "vis", "a": "aud"}),
    }
    for way, (table, arrays) in ways.items():
        store = open_store(from_frame(table, arrays, tmp_path / way, label_range=(-1, 1)))
        assert store.utterances["id"].tolist() == (
            order if way == "datasets" else list(frame["id"])
        )
        assert store.info.counts == {"standard": {"train": 4, "valid": 1, "test": 1}}
        assert store.info.modalities == ("t", "v", "a") and store.info.name == way
        for row, i in enumerate(store.utterances["id"]):
            for m in ("v", "a"):
                expected = held[m][list(frame["id"]).index(i)].astype("f4")
                np.testing.assert_array_equal(store.frames(m, row), expected)
    for way in ("csv", "jsonl"):
        pd.testing.assert_frame_equal(
            open_store(tmp_path / way).utterances, open_store(tmp_path / "frame").utterances
        )


@pytest.mark.parametrize(
    ("change", "arrays", "message"),
    [
        (lambda f: f.drop(columns="y"), {}, "column 'y' is missing"),
        (lambda f: f.assign(split="dev2"), {}, "split 'dev2' is none of train"),
        (lambda f: f, {"a": "audio2"}, r"audio2.00\.npy is missing for row 0 .and 5 others"),
        (lambda f: f, {"a": {"00": np.zeros((1, 2))}}, "audio: no array for the id '01'"),
        (lambda f: f, {"v": 3}, "vision: a folder, .* not int"),
        (lambda f: f, {"v": [np.zeros((1, 2))] * 5}, "vision: 5 sequences for 6 utterances"),
        (lambda f: f.assign(id=["a", None, *"cdef"]), {}, "row 1 has no id"),
        (lambda f: f, {"v": [None] * 6}, "vision of .*shape"),
        (lambda f: f, {"v": [[[1, 2], [3]]] * 6}, "vision of .*shape"),
        (lambda f: f, {"v": "text"}, r"text.00\.npy is no array of numbers"),
        (lambda f: f, {"v": "objects"}, r"objects.00\.npy is no array of numbers"),
    ],
)
def test_own_data_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[Any], Any], arrays: Any, message: str
) -> None:
    frame = change(_own(tmp_path))
    for name in ("text", "objects"):
        (tmp_path / name).mkdir()
        for i in frame["id"]:
            np.save(tmp_path / name / f"{i}.npy", np.array([None, "x"], object))
            if name == "text":
                (tmp_path / name / f"{i}.npy").write_text("1,2,3")
    arrays = {m: tmp_path / a if a in ("text", "objects") else a for m, a in arrays.items()}
    with pytest.raises(ValueError, match=message):
        from_frame(frame, arrays, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_what_own_data_leave_empty(tmp_path: Path) -> None:
    frame = _own(tmp_path).assign(video=["v1", "v1", None, None, "v2", "v3"])
    frame = frame.assign(y_T=[None, 0.1, 0.2, 0.3, 0.4, 0.5])
    frame.to_csv(tmp_path / "own.csv", index=False)
    for way, table in {"frame": frame, "csv": tmp_path / "own.csv"}.items():
        held = open_store(from_frame(table, {}, tmp_path / way, label_range=(-1, 1))).utterances
        assert held["video"].tolist() == ["v1", "v1", "02", "03", "v2", "v3"]
        assert np.isnan(held["y_T"][0]) and held["y_T"][1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "videos",
    [pd.array([1, 1, None, 2, 3, 3], "Int64"), pd.Categorical(["1", "1", None, "2", "3", "3"])],
)
def test_own_data_of_typed_columns_with_gaps(tmp_path: Path, videos: Any) -> None:
    frame = _own(tmp_path).assign(video=videos)[lambda f: f["id"] != "01"]
    frame.drop(columns="id").to_parquet(tmp_path / "own.parquet")  # with the index of the whole
    options: dict[str, Any] = {"label_range": (-1, 1)}
    store = open_store(from_frame(tmp_path / "own.parquet", {}, tmp_path / "s", **options))
    assert store.utterances["id"].tolist() == [*"01234"]
    assert store.utterances["video"].tolist() == ["1", "1", "2", "3", "3"]


def test_a_table_in_another_encoding_is_named(tmp_path: Path) -> None:
    frame = _own(tmp_path).assign(text="café")
    frame.to_csv(tmp_path / "latin.csv", index=False, encoding="latin-1")
    with pytest.raises(BadFile, match=r"latin\.csv cannot be read .*UTF-8"):
        from_frame(tmp_path / "latin.csv", {}, tmp_path / "s")


def test_a_table_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.csv: there is no such file"):
        from_frame(tmp_path / "gone.csv", {}, tmp_path / "s")


def test_own_data_without_clips_goes_out_and_comes_back(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"y": [0.0, 1, 2, 3], "split": ["train"] * 3 + ["test"], "video": ["a", "a", "b", "c"]}
    )
    store = open_store(from_frame(frame, {}, tmp_path / "s"))
    assert store.utterances["clip"].tolist() == ["0", "1", "0", "0"]
    back = open_store(convert(export_mmsa(store, tmp_path / "x.pkl"), tmp_path / "back"))
    assert back.utterances["id"].tolist() == ["a$_$0", "a$_$1", "b$_$0", "c$_$0"]
    same = frame.assign(clip="7", id=["p", "q", "r", "s"])  # two utterances are one clip
    store = open_store(from_frame(same, {}, tmp_path / "same"))
    content = pickle.loads(export_mmsa(store, tmp_path / "y.pkl").read_bytes())
    assert content["train"]["id"] == ["p", "q", "r"]


def test_the_example_of_the_data_book_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text(encoding="utf-8").split("## Own data")[1].split("\n## ")[0]
    first, *others = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(first.strip().splitlines()) <= 10
    _own(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    exec(first, {})
    store = open_store(tmp_path / "data" / "mine")
    assert store.info.modalities == ("t", "v", "a")
    for code in others:
        compile(code, "data/README.md", "exec")
