"""Means, paired differences, intervals, corrected tests: against metrics, loops and known cases."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from conki_lib import statistics
from conki_lib.metrics import mosi_metrics, sims_metrics


def predictions(rows=("full", "w/o N1"), seeds=(0, 1, 2), n=60, shift=0.0, limit=3.0):
    """Rows whose errors differ by `shift` and by noise; truth the same for all."""
    rng = np.random.default_rng(0)
    y = np.clip(rng.normal(0, limit / 2, n), -limit, limit).round(1).astype(np.float32)
    lines = []
    for k, row in enumerate(rows):
        for seed in seeds:
            noise = np.random.default_rng((seed, k)).normal(0, 0.4, n)
            y_hat = (y + noise + k * shift).astype(np.float32)
            lines.append(
                pd.DataFrame({"key": f"{row}{seed}", "fold": "standard", "variant": row,
                              "seed": seed, "split": "test", "id": [f"u{i}" for i in range(n)],
                              "y": y, "y_hat": y_hat})
            )  # fmt: skip
    return pd.concat(lines, ignore_index=True)


@pytest.mark.parametrize(("metrics", "limit"), [("mosi", 3.0), ("sims", 1.0)])
def test_equal_weights_give_the_metrics(metrics, limit):
    table = predictions(n=200, limit=limit)
    score = sims_metrics if metrics == "sims" else mosi_metrics
    pair = statistics.pair_up(*statistics.by_run(table), "w/o N1")
    once = statistics.Draws(np.ones((1, 200)), np.arange(200))
    found = statistics.drawn_scores(pair.row, pair.y, once, metrics=metrics)
    assert tuple(found) == statistics.METRICS[metrics]
    for s in range(3):
        for name, value in score(y_hat=pair.row[s], y=pair.y).items():
            assert np.isclose(found[name][0, s], value, rtol=1e-9), name


def test_a_weight_counts_like_a_repetition():
    pair = statistics.pair_up(*statistics.by_run(predictions(n=30)), "w/o N1")
    weights = np.random.default_rng(1).integers(0, 4, (1, 30)).astype(float)
    found = statistics.drawn_scores(pair.row, pair.y, statistics.Draws(weights, np.arange(30)))
    repeated = np.repeat(np.arange(30), weights[0].astype(int))
    for name, value in mosi_metrics(y_hat=pair.row[0][repeated], y=pair.y[repeated]).items():
        assert np.isclose(found[name][0, 0], value), name


def test_undefined_metrics_are_nan():
    y = np.zeros(5, np.float32)
    once = statistics.Draws(np.ones((1, 5)), np.arange(5))
    found = statistics.drawn_scores(np.ones((1, 5), np.float32), y, once)
    assert all(np.isnan(found[name][0, 0]) for name in ("corr", "acc2_non0", "f1_non0"))
    assert found["mae"][0, 0] == 1


def test_recompute_scores_every_run_and_split():
    table = predictions()
    both = pd.concat([table, table.assign(split="valid", y_hat=table["y"])])
    found = statistics.recompute(both)
    assert len(found) == 12
    assert (found.query("split == 'valid'")["mae"] == 0).all()
    one = table[table["key"] == "full1"]
    line = found.query("key == 'full1' and split == 'test'").iloc[0]
    assert line["corr"] == mosi_metrics(y_hat=one["y_hat"], y=one["y"])["corr"]


def test_summarise_is_mean_and_sample_deviation():
    runs = pd.DataFrame({"variant": ["a", "a", "b"], "mae": [1.0, 3.0, 5.0],
                         "code": ["older", "current", "current"]})  # fmt: skip
    table = statistics.summarise(runs, ["mae"])
    assert table.loc["a", ["n", "older", "mae"]].tolist() == [2, 1, 2.0]
    assert np.isclose(table.loc["a", "mae_sd"], 2**0.5) and np.isnan(table.loc["b", "mae_sd"])


def test_pairs_share_seeds_and_utterances():
    table = predictions(seeds=(0, 1))
    table = table.drop(table.query("variant == 'w/o N1' and seed == 1").index)
    pair = statistics.pair_up(*statistics.by_run(table), "w/o N1")
    assert pair.seeds == [0] and pair.row.shape == (1, 60)
    again = table.query("variant == 'full' and seed == 0")
    assert np.array_equal(pair.base[0], again["y_hat"]) and list(again["id"]) == pair.ids
    assert statistics.pair_up(*statistics.by_run(table[table["seed"] == 1]), "w/o N1") is None


def test_differences_find_a_shift_and_no_shift():
    worse = statistics.paired_differences(predictions(shift=1.0), draws=300)
    mae = worse[worse["metric"] == "mae"].iloc[0]
    assert 0 < mae["low"] < mae["difference"] < mae["high"] and mae["p_holm"] < 0.01
    same = statistics.paired_differences(predictions(shift=0.0), draws=300)
    mae = same[same["metric"] == "mae"].iloc[0]
    assert mae["low"] < 0 < mae["high"] and mae["p"] > 0.05


def test_the_difference_is_the_difference_of_means_over_seeds():
    table = predictions(shift=0.3)
    found = statistics.paired_differences(table, draws=50).set_index("metric")["difference"]
    scored = statistics.recompute(table).groupby("variant")[["mae", "corr", "f1_non0"]].mean()
    for name in scored:
        assert np.isclose(found[name], scored.loc["w/o N1", name] - scored.loc["full", name])


def test_drawing_videos_widens_the_interval_of_clustered_errors():
    table = predictions(n=80, seeds=(0,))
    video = {f"u{i}": f"v{i // 20}" for i in range(80)}
    change = table["id"].map(video).map({"v0": 0.5, "v1": -0.5, "v2": 0.5, "v3": -0.5})
    row = table["variant"] != "full"
    table["y_hat"] = (table["y"] + 1 + change * row).astype(np.float32)  # |error| 1, or 1 +- 0.5
    widths = []
    for clusters in (None, video):
        found = statistics.paired_differences(table, clusters=clusters, draws=400)
        line = found.set_index("metric").loc["mae"]
        widths.append(line["high"] - line["low"])
    assert widths[1] > 3 * widths[0]
    low, high = stats.t.interval(0.95, 79, scale=0.5 / 80**0.5)
    assert np.isclose(widths[0], high - low, rtol=0.1)


def test_no_shared_seed_gives_an_empty_table():
    assert len(statistics.paired_differences(predictions(rows=("full",)))) == 0


def by_utterance(d, draws=4000):
    """`crossed_interval` of a table of seeds by utterances."""
    weights = np.random.default_rng(5).multinomial(d.shape[1], [1 / d.shape[1]] * d.shape[1], draws)
    return statistics.crossed_interval(d.mean(1), weights @ d.T / d.shape[1], d.shape[1])


def anova(d):
    """The same from the mean squares of a two-way analysis of variance, by loops."""
    S, U = d.shape
    mean = sum(d[s, u] for s in range(S) for u in range(U)) / (S * U)
    seeds = U * sum((d[s].mean() - mean) ** 2 for s in range(S)) / (S - 1)
    utterances = S * sum((d[:, u].mean() - mean) ** 2 for u in range(U)) / (U - 1)
    rest = sum((d[s, u] - d[s].mean() - d[:, u].mean() + mean) ** 2
               for s in range(S) for u in range(U)) / ((S - 1) * (U - 1))  # fmt: skip
    total = seeds + utterances - rest
    free = (S - 1, U - 1, (S - 1) * (U - 1))
    df = total**2 / sum(q**2 / k for q, k in zip((seeds, utterances, rest), free, strict=True))
    se = (total / (S * U)) ** 0.5
    return mean, se, 2 * stats.t.sf(abs(mean) / se, df), stats.t.ppf(0.975, df) * se


def test_crossed_interval_equals_the_analysis_of_variance():
    rng = np.random.default_rng(1)
    d = 0.2 + rng.normal(0, 0.3, (4, 1)) + rng.normal(0, 1, (1, 60)) + rng.normal(0, 0.5, (4, 60))
    found, (mean, se, p, reach) = by_utterance(d), anova(d)
    assert np.isclose(found["difference"], mean)
    assert np.isclose(found["se"], se, rtol=0.04) and np.isclose(found["p"], p, rtol=0.1)
    assert np.isclose(found["high"] - mean, reach, rtol=0.05)
    assert np.isclose(mean - found["low"], reach, rtol=0.05)


def test_one_seed_is_an_interval_over_utterances_without_a_test():
    d = np.random.default_rng(0).normal(0.1, 1, (1, 40))
    found, expected = by_utterance(d), stats.ttest_1samp(d[0], 0).confidence_interval()
    assert np.isnan(found["p"])
    assert np.allclose([found["low"], found["high"]], [expected.low, expected.high], atol=0.03)


@pytest.mark.parametrize("S", [2, 3, 5])
def test_the_crossed_test_keeps_its_level_and_has_power(S):
    rng, fooled, found, naive, N = np.random.default_rng(0), 0, 0, 0, 300
    for _ in range(N):
        d = rng.normal(0, 0.4, (S, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 1, (S, 40))
        fooled += by_utterance(d, draws=200)["p"] < 0.05
        found += by_utterance(d + 3, draws=200)["p"] < 0.05
        naive += stats.ttest_1samp(d.mean(0), 0).pvalue < 0.05
    # utterances alone take a seed for an effect; two seeds cannot prove much
    assert 0.01 * N < fooled < 0.1 * N < 0.15 * N < naive and found > (0.5 if S == 2 else 0.9) * N


def test_an_interval_of_nothing():
    same = by_utterance(np.ones((3, 5)), draws=50)
    assert (same["low"], same["high"], same["se"]) == (1, 1, 0)
    undefined = statistics.crossed_interval(np.array([0.1, np.nan]), np.ones((9, 2)), 9)
    assert np.isnan([undefined[k] for k in ("difference", "low", "high", "se", "p")]).all()


def shifted(*shifts, n=400):
    """Rows whose errors are 1 plus a shift per seed, of one sign: an exact difference."""
    lines = [
        (row, s, f"u{i}", 0.0, 1.0 + x * (row != "full"))
        for row in ("full", "w/o N1")
        for s, x in enumerate(shifts)
        for i in range(n)
    ]
    return pd.DataFrame(lines, columns=["variant", "seed", "id", "y", "y_hat"])


def test_seeds_are_paired_and_their_spread_counts():
    table = shifted(0.1, 0.3)
    base = table["variant"] == "full"
    table.loc[base & (table["seed"] == 1), "y_hat"] += 0.2  # its own luck: the row shares it
    mae = statistics.paired_differences(table, draws=50).set_index("metric").loc["mae"]
    assert np.isclose(mae["se"], 0, atol=1e-6) and np.isclose(mae["difference"], 0.1)
    mae = statistics.paired_differences(shifted(0.1, 0.3), draws=50).set_index("metric").loc["mae"]
    se = np.std([0.1, 0.3], ddof=1) / 2**0.5
    assert np.isclose(mae["se"], se, rtol=1e-4)
    assert np.isclose(mae["high"], 0.2 + stats.t.ppf(0.975, 1) * se, rtol=1e-3)


def test_both_rows_are_scored_on_the_same_draws():
    rng = np.random.default_rng(0)
    table = predictions(n=100, seeds=(0, 1))
    hard = dict(zip(table["id"].unique(), rng.normal(0, 2, 100), strict=True))
    table["y_hat"] = table["y"] + table["id"].map(hard) + 0.1 * (table["variant"] != "full")
    mae = statistics.paired_differences(table, draws=200).set_index("metric").loc["mae"]
    assert mae["se"] < 0.02  # the difficulty of an utterance is common to both


def test_sims_differences_are_of_clipped_predictions():
    table = shifted(0.5, 0.7).assign(y=1.0)  # 1.0 and 1.5 are both 1 when clipped
    mae = statistics.paired_differences(table, metrics="sims", draws=50).set_index("metric")
    assert mae.loc["mae", "difference"] == 0 and mae.loc["mae", "high"] == 0


def test_an_utterance_that_one_run_lacks_is_left_out():
    table = predictions(seeds=(0, 1))
    gap = (table["variant"] == "full") & (table["seed"] == 1) & (table["id"] == "u3")
    pair = statistics.pair_up(*statistics.by_run(table[~gap]), "w/o N1")
    assert "u3" not in pair.ids and len(pair.ids) == 59 and pair.seeds == [0, 1]
    assert np.isfinite(pair.row).all() and np.isfinite(pair.base).all()


def test_a_collapsed_run_does_not_improve_its_row():
    runs = pd.DataFrame({"variant": ["a", "a"], "corr": [0.5, np.nan]})
    assert np.isnan(statistics.summarise(runs, ["corr"]).loc["a", "corr"])


def test_videos_come_from_the_store_or_from_the_id(make_tiny_store, monkeypatch, tmp_path):
    monkeypatch.setattr(statistics, "corpus_path", lambda name: tmp_path / "absent")
    assert statistics.videos_of("toy", ["a$_$1", "a$_$2", "b"]) == {
        "a$_$1": "a", "a$_$2": "a", "b": "b"}  # fmt: skip
    path = make_tiny_store()
    monkeypatch.setattr(statistics, "corpus_path", lambda name: path)
    ids = statistics.open_store(path)["test"].columns["id"]
    found = statistics.videos_of("toy", ids)
    assert len(set(found.values())) < len(ids) and set(found) == set(ids)


def test_holm_by_hand():
    corrected = statistics.holm([0.01, 0.04, np.nan, 0.03])
    assert np.allclose(corrected[[0, 1, 3]], [0.03, 0.06, 0.06]) and np.isnan(corrected[2])
    assert statistics.holm([0.6, 0.9]).max() == 1.0


def test_correction_is_over_all_rows_metric_by_metric():
    table = pd.DataFrame({"metric": ["mae", "corr"] * 2, "p": [0.01, 0.2, np.nan, 0.02]})
    found = statistics.corrected(table)["p_holm"]
    assert np.allclose(found, [0.01, 0.2, np.nan, 0.04], equal_nan=True)
    assert statistics.corrected(pd.DataFrame()).empty


def test_correction_within_groups_stands_beside_that_over_all_rows():
    table = pd.DataFrame({"metric": "mae", "p": [0.01, 0.02, 0.03], "group": ["a", "a", "b"]})
    found = statistics.corrected(table)
    assert np.allclose(found["p_holm"], [0.03, 0.04, 0.04])
    assert np.allclose(found["p_group"], [0.02, 0.02, 0.03])


def test_published_averages_are_fractions_and_name_no_conki():
    table = statistics.published("mosi-open")
    assert table.loc["TFN", "mae"] == 0.9473 and table.loc["TFN", "acc2_non0"] == 0.7908
    assert statistics.published("sims").loc["LMF", "acc3"] == pytest.approx(0.6468)
    assert len(statistics.published("mosei")) == 11 and statistics.published("synthetic").empty
    assert not any("conki" in name.lower() for name in table.index)


def test_the_metrics_names_tell_the_convention():
    assert statistics.metric_set(statistics.SIMS_METRICS) == "sims"
    assert statistics.metric_set(statistics.MOSI_METRICS) == "mosi"
