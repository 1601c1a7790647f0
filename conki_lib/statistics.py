"""From runs to evidence: means over seeds, paired differences, intervals, corrected tests.

Two things vary by chance: which utterances stand in the test split, and which seed a run had. Both
are crossed here, since every seed predicts every utterance: intervals and tests have a variance
component for each, see `crossed_interval`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from scipy.special import stdtr, stdtrit

from conki_lib.config import ROOT
from conki_lib.data import corpus_path, open_store
from conki_lib.metrics import MOSI_METRICS, SIMS_EDGES, SIMS_METRICS, mosi_metrics, sims_metrics

METRICS = {"mosi": MOSI_METRICS, "sims": SIMS_METRICS}
SMALLER_IS_BETTER = ("mae",)
KEYS = ["key", "fold", "variant", "seed", "split"]
PUBLISHED = {"mosi": "mosi", "mosi-open": "mosi", "mosei": "mosei", "sims": "sims"}


def metric_set(names: Iterable[str]) -> str:
    """The convention of a table of runs, told by the names of its metrics."""
    return "sims" if "acc3" in names else "mosi"


def recompute(predictions: pd.DataFrame, *, metrics: str = "mosi") -> pd.DataFrame:
    """Score every run and split of a table of predictions anew.

    Args:
        predictions: columns key, fold, variant, seed, split, y, y_hat (as in
            ``predictions.parquet``).
        metrics: ``"mosi"`` or ``"sims"``.

    Returns:
        One line per run and split: key, fold, variant, seed, split, then the metrics.
    """
    score = sims_metrics if metrics == "sims" else mosi_metrics
    lines = [
        dict(zip(KEYS, place, strict=True)) | score(y_hat=part["y_hat"], y=part["y"])
        for place, part in predictions.groupby(KEYS, sort=False)
    ]
    return pd.DataFrame(lines)


def summarise(runs: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Mean, standard deviation over seeds and number of runs of every row.

    Args:
        runs: one line per run with columns variant, seed and the metrics.
        metrics: names of the columns to be summarised.

    Returns:
        Index variant; columns n, older (runs of older code), ``<metric>`` and ``<metric>_sd`` (nan
        for one run).
    """
    groups = runs.groupby("variant", sort=False)
    table = pd.DataFrame({"n": groups.size()})
    if "code" in runs:
        table["older"] = groups["code"].agg(lambda code: int((code == "older").sum()))
    for name in metrics:
        table[name] = groups[name].mean(skipna=False)  # a collapsed run must not improve a row
        table[f"{name}_sd"] = groups[name].std(ddof=1, skipna=False)
    return table


# ---- metrics of bootstrap samples ---------------------------------------------------------------


class Draws(NamedTuple):
    """Samples of whole units, such as videos: how often each sample counts each unit.

    `unit` names the unit of each utterance by its column in `counts`.
    """

    counts: Float[np.ndarray, "D U"]
    unit: Int[np.ndarray, " N"]

    def sums(self, values: Shaped[np.ndarray, "S N"]) -> Float[np.ndarray, "D S"]:
        """Sum the values of S runs in every sample; units are summed first, as they are fewer."""
        whole = [np.bincount(self.unit, row, self.counts.shape[1]) for row in values]
        return self.counts @ np.array(whole).T


def draw_units(rng: np.random.Generator, names: Sequence[str] | np.ndarray, draws: int) -> Draws:
    """Draw whole units, such as videos, with replacement: the bootstrap of this project.

    Args:
        rng: the source of chance.
        names: the unit of each utterance.
        draws: bootstrap samples.

    Returns:
        One sample that counts every unit once, then the drawn ones.
    """
    units, place = np.unique(names, return_inverse=True)
    counts = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), draws)
    return Draws(np.vstack([np.ones(len(units)), counts]), place)


def drawn_scores(
    y_hat: Float[np.ndarray, "S N"], y: Float[np.ndarray, " N"], draws: Draws,
    *, metrics: str = "mosi",
) -> dict[str, Float[np.ndarray, "D S"]]:  # fmt: skip
    """Score S runs on D samples of the utterances at once.

    Args:
        y_hat: predictions of each run.
        y: truth.
        draws: the samples; one that counts each unit once gives the metrics.
        metrics: ``"mosi"`` or ``"sims"``.

    Returns:
        Metric -> one value per sample and run; undefined ones are nan.
    """
    p, t = y_hat.astype(np.float32), y.astype(np.float32)
    if metrics == "sims":
        p, t = p.clip(-1, 1), t.clip(-1, 1)
    everyone = np.ones(len(t))
    scores = {"mae": draws.sums(np.abs(p.astype(float) - t)) / draws.sums(everyone[None])}
    scores["corr"] = _drawn_corr(p.astype(float), t.astype(float), draws)
    said, true = _classes(p, metrics), _classes(t, metrics)
    for name in said:
        kept = (t != 0).astype(float) if name == "acc2_non0" else everyone
        n = draws.sums(kept[None])
        with np.errstate(invalid="ignore", divide="ignore"):
            scores[name] = draws.sums((said[name] == true[name]) * kept) / n
            if name.startswith("acc2"):
                f1 = name.replace("acc2", "f1")
                scores[f1] = _drawn_f1(said[name], true[name], kept, draws) / n
    return {name: scores[name] for name in METRICS[metrics]}


def _classes(values: np.ndarray, metrics: str) -> dict[str, np.ndarray]:
    """The class of each value under each accuracy of a convention; see `conki_lib.metrics`."""
    if metrics == "sims":
        edges = {name: np.array(cuts, np.float32) for name, cuts in SIMS_EDGES.items()}
        return {name: np.digitize(values, cuts, right=True) for name, cuts in edges.items()}
    found = {f"acc{2 * k + 1}": np.rint(values.clip(-k, k)) for k in (3, 2)}
    return found | {"acc2_has0": values >= 0, "acc2_non0": values > 0}


def _drawn_corr(p: np.ndarray, t: np.ndarray, draws: Draws) -> np.ndarray:
    n = draws.sums(np.ones((1, len(t))))
    p = p - p.mean(1, keepdims=True)
    t = t - t.mean()
    mean_p, mean_t = draws.sums(p) / n, draws.sums(t[None]) / n
    cov = draws.sums(p * t) / n - mean_p * mean_t
    var_p, var_t = draws.sums(p * p) / n - mean_p**2, draws.sums((t * t)[None]) / n - mean_t**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((var_p > 1e-18) & (var_t > 1e-18), cov / np.sqrt(var_p * var_t), np.nan)


def _drawn_f1(said: np.ndarray, true: np.ndarray, kept: np.ndarray, draws: Draws) -> np.ndarray:
    total = np.zeros((len(draws.counts), len(said)))
    for c in (False, True):
        hit = draws.sums(((said == c) & (true == c)) * kept)
        says, has = draws.sums((said == c) * kept), draws.sums(((true == c) * kept)[None])
        total += has * np.divide(2 * hit, says + has, out=np.zeros_like(hit), where=says + has > 0)
    return total


# ---- paired differences -------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two rows' predictions of the same utterances by the same seeds."""

    seeds: list[int]
    ids: list[str]
    y: Float[np.ndarray, " N"]
    row: Float[np.ndarray, "S N"]
    base: Float[np.ndarray, "S N"]


def by_run(predictions: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Spread predictions of one split out: a line per run, a column per utterance; and the truth.

    Args:
        predictions: columns variant, seed, id, y, y_hat; one line per run and utterance.

    Returns:
        y_hat with index (variant, seed) and columns id, nan where a run does not hold an utterance;
        y by id. Both in the order in which the ids come.
    """
    y = predictions.drop_duplicates("id").set_index("id")["y"]
    answers = predictions.pivot(index=["variant", "seed"], columns="id", values="y_hat")
    return answers[y.index], y


def pair_up(answers: pd.DataFrame, y: pd.Series, row: str, base: str = "full") -> Pair | None:
    """Line two rows up by seed and utterance; None where they share no seed.

    An utterance that a run does not hold is left out for all of them.

    Args:
        answers: from `by_run`.
        y: from `by_run`.
        row: the row that is compared.
        base: the row that it is compared with.
    """
    rows = answers.index.get_level_values("variant")
    tables = [answers[rows == name].droplevel("variant") for name in (row, base)]
    seeds = [seed for seed in tables[0].index if seed in tables[1].index]
    if not seeds:
        return None
    values = [table.loc[seeds].to_numpy(np.float32) for table in tables]
    held = ~np.isnan(values).any(axis=(0, 1))
    return Pair(seeds, list(y.index[held]), y[held].to_numpy(np.float32),
                *(x[:, held] for x in values))  # fmt: skip


def paired_differences(
    predictions: pd.DataFrame,
    *,
    base: str = "full",
    metrics: str = "mosi",
    clusters: Mapping[str, str] | None = None,
    draws: int = 2000,
) -> pd.DataFrame:
    """Difference of every row to a base row, with `crossed_interval`, over the seeds they share.

    Args:
        predictions: of one split, see `by_run`.
        base: the row that all others are compared with.
        metrics: ``"mosi"`` or ``"sims"``.
        clusters: id -> video, see `videos_of`; whole videos are drawn, as clips of one speaker are
            alike. None: single utterances.
        draws: bootstrap samples.

    Returns:
        One line per row and metric: variant, metric, seeds, utterances, units (videos, or single
        utterances), difference, low, high, se, p, p_holm (Holm's correction over the rows of this
        call, metric by metric).
    """
    lines, answers = [], by_run(predictions)
    for name in dict.fromkeys(predictions["variant"]):
        pair = pair_up(*answers, name, base) if name != base else None
        if pair is not None:
            lines += _differences(pair, name, metrics, clusters, draws)
    return corrected(pd.DataFrame(lines))


def _differences(
    pair: Pair, name: str, metrics: str, clusters: Mapping[str, str] | None, draws: int
) -> list[dict]:
    S, N = pair.row.shape
    names = [clusters[i] for i in pair.ids] if clusters else pair.ids
    drawn = draw_units(np.random.default_rng(0), names, draws)
    row, base = (drawn_scores(x, pair.y, drawn, metrics=metrics) for x in (pair.row, pair.base))
    units = drawn.counts.shape[1]
    values = {metric: row[metric] - base[metric] for metric in METRICS[metrics]}
    return [
        {"variant": name, "metric": metric, "seeds": S, "utterances": N, "units": units}
        | crossed_interval(value[0], value[1:], units)
        for metric, value in values.items()
    ]


def crossed_interval(
    values: Float[np.ndarray, " S"], drawn: Float[np.ndarray, "D S"], units: int
) -> dict[str, float]:
    """Interval and test of a mean over seeds where seeds and utterances are both chance.

    Formula: the value of seed s on utterance u is a mean, an effect of s, one of u and a rest;
        SE^2 = V_s/S + V_u/U + V_r/(S U). The variance of `values` holds V_s + V_r/U; that of the
        drawn means V_u/U + V_r/(S U), that of the drawn deviations from them V_r/U. Interval:
        mean -+ t SE, with Satterthwaite's degrees of freedom.

    To draw the few seeds with replacement, too, would give intervals that are far too narrow.

    Args:
        values: one per seed, such as the difference of two rows' MAE.
        drawn: the same on bootstrap samples of the utterances, or of whole videos; all seeds on the
            same ones.
        units: number of utterances, or videos, that were drawn from.

    Returns:
        difference, low, high (95 %), se, p (two-sided). One seed: the interval knows nothing of
        seeds, and p is nan.

    Source: crossed random factors, Westfall, Kenny and Judd 2014; for any metric by the bootstrap.
    """
    S, mean = len(values), float(values.mean())
    drawn = drawn[np.isfinite(drawn).all(1)]
    nothing = {"difference": mean, "low": math.nan, "high": math.nan, "se": math.nan, "p": math.nan}
    if units < 2 or len(drawn) < 2 or not math.isfinite(mean):
        return nothing
    grow = units / (units - 1)  # the bootstrap's variance is the one that divides by U
    utterances = grow * drawn.mean(1).var()
    parts, free = [utterances], [units - 1]
    if S > 1:
        rest = grow * (drawn - drawn.mean(1, keepdims=True)).var(0).mean() * S / (S - 1)
        parts = [max(utterances, rest / S), max(values.var(ddof=1), rest) / S, -rest / S]
        free = [units - 1, S - 1, (S - 1) * (units - 1)]
    se = math.sqrt(sum(parts))
    if se == 0:
        return nothing | {"low": mean, "high": mean, "se": 0.0}
    df = se**4 / sum(part**2 / k for part, k in zip(parts, free, strict=True))
    reach = float(stdtrit(df, 0.975)) * se
    p = 2 * float(stdtr(df, -abs(mean) / se)) if S > 1 else math.nan
    return {"difference": mean, "low": mean - reach, "high": mean + reach, "se": se, "p": p}


def corrected(differences: pd.DataFrame) -> pd.DataFrame:
    """Add p_holm: Holm's correction over all rows of a table, metric by metric.

    Where the table has a column group, p_group is the same within each group.
    """
    families = {"p_holm": ["metric"], "p_group": ["metric", "group"]}
    for name, family in families.items():
        if {*family, "p"} <= set(differences):
            p = differences.groupby(family)["p"]
            differences = differences.assign(**{name: p.transform(lambda p: holm(p.to_numpy()))})
    return differences


def holm(p: Sequence[float] | Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """Correct p values for their number: step-down, family-wise; nan stays nan and is not counted.

    Formula: sorted upwards, p_(k) becomes the largest of (m - j + 1) p_(j), j <= k, at most 1.
    """
    p = np.asarray(p, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # nan sorts last
    m = len(order)
    steps = np.maximum.accumulate(p[order] * (m - np.arange(m)))
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def videos_of(corpus: str, ids: Iterable[str]) -> dict[str, str]:
    """Id of each utterance -> its video: by the store, where it is here, else by the id's form.

    Args:
        corpus: a profile's target, such as ``"mosi-open"``.
        ids: of its utterances; without a store ``video$_$clip``, or each counts as a video.
    """
    path, known = corpus_path(corpus), {}
    if (path / "info.json").is_file():
        table = open_store(path).utterances
        known = dict(zip(table["id"], table["video"], strict=True))
    return {i: known.get(i, i.partition("$_$")[0]) for i in ids}


# ---- what others published ----------------------------------------------------------------------


def published(corpus: str) -> pd.DataFrame:
    """Five-seed averages that MMSA published for earlier models on a corpus, as fractions.

    The ConKI paper's own figures could not be checked against a source and are not in here.

    Args:
        corpus: a profile's target, such as ``"mosi-open"``.

    Returns:
        Index model; columns alignment and the metrics; empty where nothing is known of the corpus.
    """
    name = PUBLISHED.get(corpus)
    if name is None:
        return pd.DataFrame()
    file = "reported_results_sims.csv" if name == "sims" else "reported_results.csv"
    table = pd.read_csv(ROOT / "results/reported" / file)
    table = table[table["dataset"] == name].drop(columns="dataset").set_index("model")
    shares = [c for c in table if c.startswith(("acc", "f1"))]
    table[shares] = table[shares] / 100
    return table
