"""Full and read-only disks: clear errors, nothing complete is lost, and the run goes on after."""

import errno
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest

from conki_lib import fitting, pipeline, records, states, training
from conki_lib import notebook as runner
from conki_lib.data import corpora, open_store
from conki_lib.disk import DiskError, disk_problem, explained


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """A function that mounts a small disk in memory: ``disk("1m")``; a skip where it cannot."""
    mounted: list[Path] = []

    def mount(size: str = "8m") -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("this system has no `mount`")
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(folder: Path) -> Path:
    """Leave no space in a folder's disk; remove the file to free it again."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return path


def read_only(folder: Path) -> None:
    """Make a small disk read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


# ---- a full disk --------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["_save_weights", "_checkpoint"])
def test_no_space_for_a_checkpoint(world, disk, monkeypatch, at):
    config = world.replace(external=None)
    whole = training.fine_tune(config)
    small, real, calls = disk(), getattr(fitting, at), []

    def fills_the_disk_in_epoch_2(*given):
        calls.append(1)
        if len(calls) == 2:
            fill(small)
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setenv("CONKI_RUNS", str(small))
        patch.setattr(fitting, at, fills_the_disk_in_epoch_2)
        with pytest.raises(DiskError, match=rf"no space left.*{small}.*free some.*CONKI_RUNS"):
            training.fine_tune(config)
    (folder,) = (small / "tiny").glob("full-*/")
    done = len(list(folder.glob("checkpoint-*/history.json")))
    assert done == 1 and (folder / "model.safetensors").is_file()
    (small / "filler").unlink()
    monkeypatch.setenv("CONKI_RUNS", str(small))
    assert training.fine_tune(config) == whole
    assert not list(folder.glob("*checkpoint*")) and not list(folder.glob(".*"))


def test_no_space_for_the_cache_of_states(world, disk, monkeypatch):
    whole = training.inject_knowledge(world)
    small = disk()
    monkeypatch.setenv("CONKI_RUNS", str(small))
    real = states.States

    def fills_the_disk_after_the_first_modality(folder):
        opened = real(folder)
        if not (small / "filler").exists():
            fill(small)
        return opened

    plenty = type("Usage", (), {"free": 1 << 40})  # as if it were filled after the look at it
    with monkeypatch.context() as patch:
        patch.setattr(states, "States", fills_the_disk_after_the_first_modality)
        patch.setattr(states.shutil, "disk_usage", lambda path: plenty)
        with pytest.raises(DiskError, match=rf"no space left.*{small}.*free some"):
            training.inject_knowledge(world)
    kept = [p.parent for p in small.glob("cache/*/states.json")]
    assert len(kept) == 1 and not list(small.glob("cache/.*"))
    written = (kept[0] / "pan.npy").stat().st_mtime_ns
    (small / "filler").unlink()
    assert training.inject_knowledge(world) == whole
    assert (kept[0] / "pan.npy").stat().st_mtime_ns == written  # not computed anew


def test_no_space_for_a_store(disk, make_tiny_store, tmp_path):
    small = disk("1m")
    whole = make_tiny_store("toy", sizes=(100, 10, 10))
    earlier = make_tiny_store(f"{small.name}/earlier")
    before = open_store(earlier).fingerprint
    fill(small)
    with pytest.raises(DiskError, match=rf"no space left.*{small}.*free some.*CONKI_DATA"):
        make_tiny_store(f"{small.name}/toy", sizes=(100, 10, 10))
    assert sorted(p.name for p in small.iterdir()) == ["earlier", "filler"]
    assert open_store(earlier).fingerprint == before
    (small / "filler").unlink()
    again = open_store(make_tiny_store(f"{small.name}/toy", sizes=(100, 10, 10)))
    np.testing.assert_array_equal(again.frames("v", 3), open_store(whole).frames("v", 3))


def test_no_space_for_a_fetched_corpus(disk, monkeypatch):
    small = disk("64k")
    fill(small)
    with pytest.raises(DiskError, match=rf"no space left.*{small}.*CONKI_DATA"):
        corpora.fetch("synthetic", small)
    assert not [p for p in small.iterdir() if p.is_dir()]


def test_no_space_for_records_leaves_the_earlier_ones(disk):
    small = disk("1m")
    path = records.write_text(small / "records.jsonl", "one\n")
    fill(small)
    with pytest.raises(DiskError, match=rf"no space left for records.jsonl in {small}: .*free"):
        records.write_text(path, "two\n" * 10000)
    assert path.read_text() == "one\n"
    assert sorted(p.name for p in small.iterdir()) == ["filler", "records.jsonl"]


# ---- a read-only folder -------------------------------------------------------------------------


def test_a_read_only_data_folder_serves_what_is_complete(world, disk, monkeypatch, tmp_path):
    whole = training.fine_tune(world)
    data = disk()
    for name in ("toy", "far"):
        subprocess.run(["cp", "-r", str(tmp_path / name), str(data / name)], check=True)
    read_only(data)
    monkeypatch.setenv("CONKI_DATA", str(data))
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "others"))
    assert training.fine_tune(world) == whole


def test_a_read_only_data_folder_refuses_what_is_new(disk, make_tiny_store, monkeypatch):
    data = disk()
    monkeypatch.setitem(corpora.CORPORA, "toy", corpora.Corpus(
        "toy", "a toy", "embedded", ("t", "v", "a"), (8, 4, 4), "MIT"))  # fmt: skip
    path = make_tiny_store(f"{data.name}/toy")
    info = json.loads((path / "info.json").read_text())
    (path / "info.json").write_text(json.dumps(info | {"notes": {"recipe": "1"}}))
    read_only(data)
    assert corpora.fetch("toy", data) == path  # complete: nothing to write
    for name in ("synthetic", "mosi-open"):
        with pytest.raises(DiskError, match=rf"read-only.*{name}.*{data}.*CONKI_DATA"):
            corpora.fetch(name, data)
    with pytest.raises(DiskError, match=rf"read-only.*'new'.*{data}.*another folder"):
        make_tiny_store(f"{data.name}/new")


def test_a_read_only_folder_of_runs_is_named(disk, monkeypatch):
    runs = disk()
    read_only(runs)
    monkeypatch.setenv("CONKI_RUNS", str(runs))
    with pytest.raises(DiskError, match=rf"read-only.*{runs}.*CONKI_RUNS"):
        pipeline.lock("p")


def test_no_space_while_a_notebook_is_executed(disk, monkeypatch, tmp_path):
    small, notebook = disk(), tmp_path / "01_toy.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), notebook)
    monkeypatch.setenv("CONKI_RUNS", str(small))

    def fills_the_disk(source, target, **_):
        fill(small)
        Path(target).write_bytes(bytes(1 << 20))

    with monkeypatch.context() as patch:
        patch.setattr(papermill, "execute_notebook", fills_the_disk)
        with pytest.raises(DiskError, match=rf"no space left for 01_toy.*{small}.*CONKI_RUNS"):
            runner.run_notebook(notebook)
    (small / "filler").unlink()

    def fills_the_disk_at_last(source, target, **_):
        shutil.copyfile(source, target)
        fill(small)

    with monkeypatch.context() as patch:
        patch.setattr(papermill, "execute_notebook", fills_the_disk_at_last)
        with pytest.raises(DiskError, match=rf"no space left.*it is kept as {small}.*failed"):
            runner.run_notebook(notebook)


# ---- the explanation ----------------------------------------------------------------------------


def test_errors_that_the_disk_did_not_cause_pass_unchanged(tmp_path):
    errors = (ValueError("no number"), OSError(errno.EIO, "broken"), KeyError("x"))
    denied = PermissionError(errno.EACCES, "denied", "/mirror/a.csv")  # to read another file
    for error in (*errors, denied):
        with pytest.raises(type(error)) as found, explained("x", tmp_path, "nothing"):
            raise error
        assert found.value is error
    assert not list(tmp_path.iterdir())


def test_errors_without_a_number_are_explained_by_the_disk(disk):
    small = disk("64k")
    assert disk_problem(small / "not/yet") is None
    fill(small)
    assert disk_problem(small / "not/yet") == errno.ENOSPC
    full_elsewhere = OSError(errno.ENOSPC, "no space", str(small / "of another disk"))
    with pytest.raises(OSError) as found, explained("x", small.parent / "plenty", "nothing"):
        raise full_elsewhere
    assert found.value is full_elsewhere
    with pytest.raises(DiskError, match="no space left for x in .*: do this") as found:
        with explained("a whole", small, "that"), explained("x", small, "do this"):
            raise RuntimeError("unexpected pos 576 vs 534")
    assert found.value.errno == errno.ENOSPC
    assert isinstance(found.value.__cause__, RuntimeError)
