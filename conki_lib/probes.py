"""Linear probes: how much of the sentiment do some numbers give away to a ridge regression?

A probe is a measuring device, not a model: it has one knob, the strength of the ridge, which
leave-one-out error on the training rows sets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from conki_lib.data.store import FeatureStore, SplitView
from conki_lib.metrics import mosi_metrics
from conki_lib.statistics import draw_units, drawn_scores

ALPHAS = np.logspace(-1, 5, 13)
MOST_WORDS = 1000


def clip_means(view: SplitView, m: str) -> Float[np.ndarray, "N d_in"]:
    """One vector per utterance: the mean of its frames of modality m, raw.

    Args:
        view: a split of a store.
        m: ``"v"`` or ``"a"``.
    """
    frames = (view.store.frames(m, row) for row in view.rows.tolist())
    means = [x.mean(axis=0, dtype=np.float64) for x in frames]
    return np.array(means).reshape(len(view), view.store.info.widths[m])


def word_counter(language: str = "en") -> CountVectorizer:
    """Count words that stand in two texts or more, present or absent.

    Chinese has no spaces between words: there, single characters and pairs of them are counted.
    """
    units: dict[str, Any] = {"token_pattern": r"(?u)\b\w[\w']*\b"}
    if language == "zh":
        units = {"analyzer": "char", "ngram_range": (1, 2)}
    return CountVectorizer(binary=True, min_df=2, dtype=np.float32, **units)


def bag_of_words(
    train: Sequence[str], test: Sequence[str], *, language: str = "en"
) -> tuple[Float[np.ndarray, "N w"], Float[np.ndarray, "M w"]]:
    """Which words of `word_counter` an utterance holds, 0 or 1; learnt from the training texts.

    At most the `MOST_WORDS` commonest; of equally common ones the first in the alphabet, whatever
    the processor (the vectorizer's own cut leaves that to the sorting algorithm).

    Args:
        train: training texts; words that stand in one of them only are left out.
        test: texts to be predicted.
        language: ``"en"``, ``"zh"``.

    Raises:
        ValueError: no word stands in two training texts.
    """
    words = word_counter(language)
    x = words.fit_transform(train)  # columns in alphabetical order
    kept = np.sort(np.argsort(-np.asarray(x.sum(0)).ravel(), kind="stable")[:MOST_WORDS])
    return x[:, kept].toarray(), words.transform(test)[:, kept].toarray()


def probe_modalities(store: FeatureStore) -> dict[str, Float[np.ndarray, " N"]]:
    """Predict a fold's test labels from each modality alone, by words or by clip means.

    Fitted on all other splits of the fold: a probe chooses nothing on the validation split.

    Returns:
        ``"t"``, ``"v"``, ``"a"``, as far as the corpus has them -> predictions for the test split.
    """
    fitted, test = [store[s] for s in store.splits if s != "test"], store["test"]
    y = np.concatenate([view.y for view in fitted])
    inputs = {m: [clip_means(view, m) for view in (*fitted, test)] for m in store.info.widths}
    pairs = {m: (np.concatenate(x[:-1]), x[-1]) for m, x in inputs.items()}
    if "t" in store.info.modalities:
        texts = [text for view in fitted for text in view.columns["text"]]
        words = bag_of_words(texts, test.columns["text"], language=store.info.language)
        pairs = {"t": words, **pairs}
    return {m: ridge_predict(x, y, z, standardise=m != "t") for m, (x, z) in pairs.items()}


def ridge_predict(
    x_train: Float[np.ndarray, "N d"],
    y_train: Float[np.ndarray, " N"],
    x_test: Float[np.ndarray, "M d"],
    *,
    standardise: bool = True,
) -> Float[np.ndarray, " M"]:
    """Predict labels by a ridge regression whose strength leave-one-out error chooses.

    Formula: w = argmin ||y - x w - b||^2 + alpha ||w||^2, with alpha from 0.1 to 1e5.

    Args:
        x_train: one row per training utterance (the folds' train and valid splits, say).
        y_train: their labels.
        x_test: rows to be predicted.
        standardise: subtract mean and divide by deviation of the training rows; leave it out for
            word counts, where it would blow up rare words.
    """
    steps = [StandardScaler()] if standardise else []
    probe = make_pipeline(*steps, RidgeCV(ALPHAS, gcv_mode="svd"))
    probe.fit(np.asarray(x_train, np.float64), np.asarray(y_train, np.float64))
    return probe.predict(np.asarray(x_test, np.float64))


def ridge_probe(
    x_train: Float[np.ndarray, "N d"],
    y_train: Float[np.ndarray, " N"],
    x_test: Float[np.ndarray, "M d"],
    y_test: Float[np.ndarray, " M"],
    *,
    metrics: Callable[..., dict[str, float]] = mosi_metrics,
) -> dict[str, float]:
    """Score `ridge_predict` on rows that it has not seen.

    Args:
        x_train: one row per training utterance.
        y_train: their labels.
        x_test: rows to be predicted.
        y_test: their labels.
        metrics: `mosi_metrics`, or `sims_metrics` for labels in [-1, 1].

    Returns:
        What `metrics` returns.
    """
    y_hat = ridge_predict(x_train, y_train, x_test)
    return metrics(y_hat=y_hat, y=y_test)


def score_groups(
    y_hat: Float[np.ndarray, " N"],
    y: Float[np.ndarray, " N"],
    groups: dict[str, Bool[np.ndarray, " N"]],
    videos: Sequence[str],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score one prediction on parts of the test split, with intervals over videos.

    Utterances of one video are alike, so whole videos are drawn with replacement, and the middle
    95 % of the scores make the interval.

    Args:
        y_hat: predictions.
        y: truth.
        groups: name -> which rows.
        videos: the video of each row.
        draws: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        One line per group: group, n, videos, the scores acc2_non0 and corr, each with ``_low`` and
        ``_high``, and majority: Acc-2 of always saying the commoner sign of that group.
    """
    names = np.asarray(videos)
    lines = []
    for group, chosen in groups.items():
        p, t, v = y_hat[chosen], y[chosen], names[chosen]
        found = drawn_scores(p[None], t, draw_units(np.random.default_rng(seed), v, draws))
        line = {"group": group, "n": len(t), "videos": len(set(v))}
        line["majority"] = float(max((t[t != 0] > 0).mean(), (t[t != 0] < 0).mean()))
        for name in ("acc2_non0", "corr"):
            value, defined = found[name][0, 0], found[name][1:, 0]
            defined = defined[np.isfinite(defined)] if np.isfinite(defined).any() else [np.nan]
            low, high = np.quantile(defined, [0.025, 0.975])
            line |= {name: value, f"{name}_low": low, f"{name}_high": high}
        lines.append(line)
    return pd.DataFrame(lines)
