"""Rows as data; which records stand behind a table; reasons: errors, gradients, corpora."""

import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from conki_lib import ablation, pipeline, records
from conki_lib.config import ROOT, ContrastConfig, RunConfig
from conki_lib.losses import contrastive_loss, task_loss
from conki_lib.model import build_model, freeze_for_fine_tuning
from conki_lib.reasons import (
    class_groups,
    error_changes,
    external_distance,
    gradient_conflict,
    learnt_in_stage_1,
)
from conki_lib.records import Record

# ---- rows ---------------------------------------------------------------------------------------


def test_rows_change_what_they_say():
    configure = ablation.configure
    assert configure("synthetic", "w/o C1").data.external is None
    assert not configure("synthetic", "w/o C2").model.specific
    assert configure("synthetic", "w/o C3").model.text_init == "random"
    assert not configure("synthetic", "w/o C3 pan").model.pan
    assert configure("synthetic", "w/o C4").contrast.lam == 0
    assert configure("synthetic", "w/o P2").contrast.without == ("P2",)
    assert configure("synthetic", "va", 3).model.modalities == ("v", "a")
    assert configure("synthetic", "tau=0.2").contrast.tau == 0.2
    assert configure("synthetic", "TFN + external").stage1.train == "all"
    base = RunConfig.from_profile("synthetic")
    paper = configure("synthetic", "form=paper")
    assert paper.contrast.lam == base.contrast.lam / base.stage2.batch_size
    assert configure("synthetic", "full").identity(2) == base.identity(2)


@pytest.mark.parametrize("profile", sorted(p.stem for p in (ROOT / "configs").glob("*.yml")))
def test_every_row_is_another_run(profile):
    base = RunConfig.from_profile(profile)
    rows = [name for name in ablation.VARIANTS if ablation.why_not(base, name) is None]
    found = {name: ablation.configure(profile, name) for name in rows}
    named = {name: config for name, config in found.items() if config.variant == name}
    keys = {records.config_key(config, 2) for config in named.values()}
    assert len(keys) == len(named)
    same = set(rows) - set(named)  # as it changes nothing, its runs are those of full
    assert all(found[name] == found["full"] for name in same)
    wanted = {"synthetic": set(), "mosi-open": {"ta"}, "mmmo-open": {"va"}, "sims": {"w/o C1"}}
    assert same == wanted.get(profile, set())
    if profile == "sims":
        assert not any("+ external" in row for row in rows)


def test_a_switch_moves_what_it_names_and_nothing_else():
    for profile in ("synthetic", "mosi-open"):
        base = RunConfig.from_profile(profile).flat()
        for name, row in ablation.SWITCHES.items():
            assert not row.changes.keys() & {"lam", "tau", "epochs", "seed"}
            moved = ablation.configure(profile, name).flat()
            changed = {k for k in base if moved[k] != base[k]} - {"variant"}
            assert changed and changed <= set(row.changes), name
    sizes = ablation.SWITCHES["adapters=released"].changes
    assert sizes == {"adapter_width": 768, "adapter_heads": 12, "adapter_ff": 3072}
    assert set(ablation.SWITCHES["stage1=released"].changes) > {"stage1_epochs"}
    assert ablation.SWITCHES["stage1_pan=false"].changes == {"stage1_pan": False}
    assert ablation.row_order(["lam=1", "fusion=concat", "w/o N1"])[1] == "fusion=concat"
    with pytest.raises(ValueError, match="pretrained backbone"):
        ablation.configure("mmmo-open", "adapter_text_pooling=pooler")


def test_unknown_and_impossible_rows_say_why():
    with pytest.raises(ValueError, match="did you mean 'w/o N1'"):
        ablation.variant("wo N1")
    with pytest.raises(ValueError, match="has no t"):
        ablation.configure("mmmo-open", "text-only")


def test_modalities_that_the_external_corpus_lacks_are_run_without_it():
    configure = ablation.configure  # meld-text is text only
    assert configure("mosi-open", "a").data.external is None
    assert configure("mosi-open", "t").data.external == "meld-text"
    assert configure("mosi-open", "full").data.external == "meld-text"
    assert configure("mosi-open", "a", external="mosi").data.external == "mosi"
    audio = RunConfig.from_profile("mosi-open").replace(external="mmmo-open")
    assert "none of its modalities" in ablation.why_not(audio, "text-only + external")
    assert ablation.why_not(audio, "late fusion + external") is None


def test_sweeps_are_sorted_by_value_after_the_rows():
    order = ablation.row_order(["tau=0.2", "lam=0.1", "w/o C4", "lam=0.02", "full", "full"])
    assert order == ["full", "w/o C4", "lam=0.02", "lam=0.1", "tau=0.2"]
    assert ablation.configure("synthetic", "batch_size=8").stage2.batch_size == 8


# ---- which records count ------------------------------------------------------------------------


def record(row="full", seed=0, *, code=None, finished="1", mae=1.0, **changes) -> Record:
    config = ablation.configure("synthetic", row, seed).replace(**changes)
    return Record(
        stage=2, profile="synthetic", variant=row, fold="standard", seed=seed,
        key=f"{row}-{seed}-{finished}", config_key=records.config_key(config, 2),
        settings=config.flat(), data={}, code=code or records.code_hash(),
        metrics={"test": {"mae": mae}}, best_epoch=2, history=[],
        provenance={"finished": finished, "seconds": 3.0},
    )  # fmt: skip


@pytest.fixture
def held(monkeypatch):
    """Let the profile hold these records."""

    def hold(*found):
        monkeypatch.setattr(ablation, "load_records", lambda profile: list(found))

    return hold


def test_runs_of_take_rows_as_configured_today(held):
    held(
        record("w/o C4", 1), record("full", 1), record("full", 0),
        record("full", 2, lam=0.5), record("full", 3, tuning=True), record("lam=0.1", 0),
    )  # fmt: skip
    found = [(r.variant, r.seed) for r in ablation.runs_of("synthetic")]
    assert found == [("full", 0), ("full", 1), ("w/o C4", 1), ("lam=0.1", 0)]


def test_precision_and_widths_make_no_other_row(held):
    held(record("full", 0, precision="bf16", widths={"synthetic": {"v": 12}}))
    assert len(ablation.runs_of("synthetic")) == 1


def test_runs_on_another_version_of_the_corpus_are_no_rows(held):
    old, new = ({"synthetic": words} for words in ("as it was", "as it is"))
    of_old = [replace(record("full", seed), data=old) for seed in (0, 1)]
    held(*of_old, replace(record("w/o C4", 1, finished="2"), data=new))
    assert [(r.variant, r.seed) for r in ablation.runs_of("synthetic")] == [("w/o C4", 1)]


def test_of_two_runs_todays_code_wins_then_the_newest(held):
    held(record(finished="3", code="old"), record(finished="1"), record(finished="2"))
    assert [r.key for r in ablation.runs_of("synthetic")] == ["full-0-2"]


def test_the_summary_lists_what_the_tables_count(held, monkeypatch):
    found = [record(finished="1"), record(finished="2", mae=0.5), record("full", 1, lam=0.5)]
    held(*found)
    monkeypatch.setattr(pipeline, "load_records", lambda profile: found)
    table, _ = pipeline.summary("synthetic")
    assert table[["variant", "seed", "mae"]].values.tolist() == [["full", 0, 0.5]]


def test_older_code_is_accepted_and_labelled(held):
    held(record(code="old", mae=0.5))
    table = ablation.run_table(ablation.runs_of("synthetic"))
    assert table.loc[0, ["code", "mae", "group"]].tolist() == ["older", 0.5, "components"]


def test_runs_name_the_precision_that_they_were_made_in(held):
    held(record(precision="bf16"), record(seed=1, precision="fp32"))
    table = ablation.run_table(ablation.runs_of("synthetic"))
    assert table["precision"].tolist() == ["bf16", "fp32"]


def test_rows_that_are_no_more_are_left_out(held):
    gone = record()
    held(Record(**{**gone.__dict__, "settings": {**gone.settings, "gone": 1}}))
    assert ablation.runs_of("synthetic") == []


def test_coverage_names_every_row_and_the_reason(held):
    runs = ablation.run_table([record(), record(seed=1)])
    table = ablation.coverage("mmmo-open", runs).set_index("variant")
    assert list(table.index[:2]) == ["full", "w/o C1"] and table.loc["full", "n"] == 2
    assert table.loc["w/o C1", "reason"] == "not run" and table.loc["t", "reason"].endswith("no t")
    assert table.loc["va", "reason"] == "the same as full here"
    assert len(ablation.coverage("synthetic", pd.DataFrame())) == len(ablation.VARIANTS)


def test_rows_that_began_alike_share_a_line_of_stage_1():
    rows = [record(variant, seed) for variant in ("full", "w/o C4", "w/o C3") for seed in (0, 1)]
    rows.append(record("w/o C1", 0))  # has no stage 1

    def first(row, mae):
        key = records.config_key(row.config, 1)
        return Record(**{**row.__dict__, "stage": 1, "config_key": key,
                         "metrics": {"valid": {"mae": mae, "corr": 0.5}}})  # fmt: skip

    stage1 = [first(rows[0], 0.5), first(rows[1], 0.7), first(rows[4], 0.9), first(rows[5], 0.9)]
    found = learnt_in_stage_1(rows, stage1)
    assert list(found.index) == ["full, w/o C4", "w/o C3"] and found["n"].tolist() == [2, 2]
    assert found["valid MAE"].tolist() == [0.6, 0.9]
    assert np.allclose(found["sd"], [0.02**0.5, 0], atol=1e-3)


# ---- reasons ------------------------------------------------------------------------------------


def test_error_changes_by_hand():
    lines = [("full", s, f"u{i}", 0.0, 1.0) for s in (0, 1) for i in range(4)]
    lines += [("w/o N1", s, f"u{i}", 0.0, 1.5 if i < 2 else 0.5) for s in (0, 1) for i in range(4)]
    table = pd.DataFrame(lines, columns=["variant", "seed", "id", "y", "y_hat"])
    found = error_changes(table, {"first": ["u0", "u1"], "last": ["u2", "u3"], "one": ["u0"],
                                 "none": []})  # fmt: skip
    assert found["group"].tolist() == ["first", "last", "one"]
    assert found["difference"].tolist() == [0.5, -0.5, 0.5] and (found["seeds"] == 2).all()
    assert found["se"].tolist()[:2] == [0, 0] and np.isnan(found["se"].iloc[2])  # one utterance


def test_error_changes_vary_with_seeds_and_utterances():
    rng = np.random.default_rng(0)
    lines = [("full", s, f"u{i}", 0.0, 1.0) for s in (0, 1, 2) for i in range(50)]
    lines += [("w/o N1", s, f"u{i}", 0.0, 2 + rng.normal(0, 0.3))
              for s in (0, 1, 2) for i in range(50)]  # fmt: skip
    table = pd.DataFrame(lines, columns=["variant", "seed", "id", "y", "y_hat"])
    found = error_changes(table, {"all": [f"u{i}" for i in range(50)]}).iloc[0]
    assert 0.01 < found["se"] < 0.1 and found["p"] < 0.05


def test_class_groups():
    groups = class_groups(["a", "b", "c"], np.array([-2, 0, -2]))
    assert groups == {"-2": ["a", "c"], "-1": [], "0": ["b"], "+1": [], "+2": []}


def test_gradient_conflict_equals_a_loop(tiny_config, toy_batch):
    torch.manual_seed(0)
    model = build_model(tiny_config())
    freeze_for_fine_tuning(model, injected=("t",), freeze_adapters=True)
    contrast, batch = ContrastConfig(lam=0.5), toy_batch(6)
    found = gradient_conflict(model, [batch], contrast).set_index("group")
    assert set(found.index) == {"text backbone", "vision backbone", "audio backbone",
                                "vision adapter", "audio adapter"}  # fmt: skip
    model.eval()
    flat = []
    for term in (0, 1):
        model.zero_grad()
        output = model(batch)
        con = contrastive_loss(output.reps, batch.y, output.names)
        (con if term else task_loss(output.y_hat, batch.y)).backward()
        part = [p for n, p in model.named_parameters() if n.startswith("encoders.v")]
        flat.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                               for p in part]))  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
    assert np.isclose(found.loc["vision backbone", "cosine"], cosine, atol=1e-4)
    ratio = (0.5 * flat[1].norm() / flat[0].norm()).item()
    assert np.isclose(found.loc["vision backbone", "ratio"], ratio, rtol=1e-3)


def test_external_distance_of_a_corpus_to_itself_and_without_text(make_tiny_store):
    from conki_lib.data import open_store

    store = open_store(make_tiny_store(sizes=(30, 6, 6)))
    other = open_store(make_tiny_store("other", sizes=(30, 6, 6)))
    found = external_distance(store, other).set_index("measure")["value"]
    assert found["words known"] == 1 and np.isclose(found["words of target"],
                                                    found["words of external"])  # fmt: skip
    assert found["corpora told apart"] <= 0.6
    assert np.isclose(found["label mean, target"], store["train"].y.mean())


def test_what_readme_says_in_short_is_what_the_records_say():
    git = ["git", "-C", str(ROOT), "status", "--porcelain", "results"]
    changed = subprocess.run(git, capture_output=True, text=True)
    if changed.returncode or changed.stdout:
        pytest.skip("README speaks of the committed results; here are others")
    said = " ".join((ROOT / "README.md").read_text().split("In short,")[1].split())
    tables, ranks, last = {}, {}, []
    for profile in ("mosi-open", "mmmo-open", "synthetic"):
        table = pd.read_csv(ROOT / f"results/{profile}/tables/differences.csv", index_col="row")
        numbers = table["MAE"].str.findall(r"[+-]\d+\.\d+").tolist()
        table[["gap", "low", "high"]] = np.array(numbers, float)
        tables[profile] = table
        runs = ablation.runs_of(profile)
        mae = pd.DataFrame([(r.variant, r.metrics["valid"]["mae"]) for r in runs])
        ranks[profile] = mae.groupby(0)[1].mean().rank()
        last = [r.best_epoch == r.settings["epochs"] for r in runs]
    widths = {}
    for profile, table in tables.items():
        contrast = table.loc[["w/o C4", "w/o N1"]]
        assert (contrast["p (MAE)"].astype(float) > 0.05).all()
        widths[profile] = ((contrast["high"] - contrast["low"]) / 2).round(2)
    assert (widths.pop("mosi-open") == 0.02).all() and "about .02 on CMU-MOSI" in said
    others = np.concatenate(list(widths.values()))
    assert f"below {others.min():.2f} to {others.max():.2f} on".replace("0.", ".") in said
    mmmo = tables["mmmo-open"]
    controls = mmmo.loc["late fusion":"LMF + external"]
    assert (mmmo["gap"] > 0).all() and (controls["low"] > 0).all()
    assert (controls["p Holm (MAE)"].astype(float) > 0.05).all()
    assert f"only {ranks['mmmo-open']['full']:.0f}th of {len(ranks['mmmo-open'])} rows" in said
    text = tables["mosi-open"].loc["text-only + external"]
    p, holm = (f"{float(text[c]):.3f}".lstrip("0") for c in ("p (MAE)", "p Holm (MAE)"))
    assert text["gap"] < 0 and f"(p {p}; {holm[:3]} after correction" in said
    assert f"In {sum(last)} of {len(last)} runs" in said  # of synthetic
