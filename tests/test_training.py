"""Both stages on a tiny corpus with a tiny BERT: what is trained, resumed, repeated, refused."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from test_losses import by_loops, random_reps

from conki_lib import disk, fitting, pipeline, records, states, training
from conki_lib.config import ContrastConfig, RunConfig, RuntimeConfig
from conki_lib.data import open_store
from conki_lib.model import Output, build_model
from conki_lib.pairs import REPS


def test_both_stages_leave_complete_records(world):
    record = training.fine_tune(world)
    assert set(record.metrics) == {"valid", "test"}
    assert len(record.history) == 3 and {"loss_task", "loss_con"} <= set(record.history[0])
    maes = [row["valid_mae"] for row in record.history]
    assert record.best_epoch == 1 + maes.index(min(maes))
    table = pd.read_parquet(record.folder / "predictions.parquet")
    assert list(table.columns) == records.PREDICTION_COLUMNS and len(table) == 8
    first = training.inject_knowledge(world)
    assert first.stage == 1 and set(first.metrics) == {"valid"}
    assert not list(record.folder.glob("*checkpoint*"))


def test_a_store_may_lie_under_another_name(world, tmp_path):
    (tmp_path / "toy").rename(tmp_path / "toy-aligned")
    record = training.fine_tune(world.replace(target="toy-aligned", epochs=1))
    assert set(record.settings["widths"]) == {"toy", "far"}
    shutil.copytree(tmp_path / "far", tmp_path / "far2")
    with pytest.raises(ValueError, match="both hold a corpus that is called 'far'"):
        training.resolve(world.replace(target="far", external="far2"))
    with pytest.raises(ValueError, match="'far' is the target itself"):
        training.resolve(world.replace(target="far"))


def test_a_corpus_without_a_split_is_refused_before_training(world, make_tiny_store):
    make_tiny_store("half", sizes=(8, 4, 0))
    with pytest.raises(
        ValueError, match="'half', fold 'standard' of standard, holds no utterance for test: tr"
    ):
        training.fine_tune(world.replace(target="half"))
    assert not list(records.runs_dir("tiny").glob("*"))
    training.resolve(world.replace(external="half"))  # stage 1 has no test
    training.resolve(world.replace(target="half", tuning=True))


def test_a_merge_that_cannot_read_predictions_writes_nothing(world):
    record = training.fine_tune(world)
    held = (record.folder / "predictions.parquet").read_bytes()
    (record.folder / "predictions.parquet").write_bytes(held[:-20])
    with pytest.raises(ValueError, match="cannot be read .*remove its folder, to run it anew"):
        records.merge("tiny")
    assert not list(records.results_dir("tiny").glob("*"))
    (record.folder / "predictions.parquet").write_bytes(held)
    records.merge("tiny")
    assert len(records.predictions("tiny")) == 8


@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_the_objective_is_the_task_plus_lambda_times_the_contrast(lam, form):
    reps, y = random_reps(4).requires_grad_(), torch.tensor([1.0, -2.0, 0.6, 0.0]).double()
    y_hat = random_reps(4, K=1, d=1, seed=1).flatten().requires_grad_()
    found = training.Objective(ContrastConfig(lam=lam, form=form))(Output(y_hat, reps, REPS), y)
    contrast = by_loops(reps, y, form=form)
    loss = sum((y_hat[i] - y[i]) ** 2 for i in range(4)) / 4 + lam * contrast
    torch.testing.assert_close(found["loss"], loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["loss_con"].detach(), contrast.detach(), rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(found["loss"], (y_hat, reps), allow_unused=True)
    if lam == 0:
        assert gradients[1] is None and not found["loss_con"].requires_grad
        gradients = (gradients[0], torch.zeros_like(reps))
    torch.testing.assert_close(gradients, torch.autograd.grad(loss, (y_hat, reps)))


def test_every_run_has_a_lock_of_its_own(tmp_path):
    with records.run_lock(tmp_path / "lam=0.1-s0-abc"):
        with records.run_lock(tmp_path / "lam=0.1-s1-abc").acquire(timeout=0):
            pass  # another seed of the sweep goes on
        with pytest.raises(Timeout):
            records.run_lock(tmp_path / "lam=0.1-s0-abc").acquire(timeout=0)


def test_merges_from_two_folders_of_runs_wait_for_each_other(world, monkeypatch, tmp_path):
    locked = []
    monkeypatch.setattr(records, "FileLock", lambda path: locked.append(path) or FileLock(path))
    for seed in (0, 1):
        monkeypatch.setenv("CONKI_RUNS", str(tmp_path / f"runs{seed}"))
        training.fine_tune(world.replace(seed=seed))
        locked.clear()
        records.merge("tiny")
        assert locked == [records.ROOT / "results" / ".tiny.lock"]  # of what both write
    assert {r.seed for r in records.committed_records("tiny") if r.stage == 2} == {0, 1}


def test_the_same_seed_twice_gives_equal_records(world, monkeypatch, tmp_path):
    once = training.fine_tune(world)
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "again"))
    again = training.fine_tune(world)
    assert once == again
    assert once.folder != again.folder
    a, b = load_file(once.model_path), load_file(again.model_path)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert training.fine_tune(world.replace(seed=1)).metrics != once.metrics


def test_a_finished_run_is_loaded_not_repeated(world, monkeypatch):
    record = training.fine_tune(world)
    monkeypatch.setattr(training, "fit", lambda job: pytest.fail("trained again"))
    assert training.fine_tune(world) == record


def test_runs_that_agree_on_stage_1_share_it(world):
    training.fine_tune(world)
    training.fine_tune(world.replace(lam=0.0, variant="w/o C4"))
    folders = [p.parent.name for p in records.runs_dir("tiny").glob("*/record.json")]
    assert sum(name.startswith("stage1") for name in folders) == 1 and len(folders) == 3


def test_stage_2_starts_from_stage_1_and_keeps_its_adapters(world):
    first = training.inject_knowledge(world)
    before = load_file(first.model_path)
    after = load_file(training.fine_tune(world).model_path)
    adapters = [k for k in before if k.startswith("adapters.")]
    assert adapters and all(torch.equal(before[k], after[k]) for k in adapters)
    encoders = [k for k in before if k.startswith("encoders.") and before[k].is_floating_point()]
    assert any(not torch.equal(before[k], after[k]) for k in encoders)


def test_stage_1_changes_adapters_and_heads_only(world):
    config, _ = training.resolve(world)
    torch.manual_seed(world.runtime.seed)
    start = build_model(config.model).state_dict()
    end = load_file(training.inject_knowledge(world).model_path)
    changed = {k.split(".")[0] for k in start if not torch.equal(start[k], end[k])}
    assert "adapters" in changed and "encoders" not in changed


def test_cached_states_give_what_the_backbones_give(world, monkeypatch, tmp_path):
    cached = training.inject_knowledge(world)
    plain = training.inject_knowledge(world.replace(stage1_cache=False))
    a, b = load_file(cached.model_path), load_file(plain.model_path)
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(states, "LARGEST", 1)
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "small"))
    c = load_file(training.inject_knowledge(world).model_path)
    assert not cached_sizes() and all(torch.equal(b[k], c[k]) for k in b)


def cached_sizes() -> dict[str, int]:
    found = records.runs_dir("cache").glob("*/states.json")
    return {p.parent.name: sum(f.stat().st_size for f in p.parent.iterdir()) for p in found}


def opened_long_ago() -> None:
    for path in records.runs_dir("cache").rglob("*"):
        os.utime(path, (0, 0))


def test_cached_states_stay_within_their_bound(world, monkeypatch, capsys):
    training.inject_knowledge(world)
    first = cached_sizes()
    text = {name for name in first if name.startswith("t-")}
    monkeypatch.setattr(states, "LARGEST", sum(first.values()) + 1000)
    training.inject_knowledge(world.replace(seed=1))  # text is the same, the others are not
    assert "too many to cache" in capsys.readouterr().out
    assert cached_sizes() == first, "what was opened within a day makes no room"
    opened_long_ago()
    for name in text:
        os.utime(records.runs_dir("cache") / name / "states.json", (1, 1))
    (left := records.runs_dir("cache") / ".v-killed.1").mkdir()
    (left / "hidden1.bin").write_bytes(bytes(500))
    for path in (left / "hidden1.bin", left):
        os.utime(path, (-1, -1))
    training.inject_knowledge(world.replace(seed=2))
    third = cached_sizes()
    assert text and text < set(third), "what was opened longest ago goes first"
    assert sum(third.values()) <= states.LARGEST and not set(first) <= set(third)
    assert not left.exists()


def test_room_is_given_once(tmp_path, monkeypatch):
    asked = {"size": 60, "largest": 100, "kept": 9.0}
    first = disk.make_room(tmp_path, **asked)
    assert first.parent == tmp_path and disk.make_room(tmp_path, **asked) is None
    (first / disk.RESERVED).unlink()
    (first / "states").write_bytes(bytes(90))
    for path in (first / "states", first):
        os.utime(path, (0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError()))
        assert disk.make_room(tmp_path, **asked) is None, "what cannot be removed is still there"
    assert disk.make_room(tmp_path, **asked) and not first.exists()


def test_a_removal_of_states_that_was_killed_does_no_harm(world, monkeypatch):
    whole = training.inject_knowledge(world)
    monkeypatch.setattr(states, "LARGEST", sum(cached_sizes().values()) + 1000)
    opened_long_ago()

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            training.inject_knowledge(world.replace(seed=1))
    shutil.rmtree(whole.folder)
    assert training.inject_knowledge(world) == whole


@pytest.mark.parametrize("damage", [lambda f: f.write_text(""), Path.unlink])
def test_damaged_states_are_computed_anew(world, damage):
    whole = training.inject_knowledge(world)
    for path in records.runs_dir("cache").glob("*/states.json"):
        damage(path)
    shutil.rmtree(whole.folder)
    assert training.inject_knowledge(world) == whole


def test_cached_states_are_those_of_a_models_own_weights(world, monkeypatch, tmp_path):
    right = training.inject_knowledge(world)
    tuned = training.load_model(training.fine_tune(world))
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "other"))
    config, stores = training.resolve(world)
    far = stores[world.data.external]
    loaders = training.make_loaders(config, far, config.stage1, splits=("train", "valid"))
    assert set(training.state_readers(tuned, config, far, loaders)) == {"train", "valid"}
    assert training.inject_knowledge(world) == right
    off = config.replace(stage1_cache=False)
    assert training.state_readers(tuned, off, far, loaders) == {}


def test_who_asks_for_stage_1_leaves_no_trace_in_it(world, monkeypatch, tmp_path):
    first = training.inject_knowledge(world)
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "other"))
    asked = world.replace(variant="w/o C4", lam=0.0, epochs=7, batch_size=3, tuning=True)
    assert training.inject_knowledge(asked) == first


@pytest.mark.parametrize("when", [1, 4, 7])
def test_killed_and_started_again_ends_the_same(world, tmp_path, monkeypatch, when):
    whole = training.fine_tune(world)
    runs = tmp_path / f"killed{when}"
    code = (
        "import json, os, signal, sys\n"
        "from conki_lib import records, training, fitting\n"
        "from conki_lib.config import RunConfig\n"
        "records.ROOT = __import__('pathlib').Path(sys.argv[1])\n"
        "real, count = fitting._save_weights, [0]\n"
        "def kill(*a):\n"
        "    count[0] += 1\n"
        f"    os.kill(os.getpid(), signal.SIGKILL) if count[0] > {when} // 2 else real(*a)\n"
        "fitting._save_weights = kill\n"
        "import torch; torch.set_num_threads(1)\n"
        "training.fine_tune(RunConfig(**json.loads(sys.argv[2])))\n"
    )
    env = os.environ | {"CONKI_RUNS": str(runs), "CONKI_HEADLESS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(world.flat())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    monkeypatch.setenv("CONKI_RUNS", str(runs))
    assert training.fine_tune(world) == whole


def test_no_external_corpus_trains_the_adapters_in_stage_2(world):
    record = training.fine_tune(world.replace(external=None, variant="w/o C1"))
    config, _ = training.resolve(world.replace(external=None))
    torch.manual_seed(0)
    start, end = build_model(config.model).state_dict(), load_file(record.model_path)
    assert any(not torch.equal(start[k], end[k]) for k in start if k.startswith("adapters."))
    with pytest.raises(ValueError, match="external is not set"):
        training.inject_knowledge(world.replace(external=None))


def test_external_text_leaves_other_adapters_to_stage_2(world, make_tiny_store):
    make_tiny_store("words", widths={}, seed=3)
    config = world.replace(external="words")
    assert training.inject_knowledge(config).settings["modalities"] == ["t"]
    before = load_file(training.inject_knowledge(config).model_path)
    after = load_file(training.fine_tune(config).model_path)
    text = [k for k in before if k.startswith("adapters.t.")]
    assert text and all(torch.equal(before[k], after[k]) for k in text)


def test_controls_train_on_the_external_corpus_too(world):
    config = world.replace(kind="late-fusion", stage1_train="all", variant="late fusion + external")
    record = training.fine_tune(config)
    assert "loss_con" not in record.history[0] and set(record.metrics) == {"valid", "test"}


def test_tuning_runs_never_look_at_test(world):
    record = training.fine_tune(world.replace(tuning=True))
    assert set(record.metrics) == {"valid"}
    assert set(pd.read_parquet(record.folder / "predictions.parquet")["split"]) == {"valid"}
    records.merge("tiny")
    assert (records.results_dir("tiny") / "tuning.jsonl").is_file()
    committed = records.committed_records("tiny")  # final runs start from the same stage 1
    assert [r.stage for r in committed] == [1]


def test_the_best_epoch_is_the_one_of_lowest_validation_mae(world):
    record = training.fine_tune(world)
    maes = [h["valid_mae"] for h in record.history]
    assert record.best_epoch == int(np.argmin(maes)) + 1
    assert record.metrics["valid"]["mae"] == pytest.approx(min(maes))


def test_patience_stops_early(world):
    record = training.fine_tune(
        world.replace(epochs=20, patience=1, lr_heads=0.5, lr_sequence=0.5, external=None)
    )
    assert len(record.history) < 20
    assert len(record.history) == record.best_epoch + 1


def test_a_loss_that_is_not_finite_stops_and_says_so(world, monkeypatch):
    real, calls = fitting._train_epoch, []

    def poison(job, *rest):
        calls.append(1)
        if len(calls) == 2:
            next(p for p in job.model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return real(job, *rest)

    monkeypatch.setattr(fitting, "_train_epoch", poison)
    with pytest.raises(FloatingPointError, match="epoch 2, step 1.*learning rates"):
        training.fine_tune(world.replace(external=None))
    kept = list(records.runs_dir("tiny").glob("*/checkpoint-0001"))
    assert len(kept) == 1


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_and_says_so(world, monkeypatch, clip):
    real = training.Objective.__call__

    def steep(self, output, y, share=1.0):
        losses = real(self, output, y, share)
        return losses | {"loss": losses["loss"] + (0 * output.y_hat.sum()).sqrt()}  # 0, slope inf

    monkeypatch.setattr(training.Objective, "__call__", steep)
    with pytest.raises(FloatingPointError, match="gradient_norm.*epoch 1, step 1"):
        training.fine_tune(world.replace(external=None, clip=clip))


def test_clip_0_clips_nothing(world):
    free, wide = (training.fine_tune(world.replace(external=None, clip=c)) for c in (0.0, 1e9))
    assert free.history == wide.history and free.metrics == wide.metrics


def test_an_accelerate_configuration_changes_no_result(world, monkeypatch, tmp_path):
    usual = training.fine_tune(world)
    for name, value in (("MIXED_PRECISION", "bf16"), ("GRADIENT_ACCUMULATION_STEPS", "4")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "configured"))
    assert training.fine_tune(world) == usual


def test_missing_modality_and_corpus_are_named(world, make_tiny_store):
    make_tiny_store("words", widths={}, seed=3)
    with pytest.raises(ValueError, match="'words' holds 't'"):
        training.fine_tune(world.replace(target="words"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        training.fine_tune(world.replace(target="nowhere"))
    with pytest.raises(ValueError, match="none of 'va'"):
        training.fine_tune(world.replace(external="words", modalities="va"))
    assert not list(records.runs_dir("tiny").glob("*/record.json"))


def test_a_gpu_that_is_not_there_is_named_before_anything_is_written(world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU: set device to auto or cpu"):
        training.fine_tune(world.replace(device="cuda"))
    assert not records.runs_dir("tiny").exists()


def test_other_weights_under_the_same_name_are_another_run(world, tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(world.model.text_backbone, folder)
    config = world.replace(external=None, text_backbone=str(folder))
    first = training.fine_tune(config)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v + 0.5 for k, v in weights.items()}, folder / "model.safetensors")
    second = training.fine_tune(config)
    assert first.config_key == second.config_key and first.key != second.key
    words = folder / "tokenizer.json"
    words.write_text(words.read_text().replace('"lowercase": true', '"lowercase": false'))
    assert training.fine_tune(config).key not in (first.key, second.key)


def test_states_are_cached_for_the_weights_that_made_them(world, tmp_path):
    folder = shutil.copytree(world.model.text_backbone, tmp_path / "bert")
    config = world.replace(text_backbone=str(folder))

    def cached():
        training.inject_knowledge(config)
        return {path.parent.name for path in records.runs_dir("cache").glob("*/states.json")}

    first = cached()
    weights = load_file(folder / "model.safetensors")
    save_file({k: v + 0.5 for k, v in weights.items()}, folder / "model.safetensors")
    assert [name[0] for name in cached() - first] == ["t", "t"]  # of both splits


def test_weights_of_committed_records_are_asked_for_by_name(world):
    training.fine_tune(world)
    records.merge("tiny")
    record = records.committed_records("tiny")[-1]
    with pytest.raises(FileNotFoundError, match="make reproduce PROFILE=tiny"):
        training.load_model(record)


def test_loaded_models_predict_what_was_recorded(world):
    record = training.fine_tune(world)
    store = open_store(Path(os.environ["CONKI_DATA"]) / "toy")
    loaders = training.make_loaders(record.config, store, record.config.stage2, splits=("test",))
    table = fitting.predict(training.load_model(record), loaders["test"])
    kept = pd.read_parquet(record.folder / "predictions.parquet").query("split == 'test'")
    np.testing.assert_allclose(table["y_hat"], kept["y_hat"], rtol=1e-6)


def test_merge_keeps_what_was_committed(world, tmp_path, monkeypatch):
    training.fine_tune(world)
    records.merge("tiny")
    before = (records.results_dir("tiny") / "records.jsonl").read_text()
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "elsewhere"))
    records.merge("tiny")
    assert (records.results_dir("tiny") / "records.jsonl").read_text() == before
    assert len(records.predictions("tiny")) == 8
    training.fine_tune(world.replace(seed=5))
    records.merge("tiny")
    assert {r.seed for r in records.committed_records("tiny")} == {0, 5}
    assert len(records.predictions("tiny")) == 16


def test_an_equal_run_leaves_the_committed_record_and_another_replaces_it(
    world, tmp_path, monkeypatch
):
    def committed() -> str:
        return records.merge("tiny").read_text()

    world = world.replace(external=None)
    training.fine_tune(world)
    first = committed()
    predicted = (records.results_dir("tiny") / "predictions.parquet").read_bytes()
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "again"))
    path = training.fine_tune(world).folder / "record.json"
    path.write_text(path.read_text().replace('"finished": "2', '"finished": "3'))
    assert committed() == first
    assert (records.results_dir("tiny") / "predictions.parquet").read_bytes() == predicted
    path.write_text(path.read_text().replace('"best_epoch": ', '"best_epoch": 1'))
    assert committed() != first  # the run of this machine wins where results differ
    monkeypatch.setattr(records, "code_hash", lambda: "tomorrow")
    training.fine_tune(world)
    assert {r.code for r in records.committed_records("tiny")} != {"tomorrow"}
    committed()
    assert {r.code for r in records.committed_records("tiny")} == {"tomorrow"}


def test_a_run_by_code_shown_to_do_the_same_repeats_the_committed_one(world, tmp_path, monkeypatch):
    world = world.replace(external=None)
    made, path = training.fine_tune(world), records.merge("tiny")
    predictions = records.results_dir("tiny") / "predictions.parquet"
    before = path.read_bytes(), predictions.read_bytes()
    pairs = [{"earlier": made.code, "code": "tomorrow"}]
    shown = records.write_text(tmp_path / "equal_code.json", json.dumps(pairs))
    monkeypatch.setattr(records, "EQUAL_CODE", shown)
    monkeypatch.setattr(records, "code_hash", lambda: "tomorrow")
    again = training.fine_tune(world)
    assert again.key != made.key and again.folder != made.folder
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "elsewhere"))
    shutil.copytree(again.folder, records.runs_dir("tiny") / again.folder.name)
    records.merge("tiny")
    assert (path.read_bytes(), predictions.read_bytes()) == before
    (found,) = records.load_records("tiny")  # the committed one, its weights here
    assert found.key == made.key and found.model_path.parent.name == again.folder.name
    again = records.runs_dir("tiny") / again.folder.name / "record.json"
    again.write_text(again.read_text().replace('"best_epoch": ', '"best_epoch": 1'))
    (found,) = records.load_records("tiny")
    assert found.code == "tomorrow"  # what gave something else is a run of its own


def test_learning_rates_rise_and_fall():
    plan = RunConfig(epochs=4, warmup_epochs=1.0).stage2
    factor = fitting.learning_rate_factor(plan, steps=10)
    assert factor(0) == pytest.approx(0.1) and factor(9) == 1.0 and factor(10) == 1.0
    assert factor(25) == pytest.approx(0.5) and factor(40) == 0.0
    constant = fitting.learning_rate_factor(plan.model_copy(update={"schedule": "constant"}), 10)
    assert constant(39) == 1.0


def test_bf16_learns_what_fp32_learns(world):
    fast = dict(epochs=6, external=None, lr_heads=0.01, lr_sequence=0.01, warmup_epochs=0.0)
    curves = {
        name: [
            h["loss_task"]
            for h in training.fine_tune(world.replace(precision=name, **fast)).history
        ]
        for name in ("fp32", "bf16")
    }
    assert curves["fp32"][-1] < 0.9 * curves["fp32"][0]
    np.testing.assert_allclose(curves["bf16"], curves["fp32"], rtol=0.15)


@pytest.mark.parametrize(
    ("machine", "has", "name"),
    [("x86_64", "avx512", "bf16"), ("AMD64", "amx", "bf16"), ("x86_64", "mkldnn", "fp32"),
     ("arm64", "mkldnn", "bf16"), ("arm64", "avx512", "fp32"), ("x86_64", "cuda", "bf16")],
)  # fmt: skip
def test_automatic_precision_is_bf16_where_there_are_instructions(machine, has, name, monkeypatch):
    runtime = RuntimeConfig(precision="auto")
    for place, ask, kind in (
        (torch.cpu, "_is_avx512_bf16_supported", "avx512"),
        (torch.cpu, "_is_amx_tile_supported", "amx"),
        (torch.ops.mkldnn, "_is_mkldnn_bf16_supported", "mkldnn"),  # also true where emulated
        (torch.cuda, "is_available", "cuda"),
    ):
        monkeypatch.setattr(place, ask, lambda kind=kind: kind == has)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(fitting.platform, "machine", lambda: machine)
    assert fitting.chosen_precision(runtime) == name
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    old = fitting.chosen_precision(runtime)
    assert old == ("fp32-fast" if has == "cuda" else name)
    assert fitting.chosen_precision(RuntimeConfig(precision="bf16")) == "bf16"


def test_records_name_the_precision_that_was_chosen(world, monkeypatch):
    automatic = world.replace(precision="auto", external=None, epochs=1)
    monkeypatch.setattr(training, "chosen_precision", lambda runtime: "fp32")
    record = training.fine_tune(automatic)
    assert record.settings["precision"] == "fp32"
    assert training.fine_tune(automatic.replace(precision="fp32")).folder == record.folder
    # where automatic means something else, the run is known too: it is not repeated for that
    monkeypatch.setattr(training, "chosen_precision", lambda runtime: "bf16")
    assert records.find_record(automatic) == record and pipeline.is_finished(automatic, 2)
    other = automatic.replace(precision="bf16")
    assert records.find_record(other) is None and not pipeline.is_finished(other, 2)


def test_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    with fitting.precision("fp32-fast"):
        pass
    assert torch.get_float32_matmul_precision() == before


# ---- large batches on small machines, and several processes ------------------------------------

STILL = dict(adapter_dropout=0.0, encoder_dropout=0.0, fusion_dropout=0.0, lam=0.5)


@pytest.fixture
def still(world, make_tiny_bert) -> RunConfig:
    """No dropout anywhere, so that only the order of additions can differ."""
    return world.replace(text_backbone=make_tiny_bert(dropout=0.0), **STILL)


def assert_same_run(one, other):
    assert one.best_epoch == other.best_epoch
    for row, twin in zip(one.history, other.history, strict=True):
        assert row == pytest.approx(twin, rel=1e-4, abs=1e-5)
    a, b = load_file(one.model_path), load_file(other.model_path)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("parts", [2, 3, 99])
def test_micro_batches_give_what_the_whole_batch_gives(still, tmp_path, monkeypatch, parts):
    whole = training.fine_tune(still)
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / f"parts{parts}"))
    assert_same_run(whole, training.fine_tune(still.replace(accumulate=parts)))


def test_micro_batches_draw_their_dropout_once():
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.seen = torch.nn.Parameter(torch.ones(8)), []

        def forward(self, x):
            y = torch.nn.functional.dropout(x * self.scale)
            self.seen.append(y.detach())
            return fitting.Output(y.sum(1), y[:, None], ("O_t",))

    model = Dropped()
    fitting._InParts(model)([torch.ones(2, 8), torch.ones(2, 8)]).y_hat.sum().backward()
    first, second = model.seen[:2]
    assert not torch.equal(first, second)
    # the gradient of a scale of 1 is the sum of what came through, if backward dropped the same
    assert torch.equal(model.scale.grad, (first + second).sum(0))


TWO_PROCESSES = """
import json, os, signal, sys
import torch; torch.set_num_threads(1)
from conki_lib import fitting, training
from conki_lib.config import RunConfig

save, score, rank = fitting._checkpoint, fitting.Job.score, int(os.environ["RANK"])

def score_otherwise(job, split):
    return {k: -v if rank else v for k, v in score(job, split).items()}

fitting.Job.score = score_otherwise  # whatever the second finds, the first decides

def save_and_die(*given):
    save(*given)
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "dies":
    fitting._checkpoint = save_and_die
if sys.argv[2] == "differs":
    training.fingerprints = lambda config, stores: {"corpus": f"as process {rank} has it"}
training.fine_tune(RunConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("padding", ["masked", "released"])
def test_two_processes_killed_and_started_again_give_what_one_gives(
    still, padding, tmp_path, monkeypatch
):
    still = still.replace(padding=padding, patience=1)
    alone = training.fine_tune(still)
    runs, script = tmp_path / "two", tmp_path / "job.py"
    script.write_text(TWO_PROCESSES)
    env = os.environ | {"CONKI_RUNS": str(runs), "CONKI_HEADLESS": "1"}

    def launch(*words: str) -> subprocess.CompletedProcess:
        # without a GPU, processes of --multi_gpu compute on the CPU, and no MPI is needed; the
        # precision is that of a user's `accelerate config`, which must not matter
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
                   "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "bf16",
                   "--dynamo_backend", "no", "--main_process_port", "0", str(script)]  # fmt: skip
        return subprocess.run([*command, json.dumps(still.flat()), *words], env=env,
                              capture_output=True, text=True, check=False,
                              timeout=300)  # fmt: skip

    done = launch("differs")
    assert done.returncode != 0 and "differ between processes" in done.stderr
    assert not list(runs.glob("tiny/*"))
    done = launch("dies")
    assert done.returncode != 0 and list(runs.glob("tiny/stage1-*/checkpoint-*"))
    assert not list(runs.glob("tiny/*/record.json"))
    done = launch("lives")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming" in done.stdout + done.stderr
    monkeypatch.setenv("CONKI_RUNS", str(runs))
    monkeypatch.setattr(training, "fit", lambda job: pytest.fail("trained again"))
    together = training.fine_tune(still)
    assert together.provenance["processes"] == 2
    assert_same_run(alone, together)


def test_the_hash_of_code_sees_what_decides_and_no_version_of_python():
    code = 'def f(x=1):\n    """Words."""\n    return g(f"{x!r}", None, description="words")\n'
    tree = records._essence(ast.parse(code))
    for other, equal in (("x=2", False), ("x=1,", True), ("y=1", False)):
        assert (tree == records._essence(ast.parse(code.replace("x=1", other)))) is equal
    assert tree == records._essence(ast.parse(code.replace("Words", "Others")))
    assert tree == records._essence(ast.parse(code.replace("words", "others")))
    assert tree != records._essence(ast.parse(code.replace("None", "0")))
    # a later version's empty fields would show here
    function = ["FunctionDef", ["name", "'f'"], ["args", ["arguments"]], ["body", [["Pass"]]]]
    assert records._essence(ast.parse("def f(): pass")) == ["Module", ["body", [function]]]
