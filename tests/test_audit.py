"""The audit: rows are complete, measurements are true, and the page says what was measured."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from conki_lib import ablation, audit
from conki_lib.config import ROOT, RunConfig
from conki_lib.losses import contrastive_loss
from conki_lib.pairs import REPS, sentiment_class
from conki_lib.records import Record

ROWS = audit.read_rows()
SECTION_7 = [
    "contrastive loss", "tau and lambda", "data", "feature widths", "vision and audio encoder",
    "padded steps in means", "hidden states", "adapters", "pooling of A_t", "fusion network",
    "stage 1", "stage 2", "model selection", "seeds",
]  # fmt: skip
FOUND = [
    "adapters attend to padding", "ordered or unordered", "heads in stage 2", "ties",
    "choice of settings", "gradient clipping", "weight decay of biases", "as they are fed",
    "without a positive",
]  # fmt: skip


def test_every_known_point_is_a_row():
    points = [row["point"] for row in ROWS]
    for wanted in (*SECTION_7, *FOUND):
        assert any(wanted in point for point in points), wanted
    assert len(set(points)) == len(points)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["point"])
def test_rows_are_whole_and_name_what_exists(row):
    assert set(row) == {"point", "paper", "released", "ours", "setting", "effect", "rows"}
    assert all(isinstance(row[k], str) and row[k] for k in ("paper", "released", "ours", "setting"))
    measured = {*audit.TOYS, "ties", "tokens", "selection", "seeds", "acc2"}
    measured |= {f"sweep of {setting}" for setting in ("lam", "tau", "batch_size")}
    assert set(row["effect"]) <= measured
    for name in row["rows"]:
        ablation.variant(name)


def test_settings_exist():
    known = RunConfig().flat()
    for row in ROWS:
        for part in row["setting"].replace(";", ",").split(","):
            name = part.split(":")[0].strip()
            if name.isidentifier() and name not in ("none", "preset"):
                assert name in known, (row["point"], name)


def test_the_noise_of_a_trial_is_that_of_the_records():
    (row,) = [row for row in ROWS if row["point"] == "choice of settings"]
    asked = {"batch_size": 16, "lr_text": 1e-4, "lr_heads": 3e-4, "epochs": 6, "precision": "bf16"}
    for name in ("tuning", "records"):
        lines = (ROOT / f"results/mosi-open/{name}.jsonl").read_text().splitlines()
        runs = [r for r in map(json.loads, lines) if r["variant"] == "full" and r["seed"] == 0]
        (run,) = [r for r in runs if asked.items() <= r["settings"].items()]
        said = f"{run['metrics']['valid']['mae']:.3f}".removeprefix("0")
        assert re.search(rf"{said} in {name}\.jsonl \({run['provenance']['device']}", row["ours"])


def test_weighted_p1_is_the_papers_loss_and_a_loop():
    reps, y = audit.toy_reps(5)
    ordered = audit.pooled_loss(reps, y)
    assert torch.isclose(ordered, contrastive_loss(reps, y, form="paper"))
    half = audit.pooled_loss(reps, y, within=0.5).item()
    z = torch.nn.functional.normalize(reps.detach().flatten(0, 1), dim=1).numpy()
    classes, total, K = sentiment_class(y).tolist(), 0.0, len(REPS)
    for i in range(5):
        up = down = weights = 0.0
        for p in range(K * i, K * i + K):
            for q in range(len(z)):
                j, kind = q // K, REPS[p % K][0] == REPS[q % K][0]
                if p == q or (j == i and kind and q < p):
                    continue  # within a sample each unordered pair of P1 counts once
                score = z[p] @ z[q] / 0.07
                down += np.exp(score)
                if kind and classes[i] == classes[j]:
                    up, weights = up + score, weights + 1
        total += np.log(down) - up / weights
    assert np.isclose(half, total)


def test_the_released_form_is_a_plain_supervised_contrastive_loss():
    reps, y = audit.toy_reps(6)
    kind = torch.tensor([name[0] == "O" for name in REPS]).repeat(6)
    label = 2 * sentiment_class(y).repeat_interleave(len(REPS)) + kind
    plain = audit.supervised_contrastive(reps.flatten(0, 1), label)
    assert torch.isclose(plain, contrastive_loss(reps, y))


def test_padding_moves_outputs_as_released_only():
    masked, released = (audit.padding_effect(p, 15) for p in ("masked", "released"))
    assert max(masked.values()) < 1e-5 and min(released.values()) > 0.02


def test_ties_by_hand():
    found = audit.ties(np.array([0.5, 0.0, 1.0, 1.2]))  # 0.5: class 0 to even, 1 away from 0
    assert found["labels"] == 0.25 and np.isclose(found["pairs"], 6 / 12)


def test_toys_speak():
    for name in ("form", "n1", "p1", "supcon", "init", "stack", "gate"):
        text = audit.TOYS[name]()
        assert any(c.isdigit() for c in text) and text == audit.TOYS[name]()


def test_effects_of_records_come_from_runs_alone(monkeypatch):
    monkeypatch.setattr(audit, "runs_of", lambda profile: [])
    differences = audit.row_differences("synthetic")
    assert set(differences) == {"rows", "switches", "sweeps"}
    assert all(table.empty for table in differences.values())
    assert audit.record_effects("synthetic", differences) == {}


def test_effects_are_row_minus_full_with_holm_over_the_rows(monkeypatch):
    found, tables = [], []
    rows = {"full": 1.0, "w/o N1": 1.5, "w/o P1": 0.75, "lam=1": 1.25, "lam=0.3": 1.0}
    rows["fusion=concat"] = 1.1
    for row, error in rows.items():
        for seed in (0, 1, 2):
            key, wobble = f"{row}{seed}", 0.01 * seed
            found.append(Record(
                stage=2, profile="synthetic", variant=row, fold="standard", seed=seed, key=key,
                config_key="", settings={"target": "toy"}, data={}, code="",
                metrics={"test": {"mae": error}}, best_epoch=1,
                history=[{"valid_mae": 0.5}, {"valid_mae": 0.6}],
            ))  # fmt: skip
            y_hat = error + wobble * (row != "full") + np.zeros(30)
            ids = [f"v{i // 3}$_${i}" for i in range(30)]
            columns = {"key": key, "fold": "standard", "variant": row, "seed": seed, "id": ids}
            tables.append(pd.DataFrame(columns | {"split": "test", "y": 0.0, "y_hat": y_hat}))
    monkeypatch.setattr(audit, "runs_of", lambda profile: found)
    monkeypatch.setattr(audit, "predictions", lambda profile: pd.concat(tables))
    differences = audit.row_differences("toy", draws=100)
    effects = audit.record_effects("toy", differences)
    assert effects["w/o N1"].startswith("w/o N1: MAE +0.510 [") and "n = 3" in effects["w/o N1"]
    assert effects["w/o P1"].startswith("w/o P1: MAE -0.240 [") and "full" not in effects
    # two rows, as sweeps and switches are families of their own: Holm doubles the smaller p
    line = 2 * stats.t.sf(0.51 / (0.01 / 3**0.5), 2)
    assert effects["w/o N1"].endswith(f"Holm p {2 * line:.2g}")
    (alone,) = differences["switches"].query("metric == 'mae'").itertuples()
    assert alone.variant == "fusion=concat" and alone.p_holm == alone.p
    assert effects["fusion=concat"].startswith("fusion=concat: MAE +0.110 [")
    sweep = effects["sweep of lam"]
    assert ", 2 other values, n = 3: MAE +0.010 (lam=0.3) to +0.260 (lam=1);" in sweep
    assert sweep.endswith("at Holm p < 0.05: lam=1") and "lam=1" not in effects
    assert effects["selection"].startswith("the last epoch's validation MAE is +0.100")


def test_the_page_shows_toys_once_and_rows_per_profile(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "audit.yml").write_text((ROOT / "docs" / "audit.yml").read_text())
    assert "not measured" in audit.page(tmp_path)
    for profile in ("a", "b"):
        folder = tmp_path / "results" / profile
        folder.mkdir(parents=True)
        effects = {"form": "same toy", "form=paper": f"form=paper: {profile}1"}
        (folder / "audit_effects.json").write_text(json.dumps(effects))
    line = next(x for x in audit.page(tmp_path).splitlines() if x.startswith("| contrastive loss"))
    assert line.count("same toy") == 1
    assert "a: form=paper: a1<br>b: form=paper: b1" in line


def test_a_sweep_is_training_and_a_toy_is_not():
    point = {"rows": ["w/o N1"], "effect": ["sweep of tau", "form"]}
    training, other = audit.measured_by(point, {})
    for effect, found in (("w/o N1", [True, False]), ("sweep of tau", [True, False]),
                          ("form", [False, True]), ("lam=1", [False, False])):  # fmt: skip
        by = audit.measured_by(point, {effect: "x"})
        assert [by[training], by[other]] == found


def test_the_committed_page_is_the_generated_one():
    path = ROOT / "docs" / "AUDIT.md"
    assert path.read_text() == audit.page()
