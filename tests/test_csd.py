"""CMU-MultimodalSDK files: every row and word in the segment that holds its midpoint, in order."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import CSD_ODDITIES, write_csd_layout
from test_formats import ANY_FILE, WRONG

from conki_lib.data import open_store
from conki_lib.data.csd import CsdFile
from conki_lib.data.formats import convert, inspect_path
from conki_lib.data.pickles import BadFile

GARBAGE = {kind: WRONG[kind] for kind in ANY_FILE}
SHARED = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, root: str, data: dict[str, tuple[Any, Any]]) -> None:
    """A .csd file by hand: key -> intervals, features."""
    with h5py.File(path, "w") as file:
        for key, (times, features) in data.items():
            times = np.asarray(times, np.float64)
            file[f"{root}/data/{key}/intervals"] = times if times.size else times.reshape(-1, 2)
            file[f"{root}/data/{key}/features"] = features
        file.create_dataset(f"{root}/metadata/root name", data=json.dumps(root).encode())


def corpus(folder: Path, **parts: dict[str, tuple[Any, Any]]) -> Path:
    """A folder with the parts given and a label file for video ``v`` with segments 0-1, 1-3."""
    folder.mkdir(exist_ok=True)
    labels = parts.pop("labels", {"v": ([[0, 1], [1, 3]], [[1.5], [-2.0]])})
    write(folder / "labels.csd", "Opinion Labels", labels)
    for name, data in parts.items():
        write(folder / f"{name}.csd", name, data)
    folds = {"train": ["v"], "valid": [], "test": ["w"] if "w" in labels else []}
    (folder / "folds.json").write_text(json.dumps(folds))
    return folder


@SHARED
@given(
    oddities=st.sets(st.sampled_from(sorted(CSD_ODDITIES))),
    rows=st.integers(1, 30),
    segments=st.integers(1, 5),
    aligned=st.booleans(),
    emotions=st.booleans(),
    seed=st.integers(0, 9),
)
def test_generated_folders_come_back_as_the_reference_says(
    tmp_path_factory: pytest.TempPathFactory,
    oddities: set[str],
    rows: int,
    segments: int,
    aligned: bool,
    emotions: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("csd")
    options: dict[str, Any] = {"rows": rows, "segments": segments, "seed": seed}
    options |= {"oddities": oddities, "emotions": emotions, "widths": {"v": 6, "a": 5}}
    folds = write_csd_layout(folder / "c", videos=4, aligned=aligned, **options)
    plain = folder / "c"
    if aligned:  # the reference reads the same corpus before its alignment
        plain = folder / "plain"
        write_csd_layout(plain, videos=4, **options)
    store = open_store(convert(folder / "c", folder / "s"))
    table = store.utterances
    assert len(table) == 4 * segments
    assert ("happy" in table) == emotions
    split_of = {video: split for split, videos in folds.items() for video in videos}
    assert table["standard"].tolist() == [split_of[v] for v in table["video"]]
    with h5py.File(next(plain.glob("*Labels.csd"))) as labels:
        spans = labels["Opinion Segment Labels/data"]
        for row, (video, clip) in enumerate(zip(table["video"], table["clip"], strict=True)):
            start, end = spans[video]["intervals"][int(clip)]
            assert table["y"][row] == spans[video]["features"][int(clip), 0]
            assert table["text"][row] == " ".join(words(plain, video, start, end))
            for m, name in (("v", "FACET_4.2"), ("a", "COVAREP")):
                expected = frames(plain, name, video, start, end, store.info.widths[m])
                np.testing.assert_array_equal(store.frames(m, row), expected)


def inside(group: Any, start: float, end: float) -> np.ndarray:
    """Rows whose midpoint is in [start, end), ordered by start: a loop, as one would say it."""
    times = group["intervals"][()]
    chosen = [i for i, (a, b) in enumerate(times) if start <= (a + b) / 2 < end]
    return np.array(sorted(chosen, key=lambda i: (times[i][0], times[i][1])), int)


def words(folder: Path, video: str, start: float, end: float) -> list[str]:
    with h5py.File(next(folder.glob("*words.csd"))) as file:
        group = file["words/data"][video]
        spoken = [group["features"][i, 0].decode() for i in inside(group, start, end)]
    return [w for w in spoken if w != "sp"]


def frames(folder: Path, name: str, video: str, start: float, end: float, width: int) -> np.ndarray:
    empty = np.zeros((1, width), np.float32)
    with h5py.File(next(folder.glob(f"*{name}.csd"))) as file:
        if video not in file[f"{name}/data"]:
            return empty
        group = file[f"{name}/data"][video]
        held = group["features"][()][inside(group, start, end)].astype(np.float32)
    return np.nan_to_num(held, nan=0.0) if len(held) else empty


def test_rows_are_cut_at_the_midpoint_and_sorted(tmp_path: Path) -> None:
    times = [[2.0, 2.4], [0.8, 1.4], [-0.2, 0.4], [0.7, 1.2], [2.8, 3.4], [0.5, 0.5]]
    facet = {"v": (times, np.arange(1.0, 7.0)[:, None])}
    spoken = {"v": (times, np.array([b"e", b"d", b"a", b"sp", b"z", "ö".encode()])[:, None])}
    folder = corpus(tmp_path / "c", FACET=facet, words=spoken)
    store = open_store(convert(folder, tmp_path / "s"))
    assert store.frames("v", 0).ravel().tolist() == [3, 6, 4]  # midpoints 0.1, 0.5, 0.95
    assert store.frames("v", 1).ravel().tolist() == [2, 1]  # 1.1, 2.2; 3.1 is outside
    assert store.utterances["text"].tolist() == ["a ö", "d e"]
    assert store.utterances["id"].tolist() == ["v$_$0", "v$_$1"]
    assert store.info.language == "en" and store.info.modalities == ("t", "v")


def test_oddities_are_counted(tmp_path: Path) -> None:
    nan = np.nan
    labels = {
        "v": ([[0, 1], [nan, 2], [3, 2], [4, 5]], np.array([[1.0], [1.0], [0.5], [nan]])),
        "w": ([[0, 1]], [[2.0]]),
        "x": ([[0, 1]], [[2.0]]),
    }
    facet = {"v": ([[0, 0.4], [nan, nan], [2.2, 2.4]], [[1.0, nan], [2, 2], [np.inf, -np.inf]])}
    folder = corpus(tmp_path / "c", labels=labels, FACET=facet)
    with pytest.warns(UserWarning, match="1 labelled videos in no split of standard, e.g. x"):
        store = open_store(convert(folder, tmp_path / "s"))
    assert store.utterances["id"].tolist() == ["v$_$0", "v$_$2", "w$_$0", "x$_$0"]
    assert store.utterances["standard"].tolist()[:3] == ["train", "train", "test"]
    assert store.utterances["standard"].isna().tolist()[3]
    assert store.frames("v", 0).tolist() == [[1, 0]]
    cleaned = {k: n for k, n in store.info.cleaned.items() if n}
    assert cleaned == {
        "segments without label or time": 2,
        "labelled videos in no split of standard": 1,
        "vision.video not in the file": 2,
        "vision.empty": 3,
        "vision.nan": 1,
        "vision.+inf": 1,
        "vision.-inf": 1,
    }
    with pytest.warns(UserWarning, match="in no split"):
        found = inspect_path(tmp_path / "c")
    assert "segments without label or time 2" in str(found)
    assert {p.name for p in tmp_path.iterdir()} == {"c", "s"}


@pytest.mark.parametrize(
    ("file", "root", "features", "role"),
    [
        ("a.csd", "COVAREP", np.zeros((1, 74)), "a"),
        ("CMU_MOSI_Visual_Facet_41.csd", "x", np.zeros((1, 47)), "v"),
        ("CMU_MOSEI_VisualOpenFace2.csd", "OpenFace_2", np.zeros((1, 713)), "v"),
        ("CMU_MOSEI_TimestampedWords.csd", "words", np.array([[b"a"]]), "words"),
        ("CMU_MOSEI_TimestampedPhones.csd", "phones", np.array([[b"a"]]), "unused"),
        ("CMU_MOSEI_TimestampedWordVectors.csd", "glove_vectors", np.zeros((1, 300)), "unused"),
        ("CMU_MOSEI_Labels.csd", "All Labels", np.zeros((1, 7)), "labels"),
        ("CMU_MOSI_Opinion_Labels.csd", "Opinion Segment Labels", np.zeros((1, 1)), "labels"),
        ("b.csd", "b", np.array([[b"w"]]), "words"),
        ("b.csd", "b", np.zeros((1, 74)), "a"),
        ("b.csd", "b", np.zeros((1, 35)), "v"),
        ("b.csd", "b", np.zeros((1, 1)), "labels"),
        ("b.csd", "b", np.zeros((1, 99)), "unused"),
    ],
)
def test_files_are_told_apart(
    tmp_path: Path, file: str, root: str, features: np.ndarray, role: str
) -> None:
    write(tmp_path / file, root, {"v": ([[0, 1]], features)})
    assert CsdFile(tmp_path / file).role() == role


def test_roles_and_folds_can_be_given(tmp_path: Path) -> None:
    rows = ([[0, 1], [1, 2]], [[1.0, 2.0], [3.0, 4.0]])
    folder = corpus(tmp_path / "c", FACET_41={"v": rows}, FACET_42={"v": rows}, mystery={"v": rows})
    with pytest.raises(BadFile, match=r"FACET_41.csd and FACET_42.csd both look like vision"):
        convert(folder, tmp_path / "s")
    roles = {"v": "FACET_42.csd", "a": "mystery.csd"}
    folds = {"standard": {"train": ["v"]}, "other": {"test": ["v"]}}
    store = open_store(convert(folder, tmp_path / "s", roles=roles, folds=folds))
    assert store.info.widths == {"v": 2, "a": 2} and store.folds == ("standard", "other")
    assert "FACET_42.csd" in store.info.notes["files"]
    assert "FACET_42.csd" in str(inspect_path(folder, roles=roles, folds=folds))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: (f / "folds.json").unlink(), {}, "folds.json is missing.*train"),
        (lambda f: (f / "folds.json").write_text("{"), {}, "folds.json is no JSON"),
        (lambda f: None, {"folds": {"train": ["v"], "test": ["v"]}}, "'v' is in train and in test"),
        (lambda f: None, {"folds": {"train": ["q"]}}, "none of its videos is labelled"),
        (lambda f: None, {"folds": {"train": ["v"], "dev": []}}, "lists under train, valid, test"),
        (lambda f: None, {"folds": {}}, "splits with lists of video ids"),
        (lambda f: None, {"folds": "nowhere.json"}, "nowhere.json is missing"),
        (lambda f: None, {"roles": {"v": "nowhere.csd"}}, "'nowhere.csd'"),
        (lambda f: None, {"roles": {"vision": "labels.csd"}}, "'vision'.*under the keys labels, v"),
        (lambda f: (f / "labels.csd").unlink(), {}, "no .csd file with labels"),
        (lambda f: (f / "z.csd").write_bytes(b"x"), {}, "z.csd is no readable HDF5 file"),
        (lambda f: h5py.File(f / "z.csd", "w").close(), {}, "z.csd is an HDF5 file, but no .csd"),
        (lambda f: write(f / "z.csd", "FACET", {"v": ([[0, 1]], np.ones((2, 3)))}), {},
         "z.csd: v has 2 rows and 1 intervals"),
        (lambda f: write(f / "labels.csd", "labels", {"v": ([[0, 1]] * 2, np.ones((1, 1)))}), {},
         "labels.csd: v has 1 rows and 2 intervals"),
        (lambda f: write(f / "labels.csd", "labels", {"v": ([[0, 1, 2]] * 3, np.ones((3, 1)))}), {},
         "labels.csd: v: intervals are no pairs"),
        (lambda f: write(f / "labels.csd", "labels", {"v": ([[0, 1]], np.ones((1, 1))),
         "w": ([[0, 1]], np.array([[b"x"]]))}), {}, "labels.csd: w: labels are no numbers"),
        (lambda f: write(f / "words.csd", "words", {"v": ([[0, 1]], np.ones((1, 300)))}), {},
         "words.csd holds numbers, not words"),
        (lambda f: None, {"folds": {"train": ["v"], "test": ["V"]}}, "test: none of its videos is"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: Any, options: dict[str, Any], message: str
) -> None:
    folder = corpus(tmp_path / "c", words={"v": ([[0, 1]], np.array([[b"a"]]))})
    change(folder)
    with pytest.raises(BadFile, match=message):
        convert(folder, tmp_path / "s", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        ({"train": 5}, "a list of video ids is needed"),
        ({"train": "v"}, "a list of video ids is needed"),
        ({"train": [], "valid": [], "test": []}, "no video is named"),
        ({"mine": 3}, "lists under train, valid, test are needed, not 3"),
        ({"y": {"train": ["v"]}}, "taken or empty"),
        ({"happy": {"train": ["v"]}}, "taken or empty"),
        ({" ": {"train": ["v"]}}, "taken or empty"),
    ],
)
def test_folds_are_lists_of_videos_under_a_free_name(
    tmp_path: Path, folds: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadFile, match=words):
        convert(corpus(tmp_path / "raw"), tmp_path / "store", folds=folds)


@pytest.mark.parametrize("labels", [np.zeros((2, 0)), np.float64(1.0)])
def test_labels_without_numbers_are_named(tmp_path: Path, labels: Any) -> None:
    folder = corpus(tmp_path / "raw", labels={"v": ([[0, 1], [1, 3]], labels)})
    with pytest.raises(BadFile, match=r"labels.csd: .*(numbers are needed|holds no rows)"):
        convert(folder, tmp_path / "store")


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_in_the_place_of_a_file_is_named(tmp_path: Path, kind: str) -> None:
    make, what, way_out = GARBAGE[kind]
    folder = corpus(tmp_path / "c")
    make(folder / "FACET.csd")
    for read in (inspect_path, lambda source: convert(source, tmp_path / "s")):
        with pytest.raises(BadFile, match=f"FACET.csd is {what}.*{way_out}"):
            read(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_videos_that_folds_name_in_vain_are_counted(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "c")
    with pytest.warns(UserWarning, match="2 videos of standard that are not labelled, e.g. X"):
        store = open_store(convert(folder, tmp_path / "s", folds={"train": ["v", "w", "X"]}))
    assert store.info.cleaned["videos of standard that are not labelled"] == 2


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_csd_layout(tmp_path / "c")
    part = next((tmp_path / "c").glob("*COVAREP*"))
    part.write_bytes(part.read_bytes()[:9000])
    with pytest.raises(BadFile, match="COVAREP.csd is a truncated HDF5 file: get it again"):
        convert(tmp_path / "c", tmp_path / "s")
    assert not (tmp_path / "s").exists()
