"""The pipeline: what counts as finished, one at a time, and the plan that the Snakefile makes."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from conki_lib import anew, pipeline, records, training
from conki_lib import config as settings
from conki_lib.config import RunConfig
from conki_lib.data import fetch
from conki_lib.disk import DiskError

ROOT = Path(__file__).resolve().parents[1]


def home(place: Path) -> Path:
    """A project with links to this one's files: locks in its results disturb nobody."""
    (place / "results").mkdir(parents=True)
    for name in ("configs", "notebooks", "docs", "conki_lib", "Snakefile", "profiles"):
        (place / name).symlink_to(ROOT / name)
    for path in (ROOT / "results").iterdir():
        if path.is_dir() or path.name == "equal_code.json":
            (place / "results" / path.name).symlink_to(path)
    return place


@pytest.fixture(autouse=True)
def apart(tmp_path_factory, monkeypatch):
    """Every pipeline of these tests works in a project of its own."""
    place = home(tmp_path_factory.mktemp("home") / "project")
    monkeypatch.setenv("CONKI_HOME", str(place))
    monkeypatch.setattr(records, "ROOT", place)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [0, 1, 2]), ("0,4,7", [0, 4, 7]), ("7,", [7]), ("2-4", [2, 3, 4])],
)
def test_seeds(text, seeds):
    assert pipeline.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["many", "1.5", "0;1", "a-b", "0", "5-2", ",", "-1,2"])
def test_seeds_that_are_none(text):
    with pytest.raises(ValueError, match="write a count"):
        pipeline.parse_seeds(text)


@pytest.mark.parametrize("text", ["20261128", "1-99999999999999999999", "9" * 30])
def test_seeds_by_the_million_are_a_slip(text):
    with pytest.raises(ValueError, match="1000 seeds; one alone is written with a comma: 7,"):
        pipeline.parse_seeds(text)


def test_rows():
    assert pipeline.parse_rows("full, w/o C4", "synthetic") == ["full", "w/o C4"]
    everything = pipeline.parse_rows("all", "mosi-open")
    assert {"full", "w/o N1", "text-only"} <= set(everything) and "v" not in everything
    assert "ta" not in everything  # is full there
    assert "padding=released" in pipeline.parse_rows("switches", "synthetic")
    assert not set(pipeline.parse_rows("switches", "mmmo-open")) & set(everything)
    assert pipeline.parse_rows("", "synthetic") == ["full", "w/o C4"]
    assert pipeline.parse_rows("", "mosi-open") == ["full", "w/o C4", "text-only"]
    with pytest.raises(ValueError, match=r"'w/o C5'.*did you mean"):
        pipeline.parse_rows("full,w/o C5", "synthetic")
    with pytest.raises(ValueError, match="the profile has no v"):
        pipeline.parse_rows("v", "mosi-open")


def test_finished_is_what_training_would_load(world, monkeypatch):
    assert not pipeline.is_finished(world, 1)
    record = training.fine_tune(world)
    assert not pipeline.is_finished(world.replace(target="nowhere"), 2)  # no data yet
    assert not pipeline.is_finished(world.replace(text_backbone="./nowhere"), 2)
    assert pipeline.is_finished(world, 1) and pipeline.is_finished(world, 2)
    assert not pipeline.is_finished(world.replace(lam=0.5), 2)
    (record.folder / "record.json").unlink()
    assert not pipeline.is_finished(world, 2)  # interrupted


def test_a_store_of_an_older_recipe_is_not_fetched_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("CONKI_DATA", str(tmp_path))
    assert not pipeline.is_fetched("synthetic")
    path = fetch("synthetic")
    assert pipeline.is_fetched("synthetic")
    info = json.loads((path / "info.json").read_text())
    info["notes"]["recipe"] = "0"
    (path / "info.json").write_text(json.dumps(info))
    assert not pipeline.is_fetched("synthetic")
    path.rename(tmp_path / "mine")  # what no recipe makes is as its owner brought it
    assert pipeline.is_fetched("mine") and not pipeline.is_fetched("mosi")


def test_a_damaged_notebook_is_named(toy_project):
    (toy_project / "notebooks/01_toy.ipynb").write_text("<<<<<<< HEAD\n{}")
    with pytest.raises(ValueError, match="01_toy.ipynb is no notebook .*restore it by git"):
        pipeline.state("p")


def test_folds_are_checked_where_the_corpus_is_here(world, monkeypatch):
    monkeypatch.setattr(pipeline.RunConfig, "from_profile", lambda profile: world)
    assert pipeline.parse_folds("", "tiny") == pipeline.parse_folds("standard,", "tiny")
    with pytest.raises(ValueError, match="nosuch"):
        pipeline.parse_folds("standard,nosuch", "tiny")


def test_committed_is_what_a_record_by_todays_code_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    config = RunConfig(profile="p", target="toy", external=None, modalities="va")

    def commit(code: str) -> None:
        record = records.Record(
            stage=2, profile="p", variant="full", fold="standard", seed=0, key="k",
            config_key=records.config_key(config, 2), settings=config.flat(), data={}, code=code,
            metrics={}, best_epoch=1, history=[],
        )  # fmt: skip
        path = records.results_dir("p") / "records.jsonl"
        records.write_text(path, record.to_json() + "\n")

    assert not pipeline.is_committed(config, 2)
    commit("of another day")
    assert not pipeline.is_committed(config, 2)
    commit(records.code_hash())
    assert pipeline.is_committed(config, 2)
    assert pipeline.is_committed(config.replace(precision="auto"), 2)
    assert not pipeline.is_committed(config.replace(precision="bf16"), 2)
    assert not pipeline.is_committed(config.replace(lam=0.5), 2)
    assert not pipeline.is_committed(config, 1)


def test_a_record_by_code_shown_to_do_the_same_answers(tmp_path, monkeypatch):
    pairs = [("a", "b"), ("x", "y"), ("b", records.code_hash()), ("c", "a")]
    shown = [{"earlier": earlier, "code": code} for earlier, code in pairs]
    path = records.write_text(tmp_path / "equal_code.json", json.dumps(shown))
    monkeypatch.setattr(records, "EQUAL_CODE", path)
    record = records.Record(
        stage=2, profile="p", variant="full", fold="standard", seed=0, key="k", config_key="",
        settings={}, data={}, code="", metrics={}, best_epoch=1, history=[],
    )  # fmt: skip
    codes = (*"abcxy", records.code_hash())
    assert [replace(record, code=c).is_current for c in codes] == 3 * [True] + 2 * [False] + [True]
    # of several processes nothing was shown
    together = replace(record, code="a", provenance={"processes": 2})
    assert not together.is_current and replace(together, code=records.code_hash()).is_current


def test_a_damaged_record_is_named_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    path = records.write_text(records.results_dir("p") / "records.jsonl", "<<<<<<< HEAD\n")
    with pytest.raises(ValueError, match=f"{path}, line 1, is no record.*restore it by git"):
        records.load_records("p")
    path.unlink()
    for text in ("", "{}", '{"stage": 1'):
        records.write_text(records.runs_dir("p") / "full-s0-k/record.json", text + "\n")
        with pytest.raises(ValueError, match=r"record.json, line 1, is no .*remove the folder"):
            records.load_records("p")


@pytest.fixture
def toy_project(tmp_path, monkeypatch):
    """A project of one profile and one notebook."""
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CONKI_DATA", str(tmp_path / "data"))
    for module in (pipeline, records, settings):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for folder in ("notebooks", "conki_lib", "configs", "docs", "results/p", "data/toy"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs/p.yml").write_text("target: toy\nexternal: null\nmodalities: va\n")
    (tmp_path / "notebooks/01_toy.ipynb").write_text('{"cells": [{"source": "x", "outputs": []}]}')
    return tmp_path


@pytest.mark.parametrize(
    ("path", "text", "matters"),
    [
        ("notebooks/01_toy.ipynb", '{"cells": [{"source": "z", "outputs": []}]}', True),
        ("notebooks/01_toy.ipynb", '{"cells": [{"source": "x", "outputs": ["seen"]}]}', False),
        ("conki_lib/plots.py", "x = 1", True),
        ("configs/p.yml", "target: toy\nexternal: null\nmodalities: va\nlam: 0.5\n", True),
        ("configs/p.yml", "target: toy\nmodalities: va\nexternal: null  # as before\n", False),
        ("data/toy/info.json", "{}", True),
        ("docs/audit.yml", "- point: x", True),
        ("results/p/records.jsonl", "{}\n", True),
    ],
)
def test_state_follows_what_figures_are_made_from(toy_project, path, text, matters):
    before = pipeline.state("p")
    assert pipeline.state("p") == before
    (toy_project / path).write_text(text)
    assert (pipeline.state("p") != before) == matters


def test_what_a_pipeline_drew_after_it_had_fetched_is_not_stale(toy_project):
    jobs = toy_project / "runs/p/.jobs"

    def agree() -> bool:
        drawn = jobs / "drawn"
        pipeline.agree("p", jobs, {str(drawn): True}, drawing={str(drawn)}, of_data=[], of_runs=[])
        return drawn.exists()

    agree()  # before the corpus is fetched
    (toy_project / "data/toy/info.json").write_text("{}")
    (jobs / "drawn").touch()
    assert agree() and agree()
    (toy_project / "data/toy/info.json").write_text('{"other": 1}')
    assert not agree()


def test_markers_agree_with_what_is_true(toy_project):
    jobs = toy_project / "runs/p/.jobs"
    names = ("trained", "missing", "drawn", "early", "report")
    paths = {name: str(jobs / name) for name in names}

    def agree() -> set[str]:
        finished = {paths["trained"]: True, paths["missing"]: False, paths["drawn"]: True}
        pipeline.agree(
            "p", jobs, finished, drawing={paths["drawn"]}, of_data=[paths["early"]],
            of_runs=[paths["report"]],
        )  # fmt: skip
        return {path.name for path in jobs.iterdir()} - {"sources"}

    assert agree() == {"trained"}  # what is finished elsewhere needs no job; pictures do
    for name in ("drawn", "early", "missing"):
        (jobs / name).touch()
    records.write_text(jobs / "merge", pipeline.state("p") + "\n")
    whole = {"trained", "drawn", "early", "merge"}
    assert agree() == whole == agree()  # as after a kill between merge and a report
    (jobs / "report").touch()
    assert agree() == whole | {"report"}
    (toy_project / "results/p/records.jsonl").write_text("{}\n")
    assert agree() == {"trained", "drawn", "early"}  # other records: reports are stale
    (toy_project / "conki_lib/plots.py").write_text("x = 1")
    assert agree() == {"trained"}  # other code: all pictures are


@pytest.mark.parametrize("word", ["--config", "--config=conki=true", "-C", "-Cconki=true"])
def test_other_settings_go_to_snakemake_itself(word):
    with pytest.raises(ValueError, match="--config is taken"):
        pipeline.start("synthetic", extra=[word, "conki=true"])


@pytest.mark.parametrize(
    "typo", [{"rows": "w/o N3"}, {"seeds": "0-"}, {"extra": ["nosuchtarget"]}, {"extra": ["--odd"]}]
)
def test_a_typo_beside_fresh_moves_nothing(tmp_path, monkeypatch, typo):
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path))
    (tmp_path / "synthetic/full-s0").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"w/o N3|write a count|nothing was moved[^$]*(nosuch|--odd)"
    ):
        pipeline.start("synthetic", fresh=True, **typo)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["synthetic"]
    assert not anew.is_begun("synthetic")


def test_a_plan_beside_fresh_is_that_of_a_first_start(tmp_path, monkeypatch, capfd):
    jobs = tmp_path / "synthetic/.jobs"
    jobs.mkdir(parents=True)
    (jobs / "stage1-s0").touch()
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path))
    with pytest.raises(SystemExit) as left:
        pipeline.start("synthetic", fresh=True, extra=["-n", "train"])
    assert left.value.code == 0
    assert "rule stage_1:" in "".join(capfd.readouterr())
    assert (jobs / "stage1-s0").is_file() and not (tmp_path / "replaced").exists()


def test_fresh_moves_runs_aside_and_deletes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path))
    assert anew.set_aside("p") is None
    (tmp_path / "p/full-s0").mkdir(parents=True)
    (tmp_path / "p/full-s0/record.json").write_text("kept")
    moved = anew.set_aside("p")
    assert moved.parent == tmp_path / "replaced" and not (tmp_path / "p").exists()
    assert (moved / "full-s0/record.json").read_text() == "kept"


def test_fresh_waits_for_nobody_and_takes_no_run_from_under_a_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path))
    at_work, ended = tmp_path / "p/lam=0.1-s0-k", tmp_path / "p/full-s0-k"
    with records.run_lock(ended):
        pass
    with records.run_lock(at_work), pytest.raises(RuntimeError, match=rf"moved.*{at_work},"):
        anew.begin("p")
    assert (tmp_path / "p/lam=0.1-s0-k.lock").is_file() and not anew.is_begun("p")
    assert "begins anew; earlier runs moved" in anew.begin("p")
    assert not (tmp_path / "p").exists() and anew.is_begun("p")


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start a pipeline up to where it becomes Snakemake; what is in its folder of runs then."""
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(pipeline, "_check", lambda plan: None)
    monkeypatch.setattr(pipeline, "_anew", lambda profile, plan, **streams: None)

    def become_snakemake(*_):
        raise InterruptedError

    def start(**options) -> set[str]:
        held, real = [], pipeline.lock
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(pipeline, "lock", lambda profile: held.extend(real(profile)))
            patch.setattr(pipeline.os, "execv", become_snakemake)
            pipeline.start("synthetic", **options)
        pipeline.release(held)
        return {path.name for path in (tmp_path / "runs/synthetic").glob("*")}

    (tmp_path / "runs/synthetic/old").mkdir(parents=True)
    return start


def test_fresh_again_goes_on_with_what_was_begun(started, tmp_path, capsys):
    assert started() == {"old"} and not anew.is_begun("synthetic")
    assert started(fresh=True) == set()
    (tmp_path / "runs/synthetic/new").mkdir(parents=True)
    assert started(fresh=True) == {"new"} == started()
    assert f"goes on as begun anew; remove {anew.mark('synthetic')}" in capsys.readouterr().out
    anew.end("synthetic")
    assert started() == {"new"} and started(fresh=True) == set()


@pytest.mark.parametrize("at", ["set_aside", "write_text"])
def test_a_fresh_that_is_killed_while_it_moves_is_begun_by_the_next_start(started, at, monkeypatch):
    def killed(*given):
        if at == "set_aside" or given[1] == anew._BEGUN:
            raise InterruptedError
        return records.write_text(*given)

    with monkeypatch.context() as patch:
        patch.setattr(anew, at, killed)
        assert started(fresh=True) == ({"old"} if at == "set_aside" else set())
    assert anew.is_interrupted("synthetic")
    assert started() == set() and anew.is_begun("synthetic")
    assert not anew.is_interrupted("synthetic")


def test_only_a_pipeline_whose_runs_are_finished_ends_what_fresh_began(tmp_path, monkeypatch):
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CONKI_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    records.write_text(anew.mark("synthetic"), anew._BEGUN)
    target = os.path.relpath(tmp_path / "runs/synthetic/.jobs/data-synthetic", ROOT)
    command = pipeline.command("synthetic", rows="w/o C1", extra=[target, "--quiet", "all"])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/synthetic/info.json").is_file() and anew.is_begun("synthetic")


def test_an_interrupted_fresh_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CONKI_DATA", str(tmp_path / "data"))

    def plan() -> str:
        words = ["train", "--dry-run", "--nocolor"]
        command = pipeline.command("mmmo-open", rows="full", extra=words)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    if "-p train=false" not in plan():
        pytest.skip("no committed record of this profile is by today's code")
    records.write_text(anew.mark("mmmo-open"), anew._BEGUN)
    assert "-p variant=full" in plan() and "-p train=false" not in plan()
    assert anew.is_begun("mmmo-open")  # a plan ends nothing


@pytest.mark.parametrize("shared", ["runs", "results"])
def test_a_second_pipeline_is_refused_and_a_killed_one_leaves_no_lock(
    tmp_path, monkeypatch, shared
):
    def place(name: str) -> dict[str, Path]:
        own = {"runs": tmp_path / name / "runs", "results": tmp_path / name}
        return own | {shared: tmp_path / "shared"}

    def locked(name: str) -> list[str]:
        code = "from conki_lib import pipeline, records; import pathlib, time; "
        code += f"records.ROOT = pathlib.Path({str(place(name)['results'])!r}); "
        code += "pipeline.lock('p'); print('locked', flush=True); time.sleep(60)"
        return [sys.executable, "-c", code]

    environment = os.environ | {"CONKI_RUNS": str(place("first")["runs"])}
    with subprocess.Popen(
        locked("first"), stdout=subprocess.PIPE, text=True, env=environment
    ) as first:
        assert first.stdout.readline() == "locked\n"
        monkeypatch.setattr(records, "ROOT", place("second")["results"])
        monkeypatch.setenv("CONKI_RUNS", str(place("second")["runs"]))
        with pytest.raises(RuntimeError, match=rf"process {first.pid}\) works on 'p' in .*clone"):
            pipeline.lock("p")
        pipeline.release(pipeline.lock("another profile"))
        first.send_signal(signal.SIGKILL)
    pipeline.release(pipeline.lock("p"))


def test_a_lock_that_cannot_be_had_whole_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(records, "ROOT", tmp_path / "file")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DiskError, match="a file stands where a folder is needed"):
        pipeline.lock("p")
    monkeypatch.setattr(records, "ROOT", tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="no space left for the lo"):
        patch.setattr(os, "pwrite", full)
        pipeline.lock("p")
    pipeline.release(pipeline.lock("p"))


@pytest.mark.parametrize("words", [["-n"], ["train", "-np"], ["--dry-run"], ["--dryrun"]])
def test_a_plan_is_recognised(words):
    assert pipeline.only_plans(words)


@pytest.mark.parametrize(
    "words", [[], ["train"], ["--nolock", "--cores", "2"], ["-p", "figures-n"], ["-Rindex"]]
)
def test_a_run_is_no_plan(words):
    assert not pipeline.only_plans(words)


def test_beside_a_pipeline_a_plan_changes_nothing_and_snakemake_itself_is_refused(
    tmp_path, monkeypatch
):
    runs = tmp_path / "runs"
    jobs = runs / "synthetic/.jobs"
    jobs.mkdir(parents=True)
    for name in ("stage1-s0", "merge"):  # nothing is finished: alone, a plan would remove them
        (jobs / name).touch()
    environment = os.environ | {"CONKI_RUNS": str(runs), "CONKI_DATA": str(tmp_path / "data")}

    def call(*extra: str) -> tuple[int, str]:
        command = pipeline.command("synthetic", rows="w/o C1", extra=extra)
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
        )
        return done.returncode, done.stdout + done.stderr

    monkeypatch.setenv("CONKI_RUNS", str(runs))
    held = pipeline.lock("synthetic")
    try:
        code, _ = call("--dry-run", "--quiet", "all")
        assert code == 0
        code, said = call("train")
        assert code != 0 and f"another pipeline (process {os.getpid()}) works on" in said
        assert "Traceback" not in said
        assert sorted(p.name for p in jobs.iterdir()) == ["merge", "stage1-s0"]
    finally:
        pipeline.release(held)
    code, _ = call("--dry-run", "--quiet", "all")
    assert code == 0 and [p.name for p in jobs.iterdir()] == ["sources"]


def test_the_command_leaves_defaults_to_the_snakefile():
    plain = pipeline.command("synthetic", cores=3)
    assert plain[plain.index("--cores") + 1] == "3"
    assert plain[plain.index("--config") + 1 :] == ["profile='synthetic'", "threads='1'"]
    more = pipeline.command(
        "synthetic", rows="full,w/o N1", seeds="5", folds="a,b", extra=["--dry-run"]
    )
    assert "--dry-run" in more
    assert more[more.index("--config") + 1 :][1:] == [
        "rows='full,w/o N1'",
        "seeds='5'",
        "folds='a,b'",
        "threads='1'",
    ]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> str:
    """What Snakemake would do in an empty place; one call serves several tests."""
    place = tmp_path_factory.mktemp("plan")
    environment = os.environ | {
        "CONKI_RUNS": str(place / "runs"),
        "CONKI_DATA": str(place / "data"),
        "CONKI_HOME": str(home(place / "project")),
    }
    command = pipeline.command(
        "mosi-open",
        rows="full,w/o C4,w/o C1,text-only",
        seeds="70-71",
        extra=["--dry-run", "--nocolor"],
    )
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, cwd=place
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any(place.rglob("*.ipynb"))
    return done.stdout + done.stderr


def plan_inputs(plan: str) -> dict[str, list[str]]:
    """What each job of a plan needs, by the name of its marker."""
    jobs = re.findall(r"rule (\w+):\n    input: (.*)\n(?:    output: .*/(\S+)\n)?", plan)
    return {name or rule: [Path(x).name for x in needs.split(", ")] for rule, needs, name in jobs}


def test_the_plan_has_one_job_per_run(plan):
    count = dict(re.findall(r"^(\w+) +(\d+)$", plan, re.M))
    assert count["fetch"] == "2" and count["stage_1"] == "2"
    assert count["variant"] == "6" and count["full"] == "2" and count["merge"] == "1"


def test_the_plan_orders_what_depends_on_each_other(plan):
    inputs = plan_inputs(plan)
    assert "text-only-s71-standard" in inputs["full-s71-standard"]
    assert "wo-C4-s71-standard" not in inputs["full-s71-standard"]  # trained side by side
    for name in ("full-s71-standard", "wo-C4-s70-standard", "wo-C1-s70-standard", "merge"):
        assert not any(x.startswith("stage1") for x in inputs[name]), name  # as is stage 1
    assert "full-s70-standard" in inputs["merge"] and "stage1-s70" in inputs["index"]
    assert "stage1-s70" in inputs["all"]


def test_jobs_ask_for_memory_and_time(plan):
    asked = re.findall(r"^rule (\w+):\n(?: .*\n)*?    resources: (.*)$", plan, re.M)
    assert {"fetch", "stage_1", "variant", "report"} <= {rule for rule, _ in asked}
    for rule, resources in asked:
        if rule in ("all", "train", "merge", "index"):
            continue  # done where Snakemake runs, not by a job
        found = dict(re.findall(r"(\w+)=(\d+)", resources))
        assert int(found["mem_mb"]) >= 4000 and int(found["runtime"]) >= 60, (rule, resources)


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_on_a_cluster_rules_that_train_ask_for_a_gpu(name):
    profile = yaml.safe_load((ROOT / f"profiles/{name}/config.yaml").read_text())
    found = re.findall(r"^(?:use rule \w+ as|rule) (\w+)", (ROOT / "Snakefile").read_text(), re.M)
    rules = set(found)
    given = profile["set-resources"]
    assert set(given) <= rules and set(profile["set-threads"]) <= rules
    assert {rule for rule, asked in given.items() if asked.get("gpu") == 1} == {
        "stage_1",
        "variant",
        "full",
    }
    assert profile["retries"] >= 1 and profile["rerun-triggers"] == ["mtime"]


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_the_plan_of_a_cluster_can_be_made(tmp_path, name):
    storage = ["snakemake_storage_plugin_fs"] if name == "kubernetes" else []
    for plugin in (f"snakemake_executor_plugin_{name}", *storage):
        pytest.importorskip(plugin, reason=f"{plugin} is not installed")
    environment = os.environ | {
        "CONKI_RUNS": str(tmp_path / "runs"), "CONKI_DATA": str(tmp_path / "data")
    }  # fmt: skip
    words = ["--workflow-profile", f"profiles/{name}", "--nolock", "--dry-run", "--nocolor"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words, "--config", "profile=mosi", "rows='w/o C1'"],
        cwd=ROOT, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rule = (done.stdout + done.stderr).split("rule variant:")[1].split("rule ")[0]
    assert "gpu=1" in rule and "runtime=480" in rule


def test_a_rehearsal_does_nothing(tmp_path):
    environment = os.environ | {
        "CONKI_RUNS": str(tmp_path / "my runs"), "CONKI_DATA": str(tmp_path / "data")
    }  # fmt: skip
    command = pipeline.command("synthetic", rows="w/o C1", extra=["train", "--quiet", "all"])
    done = subprocess.run(
        [*command, "conki=true"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    jobs = tmp_path / "my runs/synthetic/.rehearsal"
    assert {"data-synthetic", "wo-C1-s0-standard", "merge"} <= {p.name for p in jobs.iterdir()}
    assert not (tmp_path / "data").exists()
    assert not (jobs.parent / ".jobs").exists()  # nothing of it counts as done


def test_rows_asked_for_later_are_trained_though_the_merge_is_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CONKI_DATA", str(tmp_path / "data"))
    merged = tmp_path / "runs/synthetic/.jobs/merge"
    records.write_text(merged, pipeline.state("synthetic"))
    command = pipeline.command("synthetic", rows="w/o C1", extra=["train", "--dry-run"])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert merged.is_file() and done.returncode == 0, done.stderr
    assert "variant=w/o C1" in done.stdout + done.stderr


def test_the_plan_executes_notebooks(plan):
    assert "conki run 03_adapter_pretraining --profile mosi-open -p seed=71" in plan
    assert "conki run 04_finetuning --profile mosi-open -p 'variant=w/o C4' -p seed=70" in plan
    assert "conki fetch mosi-open" in plan and "conki merge mosi-open" in plan
