"""The representations of a split: their maps in the plane, and the numbers maps only suggest.

All distances are between rows of unit length, since the contrastive loss sees cosines.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate.utils import set_seed
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import nn

from conki_lib import training
from conki_lib.data import Batch
from conki_lib.metrics import metrics_for, mosi_metrics
from conki_lib.model import build_model, injected_state, load_injected
from conki_lib.pairs import pair_masks, sentiment_class
from conki_lib.probes import ridge_probe
from conki_lib.records import Record, config_key, local_records

MOMENTS = ("before training", "after stage 1", "after stage 2")
SETTINGS = {"t-SNE": "perplexity", "UMAP": "neighbours"}  # method -> its knob


class Representations(NamedTuple):
    """What a model says about a split: `reps[i, k]` is representation `names[k]` of `ids[i]`."""

    reps: Float[np.ndarray, "N K d"]
    names: tuple[str, ...]
    ids: tuple[str, ...]
    y: Float[np.ndarray, " N"]

    def rows(self) -> Float[np.ndarray, "R d"]:
        """All representations as rows of unit length, sample-major."""
        flat = self.reps.reshape(-1, self.reps.shape[2]).astype(np.float64)
        return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)

    def sample(self, most: int) -> "Representations":
        """At most this many utterances, evenly spread over the split."""
        pick = np.unique(np.linspace(0, len(self.y) - 1, min(most, len(self.y))).astype(int))
        ids = tuple(self.ids[i] for i in pick)
        return Representations(self.reps[pick], self.names, ids, self.y[pick])


@torch.no_grad()
def represent(model: nn.Module, loader: Iterable[Batch]) -> Representations:
    """Take a split through a model, in eval mode; utterances come in the split's order.

    Raises:
        ValueError: the model has no representations O, A (a control).
    """
    model.eval()
    outputs = [(batch, model(batch)) for batch in loader]
    names = outputs[0][1].names
    if not names:
        raise ValueError("this model has no representations O, A: choose a row of kind conki")
    order = np.argsort(np.concatenate([batch.index.numpy() for batch, _ in outputs]))
    reps = np.concatenate([output.reps.float().numpy() for _, output in outputs])[order]
    ids = [i for batch, _ in outputs for i in batch.ids]
    y = np.concatenate([batch.y.numpy() for batch, _ in outputs])[order]
    return Representations(reps, names, tuple(ids[k] for k in order), y)


def models_along(record: Record) -> Iterator[tuple[str, nn.Module]]:
    """The models of one run at each of `MOMENTS`; a moment without weights here is left out.

    Before training: as stage 2 builds it from its seed. After stage 1: with the injected state,
    which is what stage 2 starts from. After stage 2: the chosen epoch.
    """
    config = training.resolve(record.config)[0]
    set_seed(config.runtime.seed)
    model = build_model(config.model)
    yield MOMENTS[0], model
    key = config_key(config, 1)
    found = [r for r in local_records(record.profile) if r.stage == 1 and r.config_key == key
             and r.data == record.data and r.model_path]  # fmt: skip
    if config.data.external is not None and found:
        state = injected_state(training.load_model(max(found, key=lambda r: r.is_current)))
        load_injected(model, state)
        yield MOMENTS[1], model
    if record.model_path is not None:
        yield MOMENTS[2], training.load_model(record)


def measure(
    record: Record, moments: Sequence[str] = MOMENTS
) -> tuple[dict[str, dict], Representations]:
    """The numbers of a run's test split at some moments, and its representations at the last.

    Args:
        record: a run whose weights are on this machine.
        moments: some of `MOMENTS`; a moment without weights is left out.

    Returns:
        Moment -> `separability`; the representations of the last moment.
    """
    config, stores = training.resolve(record.config)
    store = stores[config.data.target]
    loaders = training.make_loaders(config, store, config.stage2, splits=("train", "test"))
    metrics, numbers, test = metrics_for(store.info.label_range), {}, None
    for moment, model in models_along(record):
        if moment in moments:
            train, test = (represent(model, loaders[split]) for split in ("train", "test"))
            numbers[moment] = separability(train, test, metrics=metrics)
    if test is None:
        raise FileNotFoundError(
            f"no weights of {record.variant!r}, seed {record.seed}, on this machine: train them by "
            f"`make reproduce PROFILE={record.profile} FRESH=1`"
        )
    return numbers, test


# ---- numbers ------------------------------------------------------------------------------------


def separability(
    train: Representations,
    test: Representations,
    *,
    metrics: Callable[..., dict[str, float]] = mosi_metrics,
) -> dict:
    """Measure what a map of representations suggests, on the test split.

    Args:
        train: fits the linear probes, and nothing else.
        test: is measured.
        metrics: `mosi_metrics`, or `sims_metrics` for labels in [-1, 1].

    Returns:
        names; n; silhouette_kind (O against A; nan with one kind); silhouette_class, probe_corr,
        probe_mae (per representation); alignment_P1, alignment_P2, uniformity; cka (K x K).
    """
    found: dict[str, Any] = {"names": list(test.names), "n": len(test.y)}
    rows, K = test.rows(), len(test.names)
    kinds = np.tile([name[0] for name in test.names], len(test.y))
    found["silhouette_kind"] = silhouette(rows, kinds)
    classes = sentiment_class(test.y).numpy()
    by_rep = {name: rows[k::K] for k, name in enumerate(test.names)}
    found["silhouette_class"] = {name: silhouette(x, classes) for name, x in by_rep.items()}
    probes = {
        name: ridge_probe(train.reps[:, k], train.y, test.reps[:, k], test.y, metrics=metrics)
        for k, name in enumerate(test.names)
    }
    for score in ("corr", "mae"):
        found[f"probe_{score}"] = {name: probe[score] for name, probe in probes.items()}
    found |= alignment_and_uniformity(test)
    found["cka"] = [[linear_cka(test.reps[:, j], test.reps[:, k]) for k in range(K)]
                    for j in range(K)]  # fmt: skip
    return found


def silhouette(rows: Float[np.ndarray, "R d"], labels: np.ndarray) -> float:
    """Mean silhouette of groups of rows, -1 to 1; nan where there are not at least two groups."""
    count = len(np.unique(labels))
    return float(silhouette_score(rows, labels)) if 2 <= count < len(rows) else float("nan")


def alignment_and_uniformity(found: Representations) -> dict[str, float]:
    """How near positive pairs are, and how evenly rows fill the sphere.

    Formula: alignment = mean of |p - q|^2 over positive pairs; uniformity = log of the mean of
        exp(-2 |p - q|^2) over all pairs p != q. Smaller is better in both.

    Source: Wang and Isola 2020.
    Differs: alignment is split into P1 (same sample) and P2 (same class).
    """
    rows = found.rows()
    squares = np.clip(2 - 2 * rows @ rows.T, 0, None)
    pairs = pair_masks(found.y, found.names)
    result = {}
    for name in ("P1", "P2"):
        mask = getattr(pairs, name).numpy()
        result[f"alignment_{name}"] = float(squares[mask].mean()) if mask.any() else float("nan")
    others = ~np.eye(len(rows), dtype=bool)
    result["uniformity"] = float(np.log(np.exp(-2 * squares[others]).mean()))
    return result


def linear_cka(x: Float[np.ndarray, "N d"], z: Float[np.ndarray, "N e"]) -> float:
    """Compare two representations of the same utterances: 1 if one is a rotation of the other.

    Formula: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the Gram matrices K = XX', L = ZZ', by the
        unbiased estimate of HSIC: 0 on average for unrelated ones, however few the utterances (but
        four at least).

    Source: centred kernel alignment, Kornblith et al. 2019; HSIC, Song et al. 2012.
    """
    first, second = (_gram(part) for part in (x, z))
    scale = _hsic(first, first) * _hsic(second, second)
    return float(_hsic(first, second) / scale**0.5) if scale > 0 else float("nan")


def _gram(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64) - np.mean(x, axis=0, dtype=np.float64)  # against cancellation
    gram = x @ x.T
    np.fill_diagonal(gram, 0)
    return gram


def _hsic(K: np.ndarray, L: np.ndarray) -> float:
    n = len(K)
    if n < 4:
        return 0.0
    rest = K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K.sum(0) @ L.sum(0))
    return ((K * L).sum() + rest) / (n * (n - 3))


# ---- maps ---------------------------------------------------------------------------------------


def project(
    rows: Float[np.ndarray, "R d"], method: str, *, setting: int = 30, seed: int = 0
) -> Float[np.ndarray, "R 2"]:
    """Lay rows out in the plane, all in one fit; the same input gives the same map.

    Args:
        rows: of unit length; their 50 first principal components are used.
        method: ``"t-SNE"`` or ``"UMAP"``.
        setting: perplexity of t-SNE, neighbours of UMAP; cut to what so many rows allow.
        seed: of the layout; 0 starts t-SNE from principal components, others at random.

    Raises:
        ValueError: unknown method.
    """
    if method not in SETTINGS:
        raise ValueError(f"method={method!r}: known are {', '.join(SETTINGS)}")
    x = PCA(min(50, *rows.shape), random_state=0).fit_transform(rows).astype(np.float32)
    setting = min(setting, max(2, (len(rows) - 1) // 3))
    if method == "t-SNE":
        init = "random" if seed else "pca"  # from principal components, no seed would matter
        layout = TSNE(perplexity=setting, init=init, random_state=seed, n_jobs=1)
        return layout.fit_transform(x)
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    from umap import UMAP  # takes seconds: only where it is needed

    layout = UMAP(n_neighbors=setting, min_dist=0.3, random_state=seed, n_jobs=1)
    return np.asarray(layout.fit_transform(x))


def maps(
    found: Representations, grid: dict[str, Sequence[int]], seeds: Sequence[int] = (0, 1)
) -> pd.DataFrame:
    """Maps of all representations together, for every method, setting and seed.

    Args:
        found: the representations; see `Representations.sample` for fewer utterances.
        grid: method -> settings.
        seeds: of the layouts.

    Returns:
        Columns method, setting, seed, id, rep, y, x1, x2.
    """
    rows, K, tables = found.rows(), len(found.names), []
    for method, settings in grid.items():
        for setting, seed in product(settings, seeds):
            xy = project(rows, method, setting=setting, seed=seed).astype(np.float32).round(2)
            tables.append(pd.DataFrame({
                "method": method, "setting": setting, "seed": seed,
                "id": np.repeat(found.ids, K), "rep": np.tile(found.names, len(found.ids)),
                "y": np.repeat(found.y, K).astype(np.float32), "x1": xy[:, 0], "x2": xy[:, 1],
            }))  # fmt: skip
    return pd.concat(tables, ignore_index=True)
