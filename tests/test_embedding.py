"""Representations: numbers against known geometry, maps that come back, moments of a run."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conki_lib import embedding
from conki_lib.embedding import Representations

NAMES = ("O_t", "O_a", "A_t", "A_a")


def clouds(n=40, *, apart=3.0, by_class=1.0, seed=0, d=6) -> Representations:
    """O and A lie `apart`; within a kind, the label moves a row by `by_class`."""
    rng = np.random.default_rng(seed)
    y = np.repeat([-2.0, -1.0, 1.0, 2.0], n // 4).astype(np.float32)
    reps = rng.normal(0, 0.3, (n, len(NAMES), d))
    reps[:, :, 1] += by_class * y[:, None]
    reps[:, :2, 0] += apart
    reps[:, 2:, 0] -= apart
    return Representations(reps.astype(np.float32), NAMES, tuple(f"u{i}" for i in range(n)), y)


def test_numbers_see_what_was_built_in():
    far = embedding.separability(clouds(seed=1), clouds())
    near = embedding.separability(clouds(seed=1, apart=0.0), clouds(apart=0.0))
    assert far["silhouette_kind"] > 0.6 > 0.1 > near["silhouette_kind"]
    blind = embedding.separability(clouds(seed=1, by_class=0.0), clouds(by_class=0.0))
    for name in NAMES:
        assert far["probe_corr"][name] > 0.9 > 0.5 > blind["probe_corr"][name]
        assert far["silhouette_class"][name] > blind["silhouette_class"][name]
    assert far["names"] == list(NAMES) and far["n"] == 40


def test_one_kind_has_no_silhouette_between_kinds():
    found = clouds()
    only = Representations(found.reps[:, :2], NAMES[:2], found.ids, found.y)
    assert np.isnan(embedding.separability(only, only)["silhouette_kind"])


def test_alignment_and_uniformity_by_hand():
    reps = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0]]], np.float32)
    found = Representations(reps, ("O_t", "O_v"), ("a", "b"), np.array([1.0, 1.0], np.float32))
    got = embedding.alignment_and_uniformity(found)
    assert np.isclose(got["alignment_P1"], (2 + 4) / 2)  # (O_t, O_v) of either sample
    assert np.isclose(got["alignment_P2"], (0 + 4 + 2 + 2) / 4)
    squares = np.array([2, 0, 4, 2, 2, 4])  # six unordered pairs of four rows
    assert np.isclose(got["uniformity"], np.log(np.exp(-2.0 * squares).mean()))


def test_cka_knows_rotations_and_strangers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 5))
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert np.isclose(embedding.linear_cka(x, 3 * x @ rotation + 7), 1)
    strangers = [embedding.linear_cka(x, rng.normal(size=(50, 60))) for _ in range(30)]
    assert abs(np.mean(strangers)) < 0.03  # the plain estimate gives 0.3 here
    assert 0.3 < embedding.linear_cka(x, x + 1.2 * rng.normal(size=(50, 5))) < 0.9
    assert np.isnan(embedding.linear_cka(x, np.ones((50, 2))))


def test_rows_are_unit_and_sample_major():
    rows = clouds().rows()
    assert rows.shape == (160, 6) and np.allclose(np.linalg.norm(rows, axis=1), 1)
    first = clouds().reps[0, 1]
    assert np.allclose(rows[1], first / np.linalg.norm(first), atol=1e-6)


def test_sample_is_spread_over_the_split():
    part = clouds().sample(10)
    assert len(part.y) == 10 and part.ids[0] == "u0" and part.ids[-1] == "u39"
    assert clouds().sample(1000).ids == clouds().ids


def test_maps_come_back_and_separate_kinds():
    found = clouds(n=24)
    table = embedding.maps(found, {"t-SNE": [5, 12]}, seeds=(0, 1))
    assert len(table) == 24 * 4 * 2 * 2 and list(table["rep"][:4]) == list(NAMES)
    assert table.equals(embedding.maps(found, {"t-SNE": [5, 12]}, seeds=(0, 1)))
    one = table[(table["setting"] == 12) & (table["seed"] == 0)]
    other = table[(table["setting"] == 12) & (table["seed"] == 1)]
    assert not np.allclose(one[["x1", "x2"]], other[["x1", "x2"]])
    centre = one.groupby(one["rep"].str[0])[["x1", "x2"]].mean()
    spread = one.groupby(one["rep"].str[0])[["x1", "x2"]].std().max().max()
    assert np.linalg.norm(centre.loc["O"] - centre.loc["A"]) > spread


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")  # numba's and umap's own, of several kinds
def test_umap_comes_back():
    rows = clouds(n=12).rows()
    one, two = (embedding.project(rows, "UMAP", setting=5, seed=3) for _ in range(2))
    assert one.shape == (48, 2) and np.array_equal(one, two)


def test_unknown_method():
    with pytest.raises(ValueError, match="known are t-SNE, UMAP"):
        embedding.project(np.eye(5), "PCA")


def test_represent_keeps_the_splits_order(tiny_config, toy_batch):
    from conki_lib.model import build_model

    torch.manual_seed(0)
    model = build_model(tiny_config())
    batch = toy_batch(5)
    shuffled = replace(batch, index=torch.tensor([3, 1, 4, 0, 2]))
    expected = model.eval()(batch).reps.detach().numpy()
    found = embedding.represent(model, [shuffled])
    assert found.names == ("O_t", "O_v", "O_a", "A_t", "A_v", "A_a")
    assert np.allclose(found.reps[shuffled.index.numpy()], expected, atol=1e-6)
    assert [found.ids[k] for k in (3, 1, 4)] == ["u0", "u1", "u2"]


def test_controls_have_nothing_to_show(tiny_config, toy_batch):
    from conki_lib.model import build_model

    with pytest.raises(ValueError, match="no representations"):
        embedding.represent(build_model(tiny_config(kind="tfn")), [toy_batch(3)])


@pytest.mark.slow
def test_moments_of_a_run(make_tiny_store, tmp_path, monkeypatch):
    from conki_lib import training
    from conki_lib.config import RunConfig
    from conki_lib.reasons import conflict_along

    make_tiny_store("target", sizes=(12, 4, 4))
    make_tiny_store("outside", sizes=(12, 4, 4), widths={"v": 4, "a": 3})
    monkeypatch.setenv("CONKI_DATA", str(tmp_path))
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    config = RunConfig(
        profile="toy", target="target", external="outside", modalities="va", d=16, encoder_heads=2,
        encoder_ff=16, adapter_width=8, adapter_heads=2, adapter_ff=8, epochs=1, stage1_epochs=1,
        batch_size=8, device="cpu",
    )  # fmt: skip
    record = training.fine_tune(config)
    name = "adapters.v.chain.0.down.weight"
    weights = {m: model.state_dict()[name].clone() for m, model in embedding.models_along(record)}
    assert tuple(weights) == embedding.MOMENTS
    before, injected, after = weights.values()
    assert not torch.equal(before, injected)  # stage 1 trains adapters
    assert torch.equal(injected, after)  # stage 2 leaves them alone
    found = conflict_along(record, batches=2)
    assert set(found["moment"]) == {"start of stage 2", "chosen epoch"}
    assert set(found["group"]) == {"vision backbone", "audio backbone"}
    assert found["cosine"].between(-1, 1).all() and (found["ratio"] > 0).all()
