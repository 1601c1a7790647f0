"""Corpora: fetched with checksums, read as documented, counted; what goes wrong is explained."""

import dataclasses
import functools
import http.server
import multiprocessing
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pooch
import pytest
import requests
from layouts import write_synthetic

from conki_lib.config import ROOT
from conki_lib.data import corpora, open_corpora
from conki_lib.data.corpora import CORPORA, fetch, status
from conki_lib.data.store import FETCHABLE, open_store
from conki_lib.disk import corpus_path, data_root
from conki_lib.records import runs_dir


@pytest.fixture(scope="module")
def root(shared_mirror, tmp_path_factory):
    """One data root for the module, fed from the mirror."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONKI_MIRROR", str(shared_mirror))
        yield tmp_path_factory.mktemp("data")


@pytest.fixture
def meld_mirror(shared_mirror, tmp_path, monkeypatch):
    """A mirror of its own with MELD's three files, to be spoilt."""
    mirror = tmp_path / "mirror"
    for file in CORPORA["meld-text"].files:
        (mirror / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(shared_mirror / file, mirror / file)
    monkeypatch.setenv("CONKI_MIRROR", str(mirror))
    return mirror


def test_folders_named_relatively_are_of_the_project(monkeypatch):
    monkeypatch.setenv("CONKI_DATA", "mine")
    monkeypatch.setenv("CONKI_RUNS", "ours")
    assert data_root() == ROOT / "mine" and runs_dir("synthetic") == ROOT / "ours" / "synthetic"
    with pytest.raises(ValueError, match="put its YAML into configs"):
        runs_dir("/elsewhere/mine")


# --- fetching --------------------------------------------------------------------------------


def test_names_agree():
    assert set(FETCHABLE) == {n for n, c in CORPORA.items() if c.kind != "user"}
    pinned = {
        line.split()[0]
        for line in corpora.REGISTRY.read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert pinned == {file for corpus in CORPORA.values() for file in corpus.files}


def test_fetch_leaves_a_store_of_another_alone(tmp_path: Path) -> None:
    other = write_synthetic(tmp_path / "synthetic", sizes=(4, 2, 2))
    before = (other / "info.json").read_bytes()
    with pytest.raises(FileExistsError, match="did not make: move it"):
        corpora.fetch("synthetic", tmp_path)
    assert (other / "info.json").read_bytes() == before


def test_the_readme_lists_every_corpus_and_checksum():
    readme = (corpora.REGISTRY.parent / "README.md").read_text(encoding="utf-8")
    for name, corpus in CORPORA.items():
        counts = " / ".join(map(str, corpus.counts))
        assert f"| `{name}` | {counts} |" in readme
    for line in corpora.REGISTRY.read_text().splitlines():
        if not line.startswith("#"):
            assert line.split("sha256:")[1] in readme


def test_roots(monkeypatch, tmp_path):
    monkeypatch.setenv("CONKI_DATA", str(tmp_path / "elsewhere"))
    assert corpus_path("mosi") == tmp_path / "elsewhere" / "mosi"
    assert corpus_path("mosi", tmp_path) == tmp_path / "mosi"
    monkeypatch.delenv("CONKI_DATA")
    assert data_root().name == "data"


def test_fetch_is_idempotent_and_cleans_nothing_twice(root):
    path = fetch("mmmo-open", root)
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    assert fetch("mmmo-open", root) == path
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before
    assert set(before) == {"features.safetensors", "utterances.parquet", "info.json"}


def test_a_changed_recipe_builds_anew(root, monkeypatch):
    path = fetch("mmmo-open", root)
    changed = dataclasses.replace(CORPORA["mmmo-open"], recipe=99)
    monkeypatch.setitem(CORPORA, "mmmo-open", changed)
    before = (path / "info.json").stat().st_mtime_ns
    fetch("mmmo-open", root)
    assert (path / "info.json").stat().st_mtime_ns > before
    assert open_store(path).info.notes["recipe"] == "99"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "synthetic").mkdir()
    assert open_store(fetch("synthetic", tmp_path)).info.counts


def test_sources_are_recorded_with_their_checksums(root):
    info = open_store(fetch("mmmo-open", root)).info
    assert [s["file"] for s in info.sources] == list(CORPORA["mmmo-open"].files)
    registry = pooch.create("unused", "unused")
    registry.load_registry(corpora.REGISTRY)
    for source in info.sources:
        assert registry.registry[source["file"]] == f"sha256:{source['sha256']}"


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown corpus 'mosi-opne'; did you mean 'mosi-open'"):
        fetch("mosi-opne")


@pytest.mark.parametrize("name", ["mosi", "mosei", "sims"])
def test_corpora_the_user_must_bring(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        fetch(name, tmp_path)
    for word in (str(tmp_path / name), "Processed/", ".pkl", "conki convert", "MMSA"):
        assert word in str(caught.value)
    assert not (tmp_path / name).exists()


def test_wrong_checksum(meld_mirror, tmp_path):
    victim = meld_mirror / CORPORA["meld-text"].files[1]
    victim.write_bytes(victim.read_bytes().replace(b"Phoebe", b"Phebbe", 1))
    with pytest.raises(ValueError, match="dev_sent_emo.csv.*not the pinned checksum.*CONKI_MIRROR"):
        fetch("meld-text", tmp_path / "data")
    assert not corpus_path("meld-text", tmp_path / "data").exists()
    assert not list((tmp_path / "data").rglob("dev_sent_emo.csv"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
    ],
)
def test_pages_and_pointers_are_recognised(meld_mirror, tmp_path, content, words):
    (meld_mirror / CORPORA["meld-text"].files[0]).write_bytes(content)
    with pytest.raises(ValueError, match=f"train_sent_emo.csv.*{words}"):
        fetch("meld-text", tmp_path / "data")


def test_mirror_without_the_file(meld_mirror, tmp_path):
    (meld_mirror / CORPORA["meld-text"].files[2]).unlink()
    with pytest.raises(FileNotFoundError, match="CONKI_MIRROR has no .*test_sent_emo.csv.*unset"):
        fetch("meld-text", tmp_path / "data")


def test_no_network(tmp_path, monkeypatch):
    asked = []

    def offline(self, url, output, registry):
        asked.append(url)
        raise requests.exceptions.ConnectionError("Name or service not known")

    monkeypatch.delenv("CONKI_MIRROR", raising=False)
    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", offline)
    monkeypatch.setattr(pooch.core.time, "sleep", lambda _: None)
    with pytest.raises(ConnectionError, match="train_sent_emo.csv.*network.*CONKI_MIRROR"):
        fetch("meld-text", tmp_path)
    assert asked[0] == corpora.HOST + CORPORA["meld-text"].files[0]
    assert not corpus_path("meld-text", tmp_path).exists()


@pytest.fixture
def host(shared_mirror, monkeypatch):
    """The public host, played by a local server that serves the mirror."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(shared_mirror))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.delenv("CONKI_MIRROR", raising=False)
        monkeypatch.setattr(corpora, "HOST", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(pooch.core.time, "sleep", lambda _: None)
        yield server
        server.shutdown()
        thread.join()


def test_download_over_http(host, tmp_path):
    store = open_store(fetch("mmmo-open", tmp_path))
    assert store.info.counts["standard"]["train"] == 220
    host.shutdown()
    shutil.rmtree(store.path)
    fetch("mmmo-open", tmp_path)  # from the downloads, no network needed


def test_file_gone_from_the_host(host, tmp_path, monkeypatch):
    gone = dataclasses.replace(CORPORA["meld-text"], files=("nowhere/x.csv",))
    monkeypatch.setitem(CORPORA, "meld-text", gone)
    registry = tmp_path / "registry.txt"
    registry.write_text("nowhere/x.csv sha256:" + "0" * 64)
    monkeypatch.setattr(corpora, "REGISTRY", registry)
    with pytest.raises(ConnectionError, match="nowhere/x.csv.*404.*CONKI_MIRROR"):
        fetch("meld-text", tmp_path / "data")


def test_two_processes_may_fetch_the_same_corpus(shared_mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("CONKI_MIRROR", str(shared_mirror))
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=fetch, args=("mmmo-open", tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(open_store(tmp_path / "mmmo-open")["train"]) == 220


def test_status(root):
    fetch("mmmo-open", root)
    (root / "sims").mkdir(exist_ok=True)
    (root / "sims" / "info.json").write_text("{}")
    rows = {row["corpus"]: row for row in status(root)}
    assert set(rows) == set(CORPORA)
    assert rows["mmmo-open"]["state"] == "present" and rows["mmmo-open"]["counts"] == (220, 40, 80)
    assert rows["mosei"]["state"] == "missing" and "conki convert" in rows["mosei"]["how"]
    assert rows["pom-open"]["how"] == "run `conki fetch pom-open`" or (
        rows["pom-open"]["state"] == "present"
    )
    assert rows["sims"]["state"] == "damaged" and "missing" in rows["sims"]["how"]
    shutil.rmtree(root / "sims")


# --- mosi-open -------------------------------------------------------------------------------


def test_python2_dict_order_of_the_documented_case():
    keys = [str(k) for k in range(1, 14)]
    assert " ".join(open_corpora.python2_dict_order(keys)) == "11 10 13 12 1 3 2 5 4 7 6 9 8"
    assert open_corpora.python2_dict_order([]) == []
    assert open_corpora._python2_hash("") == 0
    many = [str(k) for k in range(100)]
    assert sorted(open_corpora.python2_dict_order([*many, *many]), key=int) == many


@pytest.fixture(scope="module")
def mosi(root):
    return fetch("mosi-open", root)


def test_mosi_open_standard_fold(mosi):
    store = open_store(mosi)
    assert store.info.counts["standard"] == {"train": 1284, "valid": 229, "test": 686}
    assert store.info.widths == {"v": 100, "a": 73} and store.info.modalities == ("t", "v", "a")
    assert "contaminated" in store.info.notes["vision"]
    table = store.utterances
    assert ((table["y"] >= 0) == (table["y_binary"] == 1)).sum() == 2199
    heads = {"train": ("03bSnISJMiM", "11 10 13 12 1"), "valid": ("WKA5OygbEKI", "20 21 22")}
    heads["test"] = ("c7UH_rxdZv4", "24 25 26 27")
    for split, (video, clips) in heads.items():
        head = store[split].table.head(len(clips.split()))
        assert set(head["video"]) == {video} and " ".join(head["clip"]) == clips
    np.testing.assert_allclose(store["train"].y[:5], [-0.5, -1.2, 1.8, 2.2, 2.4], rtol=1e-6)
    assert store["train"][0].text == "A LOT OF SAD PARTS"
    assert table.groupby("video")["standard"].nunique().max() == 1


def test_mosi_open_features_are_those_of_their_utterance(mosi, shared_mirror):
    """Read back one row of each file by hand; a shifted row would not be noticed otherwise."""
    folder = shared_mirror / open_corpora.BC_LSTM / "bc-LSTM/data"
    lines = (folder / "transcripts.csv").read_text(encoding="utf-8").splitlines()
    ids = [line.split(",")[0].strip('"') for line in lines]
    store = open_store(mosi)
    rows = {identity: i for i, identity in enumerate(store.utterances["id"])}
    for part, line in (("train", 700), ("test", 751)):
        number = (folder / f"text_{part}.csv").read_text().splitlines()[line].split(",")[0]
        row = rows["$_$".join(ids[int(number.strip('"'))].rsplit("_", 1))]
        for m, kind in (("a", "audio"), ("v", "video")):
            text = (folder / f"{kind}/{kind}_{part}0.csv").read_text().splitlines()[line]
            values = [float(x.strip('"')) for x in text.split(",")]
            np.testing.assert_allclose(store.frames(m, row)[0], values[:-1], rtol=1e-6)
            assert store.utterances["y_binary"][row] == values[-1]


def test_mosi_open_fold_of_the_feature_authors(mosi):
    store = open_store(mosi, "speakers62")
    table = store.utterances
    counts = store.info.counts["speakers62"]
    assert counts["test"] == 752 and counts["train"] + counts["valid"] == 1447
    assert (table["extractor_saw"] == (table["speakers62"] != "test")).all()
    assert table.groupby("video")["speakers62"].nunique().max() == 1
    videos = table.groupby("speakers62")["video"].nunique()
    assert videos["test"] == 31 and videos["valid"] == 10 and videos["train"] == 52
    seen = table[table["extractor_saw"]].groupby("standard")["video"].nunique()
    assert seen["test"] == 24 and seen["valid"] == 9


def test_mosi_open_vision_knows_labels_of_videos_its_extractor_saw(mosi):
    from sklearn.linear_model import Ridge

    store = open_store(mosi)

    def x_of(rows):
        return np.concatenate([store.frames("v", int(row)) for row in rows])

    fitted = np.concatenate([store["train"].rows, store["valid"].rows])
    y = store.utterances["y"].to_numpy()
    ridge = Ridge(100).fit(x_of(fitted), y[fitted])
    test = store["test"].table
    right = (ridge.predict(x_of(store["test"].rows)) > 0) == (test["y"] > 0)
    by_seen = right[test["y"] != 0].groupby(test["extractor_saw"]).mean()
    assert by_seen[True] > 0.85 and by_seen[False] < 0.6


def test_labels_that_do_not_meet_their_transcripts_stop_the_build(root, monkeypatch):
    fetch("mosi-open", root)
    files = {file: root / "downloads" / file for file in CORPORA["mosi-open"].files}
    monkeypatch.setattr(open_corpora, "python2_dict_order", lambda keys: list(keys))
    with pytest.raises(ValueError, match="labels agree in sign"):
        open_corpora.read_mosi_open(files)


# --- the others ------------------------------------------------------------------------------


def test_meld_text(root):
    store = open_store(fetch("meld-text", root))
    assert store.info.counts["standard"] == {"train": 9989, "valid": 1109, "test": 2610}
    assert store.info.modalities == ("t",) and store.info.widths == {}
    assert Counter(store["train"].y.tolist()) == {0.0: 4710, -1.5: 2945, 1.5: 2334}
    text = store.utterances["text"]
    assert not text.str.contains("[\u2018\u2019\u201c\u201d\x80-\x9f]").any()
    assert text.str.contains("I've got some bad news").any()
    assert store.info.cleaned == {"text.mis-decoded": 13, "text.typographic": 5095}
    assert store["train"][0].text.startswith("also I was the point person on my company's")


def test_meld_labels_are_a_setting(root):
    fetch("meld-text", root)
    files = {file: root / "downloads" / file for file in CORPORA["meld-text"].files}
    labels = {"negative": -1.0, "neutral": 0.0, "positive": 1.0}
    assert set(open_corpora.read_meld_text(files, labels).utterances["y"]) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(
    ("broken", "mended", "kind"),
    [
        ("don\u2019t", "don't", "typographic"),
        ("don\x92t", "don't", "typographic"),
        ("don\u00e2\u20ac\u2122t", "don't", "mis-decoded"),
        ("I?ve", "I've", "mis-decoded"),
        ("Nestl\u00e9", "Nestl\u00e9", None),
        ("What?so", "What?so", None),
        ("You? Me?", "You? Me?", None),
    ],
)
def test_repair(broken, mended, kind):
    counts = Counter()
    assert open_corpora.repair(broken, counts) == mended
    assert (f"text.{kind}" in +counts) == (kind is not None)


@pytest.mark.parametrize(
    ("name", "counts", "widths", "labels"),
    [
        ("mmmo-open", (220, 40, 80), {"v": 36, "a": 74}, {-3.0, -1.5, 0.0, 1.5, 3.0}),
        ("pom-open", (600, 100, 203), {"v": 41, "a": 43}, {-3.0, 0.0, 3.0}),
    ],
)
def test_reviews(root, shared_mirror, name, counts, widths, labels):
    store = open_store(fetch(name, root))
    assert tuple(store.info.counts["standard"].values()) == counts
    assert store.info.widths == widths and store.info.modalities == ("v", "a")
    assert labels <= set(store.utterances["y"]) and store.utterances["y"].abs().max() == 3
    empty = 0
    for split in store.splits:
        for utterance in store[split]:
            for x in utterance.inputs.values():
                silent = len(x) == 1 and not x.any()
                assert silent or (x[0].any() and x[-1].any())
                empty += silent
    assert empty == {"mmmo-open": 0, "pom-open": 322 + 48 + 116}[name]
    assert store.info.cleaned.get("vision.empty", 0) == empty
    kept = sum(int(store._offsets[m][-1]) for m in "va") - empty
    padding = sum(store.info.cleaned[f"{m}.padding steps"] for m in ("vision", "audio"))
    assert kept + padding == 2 * 20 * sum(counts)


def test_label_maps():
    np.testing.assert_array_equal(
        open_corpora.mmmo_label(np.array([1.0, 2.5, 3.0, 5.0])), [-3, -0.75, 0, 3]
    )
    traits = np.zeros((3, 17))
    traits[:, 14] = [1, 4, 7]
    np.testing.assert_array_equal(open_corpora.pom_label(traits), [-3, 0, 3])


def test_trim_keeps_zero_steps_inside():
    steps = np.array([[0.0], [1], [0], [2], [0], [0]])
    np.testing.assert_array_equal(open_corpora.trim(steps), [[1], [0], [2]])
    assert open_corpora.trim(np.zeros((4, 2))).shape == (0, 2)


def test_the_leak_is_told_with_the_measured_numbers():
    root = Path(__file__).resolve().parents[1]
    probes = pd.read_csv(root / "results" / "mosi-open" / "input_probes.csv")
    vision = probes[probes["modality"] == "v"].set_index("group")["acc2_non0"]
    told = (root / "data" / "README.md").read_text(encoding="utf-8").split("know the labels")[1]
    told = " ".join(told.split("| file")[0].replace("\n>", " ").split())
    for group in ("videos the extractor saw", "videos it did not see"):
        assert f"{100 * vision[group]:.1f} %" in told
