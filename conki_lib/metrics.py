"""Metrics of multimodal sentiment analysis, in the conventions of the field's standard framework.

All are fractions. Values are taken as float32 before they are compared: a float32 0.1 lies on the
edge of a bin, the same number upcast to float64 lies beyond it.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.stats import pearsonr
from sklearn.metrics import f1_score

MOSI_METRICS = ("mae", "corr", "acc7", "acc5", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0")
SIMS_METRICS = ("mae", "corr", "acc5", "acc3", "acc2", "f1")

# CH-SIMS bins, open left and closed right, between -1 and 1
SIMS_EDGES = {"acc5": (-0.7, -0.1, 0.1, 0.7), "acc3": (-0.1, 0.1), "acc2": (0.0,)}


def metrics_for(label_range: Sequence[float]) -> Callable[..., dict[str, float]]:
    """Choose the metrics of a corpus: `sims_metrics` for labels in [-1, 1], else `mosi_metrics`."""
    return sims_metrics if tuple(label_range) == (-1.0, 1.0) else mosi_metrics


def mosi_metrics(*, y_hat: ArrayLike, y: ArrayLike) -> dict[str, float]:
    """Score predictions of sentiment intensity in [-3, 3] (CMU-MOSI, CMU-MOSEI).

    Acc-7 and Acc-5 round to the nearest integer, half to even, after clipping to [-3, 3] or
    [-2, 2]. ``has0`` sets negative against non-negative; ``non0`` negative against positive,
    utterances with truth 0 left out. MAE and Pearson's correlation take the values as they are.

    Args:
        y_hat: predictions, N values.
        y: truth, N values.

    Returns:
        Fractions under the names of `MOSI_METRICS`. What is undefined is nan: the correlation of a
        constant, ``non0`` where every truth is 0.

    Raises:
        ValueError: nothing to score, differing lengths, NaN or infinite values.

    Source: paper, experiments; both Acc-2 conventions of the field.
    Differs: nothing.
    """
    p, t = _as_float32(y_hat=y_hat, y=y)
    non0 = t != 0
    return {
        "mae": _mae(p, t),
        "corr": _corr(p, t),
        "acc7": _accuracy(_rounded(p, 3), _rounded(t, 3)),
        "acc5": _accuracy(_rounded(p, 2), _rounded(t, 2)),
        "acc2_has0": _accuracy(p >= 0, t >= 0),
        "f1_has0": _weighted_f1(p >= 0, t >= 0),
        "acc2_non0": _accuracy(p[non0] > 0, t[non0] > 0),
        "f1_non0": _weighted_f1(p[non0] > 0, t[non0] > 0),
    }


def sims_metrics(*, y_hat: ArrayLike, y: ArrayLike) -> dict[str, float]:
    """Score predictions of sentiment intensity in [-1, 1] (CH-SIMS).

    Both are clipped to [-1, 1] first, for MAE and correlation too; 0 counts as negative.

    Args:
        y_hat: predictions, N values.
        y: truth, N values.

    Returns:
        Fractions under the names of `SIMS_METRICS`; the correlation of a constant is nan.

    Raises:
        ValueError: nothing to score, differing lengths, NaN or infinite values.

    Source: paper, experiments; bins of the CH-SIMS benchmark.
    Differs: nothing.
    """
    p, t = (np.clip(values, -1, 1) for values in _as_float32(y_hat=y_hat, y=y))
    bins = {name: (_binned(p, edges), _binned(t, edges)) for name, edges in SIMS_EDGES.items()}
    return {
        "mae": _mae(p, t),
        "corr": _corr(p, t),
        **{name: _accuracy(*pair) for name, pair in bins.items()},
        "f1": _weighted_f1(*bins["acc2"]),
    }


def _as_float32(**given: ArrayLike) -> list[Float[np.ndarray, " N"]]:
    arrays = {name: np.asarray(values, dtype=np.float32).ravel() for name, values in given.items()}
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1 or not all(sizes.values()):
        raise ValueError(f"metrics need equally many predictions and truths, at least one: {sizes}")
    for name, array in arrays.items():
        bad = np.flatnonzero(~np.isfinite(array))
        if len(bad):
            raise ValueError(
                f"{name}: {len(bad)} of {len(array)} values are NaN or infinite, the first at row "
                f"{bad[0]}; look for a diverged run or a missing label"
            )
    return list(arrays.values())


def _mae(p: Float[np.ndarray, " N"], t: Float[np.ndarray, " N"]) -> float:
    return float(np.abs(p.astype(np.float64) - t).mean())


def _corr(p: Float[np.ndarray, " N"], t: Float[np.ndarray, " N"]) -> float:
    if np.ptp(p) == 0 or np.ptp(t) == 0:
        return float("nan")
    return float(pearsonr(p.astype(np.float64), t.astype(np.float64)).statistic)


def _rounded(values: Float[np.ndarray, " N"], limit: int) -> Float[np.ndarray, " N"]:
    return np.rint(np.clip(values, -limit, limit))


def _binned(values: Float[np.ndarray, " N"], edges: tuple[float, ...]) -> Int[np.ndarray, " N"]:
    return np.digitize(values, np.array(edges, dtype=np.float32), right=True)


def _accuracy(p: np.ndarray, t: np.ndarray) -> float:
    return float((p == t).mean()) if len(t) else float("nan")


def _weighted_f1(p: np.ndarray, t: np.ndarray) -> float:
    """F1 of each class, weighted by the classes' counts in the truth; a class never hit has 0."""
    if not len(t):
        return float("nan")
    return float(f1_score(t, p, average="weighted", zero_division=0))
