"""Linear probes: they find what is there, and nothing where there is nothing."""

import numpy as np
import pytest

from conki_lib.data import open_store
from conki_lib.metrics import sims_metrics
from conki_lib.probes import (
    MOST_WORDS,
    bag_of_words,
    clip_means,
    probe_modalities,
    ridge_predict,
    ridge_probe,
    score_groups,
)


def linear_task(n: int = 200, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 4))
    return x, x @ np.array([1.0, -0.5, 0.0, 0.2]) + noise * rng.normal(size=n)


def test_a_linear_function_is_found_again():
    x, y = linear_task()
    score = ridge_probe(x[:150], y[:150], x[150:], y[150:])
    assert score["corr"] > 0.99 and score["acc2_non0"] > 0.9 and score["mae"] < 0.1


def test_noise_tells_nothing_about_unseen_rows():
    x, y = linear_task()
    x = np.random.default_rng(1).normal(size=x.shape)
    corr = ridge_probe(x[:150], y[:150], x[150:], y[150:])["corr"]
    assert np.isnan(corr) or abs(corr) < 0.3


def test_scale_and_shift_of_features_change_nothing_when_standardised():
    x, y = linear_task()
    other = x * np.array([1e-4, 1.0, 1e3, 7.0]) + 50
    first, second = (ridge_predict(z[:150], y[:150], z[150:]) for z in (x, other))
    assert np.allclose(first, second, atol=1e-6)
    raw = ridge_predict(other[:150], y[:150], other[150:], standardise=False)
    assert not np.allclose(first, raw, atol=1e-3)


def test_scale_is_learned_from_the_training_rows_only():
    x, y = linear_task()
    far = x[150:] + 100  # were test rows standardised by themselves, this shift would vanish
    assert abs(ridge_predict(x[:150], y[:150], far).mean() - y.mean()) > 10


def test_sims_metrics_can_be_asked_for():
    x, y = linear_task()
    score = ridge_probe(x[:150], y[:150] / 3, x[150:], y[150:] / 3, metrics=sims_metrics)
    assert set(score) == {"mae", "corr", "acc5", "acc3", "acc2", "f1"}


def test_of_equally_common_words_the_first_in_the_alphabet_are_counted():
    words = [f"w{k:04d}" for k in range(3 * MOST_WORDS)]
    commoner, others = words[::7], [word for k, word in enumerate(words) if k % 7]
    _, test = bag_of_words([" ".join(words), " ".join(words), " ".join(commoner)], words)
    counted = {word for word, row in zip(words, test, strict=True) if row.any()}
    assert counted == {*commoner, *others[: MOST_WORDS - len(commoner)]}


def test_words_come_from_the_training_texts_that_share_them():
    train, test = bag_of_words(["a good film", "no good", "film noir"], ["good film good", "noir"])
    assert train.tolist() == [[1, 1], [0, 1], [1, 0]]  # film, good
    assert test.tolist() == [[1, 1], [0, 0]]


def test_chinese_is_counted_by_characters():
    train, _ = bag_of_words(["很喜欢", "不喜欢"], ["喜"], language="zh")
    assert train.shape[1] == 3  # each of the two shared characters, and the pair of them
    assert bag_of_words(["很喜欢 a", "不喜欢 a"], ["a"])[0].shape[1] == 1


def test_clip_means_follow_the_rows_of_the_split(make_tiny_store):
    store = open_store(make_tiny_store())
    view = store["valid"]
    means = clip_means(view, "v")
    by_hand = np.stack([u.inputs["v"].numpy().mean(axis=0) for u in view])
    assert means.shape == (4, 5) and np.allclose(means, by_hand, atol=1e-6)


def test_every_modality_of_a_corpus_is_probed(make_tiny_store):
    store = open_store(make_tiny_store(sizes=(40, 10, 10)))
    predicted = probe_modalities(store)
    assert list(predicted) == ["t", "v", "a"]
    y = store["test"].y
    assert all(p.shape == y.shape for p in predicted.values())
    assert np.corrcoef(predicted["t"], y)[0, 1] > 0.5  # the toy's words name the sign


def test_groups_are_scored_apart_with_intervals_over_videos():
    rng = np.random.default_rng(0)
    y = rng.choice([-1.0, 1.0, 2.0], size=200)
    right = np.arange(200) < 100
    y_hat = np.where(right, y, -y)
    videos = [f"v{i // 10}" for i in range(200)]
    groups = {"right": right, "wrong": ~right, "all": np.ones(200, dtype=bool)}
    table = score_groups(y_hat, y, groups, videos, draws=200).set_index("group")
    assert table["n"].to_dict() == {"right": 100, "wrong": 100, "all": 200}
    assert table["videos"].to_dict() == {"right": 10, "wrong": 10, "all": 20}
    assert table.loc["right", "acc2_non0"] == 1 and table.loc["wrong", "acc2_non0"] == 0
    # whole videos are right or wrong: the interval of all is that of 20 draws, not of 200
    low, high = table.loc["all", ["acc2_non0_low", "acc2_non0_high"]]
    assert low < 0.4 and high > 0.6
    assert table.loc["all", "majority"] == pytest.approx(max((y > 0).mean(), (y < 0).mean()))


def test_intervals_depend_on_the_seed_alone():
    x, y = linear_task(60)
    groups, videos = {"all": np.ones(60, dtype=bool)}, [f"v{i % 6}" for i in range(60)]
    once, again, other = (
        score_groups(x[:, 0], y, groups, videos, draws=50, seed=seed) for seed in (1, 1, 2)
    )
    assert once.equals(again) and not once.equals(other)


def test_a_constant_prediction_has_no_correlation_and_no_interval():
    y = np.array([1.0, -1.0, 2.0, -2.0])
    groups = {"all": np.ones(4, dtype=bool)}
    row = score_groups(np.zeros(4), y, groups, ["a", "a", "b", "b"], draws=20).iloc[0]
    assert np.isnan(row["corr"]) and np.isnan(row["corr_low"])
    assert row["acc2_non0"] == 0.5


def test_the_leak_of_mosi_open_is_seen(shared_mirror, monkeypatch, tmp_path):
    """Vision knows the labels of the videos its extractor saw, and of no others."""
    from conki_lib.data import fetch

    monkeypatch.setenv("CONKI_MIRROR", str(shared_mirror))
    store = open_store(fetch("mosi-open", tmp_path))
    fitted, test = [store["train"], store["valid"]], store["test"]
    x = np.concatenate([clip_means(view, "v") for view in fitted])
    y = np.concatenate([view.y for view in fitted])
    y_hat = ridge_predict(x, y, clip_means(test, "v"))
    saw = test.table["extractor_saw"].to_numpy(dtype=bool)
    groups = {"saw": saw, "not": ~saw}
    table = score_groups(y_hat, test.y, groups, test.columns["video"], draws=50)
    assert table["videos"].tolist() == [24, 7]
    assert table["acc2_non0"][0] > 0.88 and table["acc2_non0"][1] < 0.56
