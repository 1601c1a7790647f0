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
    pair = statistics.pair_up(table, "w/o N1")
    found = statistics.weighted_scores(pair.row, pair.y, np.ones((1, 200)), metrics=metrics)
    assert tuple(found) == statistics.METRICS[metrics]
    for s in range(3):
        for name, value in score(y_hat=pair.row[s], y=pair.y).items():
            assert np.isclose(found[name][0, s], value, rtol=1e-9), name


def test_a_weight_counts_like_a_repetition():
    pair = statistics.pair_up(predictions(n=30), "w/o N1")
    weights = np.random.default_rng(1).integers(0, 4, (1, 30)).astype(float)
    found = statistics.weighted_scores(pair.row, pair.y, weights)
    repeated = np.repeat(np.arange(30), weights[0].astype(int))
    for name, value in mosi_metrics(y_hat=pair.row[0][repeated], y=pair.y[repeated]).items():
        assert np.isclose(found[name][0, 0], value), name


def test_undefined_metrics_are_nan():
    y = np.zeros(5, np.float32)
    found = statistics.weighted_scores(np.ones((1, 5), np.float32), y, np.ones((1, 5)))
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
    pair = statistics.pair_up(table, "w/o N1")
    assert pair.seeds == [0] and pair.row.shape == (1, 60)
    again = table.query("variant == 'full' and seed == 0")
    assert np.array_equal(pair.base[0], again["y_hat"]) and list(again["id"]) == pair.ids
    assert statistics.pair_up(table[table["seed"] == 1], "w/o N1") is None


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


def test_no_shared_seed_gives_an_empty_table():
    assert len(statistics.paired_differences(predictions(rows=("full",)))) == 0


def test_one_seed_is_a_paired_t_test():
    d = np.random.default_rng(0).normal(0.1, 1, (1, 40))
    found, expected = statistics.crossed_test(d), stats.ttest_1samp(d[0], 0)
    assert np.isclose(found["p"], expected.pvalue) and found["df"] == 39


def test_crossed_test_keeps_its_level_where_seeds_and_utterances_vary():
    rng, rejected, naive = np.random.default_rng(0), 0, 0
    for _ in range(300):
        d = rng.normal(0, 0.5, (5, 1)) + rng.normal(0, 1, (1, 80)) + rng.normal(0, 1, (5, 80))
        rejected += statistics.crossed_test(d)["p"] < 0.05
        naive += stats.ttest_1samp(d.mean(0), 0).pvalue < 0.05
    assert rejected <= 30 and naive > 90  # a test over utterances alone takes a seed for an effect


def test_crossed_test_of_nothing():
    assert statistics.crossed_test(np.zeros((3, 5)))["p"] == 1.0


def test_holm_by_hand():
    corrected = statistics.holm([0.01, 0.04, np.nan, 0.03])
    assert np.allclose(corrected[[0, 1, 3]], [0.03, 0.06, 0.06]) and np.isnan(corrected[2])
    assert statistics.holm([0.6, 0.9]).max() == 1.0


def test_published_averages_are_fractions_and_name_no_conki():
    table = statistics.published("mosi-open")
    assert table.loc["TFN", "mae"] == 0.9473 and table.loc["TFN", "acc2_non0"] == 0.7908
    assert statistics.published("sims").loc["LMF", "acc3"] == pytest.approx(0.6468)
    assert len(statistics.published("mosei")) == 11 and statistics.published("synthetic").empty
    assert not any("conki" in name.lower() for name in table.index)


def test_label_range_decides_the_metrics():
    assert statistics.metric_set((-1.0, 1.0)) == "sims"
    assert statistics.metric_set([-3.0, 3.0]) == "mosi"
