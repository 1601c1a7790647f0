"""Why a component helps or does not: where errors change, gradient conflict, distant corpora."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from torch import Tensor, nn

from conki_lib import training
from conki_lib.config import MODALITIES, MODALITY_NAMES, ContrastConfig
from conki_lib.data import Batch
from conki_lib.data.store import FeatureStore
from conki_lib.embedding import MOMENTS, models_along
from conki_lib.model import freeze_for_fine_tuning, parameter_groups
from conki_lib.probes import bag_of_words, ridge_predict, word_counter
from conki_lib.records import Record, config_key
from conki_lib.statistics import paired_differences

# ---- which utterances ---------------------------------------------------------------------------


def error_changes(
    predictions: pd.DataFrame,
    groups: Mapping[str, Iterable[str]],
    **options: Any,
) -> pd.DataFrame:
    """Change of the mean absolute error against a base row, by group of utterances.

    Args:
        predictions: of one split; columns variant, seed, id, y, y_hat.
        groups: name -> ids of its utterances.
        **options: of `paired_differences`.

    Returns:
        The MAE's lines of `paired_differences` for each group, with a column group; positive where
        the row errs more than the base.
    """
    parts = []
    for group, ids in groups.items():
        inside = predictions[predictions["id"].isin(list(ids))]
        found = paired_differences(inside, **options)
        parts += [found[found["metric"] == "mae"].assign(group=group)] if len(found) else []
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


# ---- what stage 1 learnt ------------------------------------------------------------------------


def learnt_in_stage_1(rows: Iterable[Record], stage1: Iterable[Record]) -> pd.DataFrame:
    """Validation scores of stage 1 on the external corpus, by the rows that began with it.

    Args:
        rows: finished runs of stage 2.
        stage1: finished runs of stage 1; rows whose settings agree so far share one.

    Returns:
        Index: names of rows with the same numbers; columns: n (seeds), valid MAE (mean), sd, valid
        corr (mean).
    """
    scores = {record.config_key: record.metrics["valid"] for record in stage1}
    lines = []
    for record in rows:
        key = config_key(record.config, 1) if record.config.data.external else None
        if key in scores:
            lines.append({"row": record.variant, "seed": record.seed, **scores[key]})
    table = pd.DataFrame(lines, columns=["row", "seed", "mae", "corr"])
    numbers = {"n": ("seed", "count"), "valid MAE": ("mae", "mean"), "sd": ("mae", "std"),
               "valid corr": ("corr", "mean")}  # fmt: skip
    by_row = table.groupby("row", sort=False).agg(**numbers).round(3).reset_index()
    shared = by_row.groupby(list(numbers), sort=False, dropna=False)["row"].agg(", ".join)
    return shared.reset_index().set_index("row")


# ---- which gradients ----------------------------------------------------------------------------


def gradient_conflict(
    model: nn.Module, batches: Iterable[Batch], contrast: ContrastConfig
) -> pd.DataFrame:
    """Compare the gradients of both losses at the parameters that both reach.

    Formula: cos(grad L_task, grad L_con), and |lambda grad L_con| / |grad L_task|, over all
        parameters of a group together. A cosine below 0 is a conflict: a small step down one loss
        goes up the other. Heads see L_task only and are left out.

    Args:
        model: ConKI with the freezing plan of stage 2; dropout is off here.
        batches: of the training split.
        contrast: lambda, tau and the readings of L_con.

    Returns:
        One line per batch and group: batch, group ("text backbone", "vision adapter", ...), cosine,
        ratio.
    """
    was_training = model.training
    model.eval()
    groups = _shared_parameters(model)
    shared = [p for part in groups.values() for p in part]
    sizes = [sum(p.numel() for p in part) for part in groups.values()]
    objective = training.Objective(contrast.model_copy(update={"lam": 1.0}))  # measures both
    lines = []
    for k, batch in enumerate(batches):
        losses = objective(model(batch), batch.y)
        both = (_gradient(losses[x], shared).split(sizes) for x in ("loss_task", "loss_con"))
        for group, a, b in zip(groups, *both, strict=True):
            lines.append({"batch": k, "group": group} | _compare(a, b, contrast.lam))
    model.train(was_training)
    return pd.DataFrame(lines)


def conflict_along(record: Record, *, batches: int = 4) -> pd.DataFrame:
    """Measure `gradient_conflict` of a run at the start of stage 2 and at its chosen epoch.

    Args:
        record: a run whose weights are on this machine; without those of stage 1 its start is left
            out, if it had a stage 1.
        batches: of the training split, the first ones.

    Returns:
        The columns of `gradient_conflict`, and moment.
    """
    config, stores = training.resolve(record.config)
    loader = training.make_loaders(
        config, stores[config.data.target], config.stage2, splits=("train",)
    )["train"]
    chosen, external = list(islice(loader, batches)), config.data.external
    taught = external and config.stage1.train == "adapters"
    injected = training.shared_modalities(config, stores[external]) if taught else ()
    start = MOMENTS[1] if external else MOMENTS[0]
    parts = []
    for moment, model in models_along(record):
        if moment in (start, MOMENTS[2]):
            model.adapter_gradient = config.stage2.adapter_gradient
            freeze_for_fine_tuning(
                model, injected=injected, freeze_adapters=config.stage2.freeze_adapters
            )
            words = "start of stage 2" if moment == start else "chosen epoch"
            measured = gradient_conflict(model, chosen, config.contrast)
            parts.append(measured.assign(moment=words))
    return pd.concat(parts, ignore_index=True)


def _gradient(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([x.flatten() for x in found]).double()


def _shared_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters below the representations, by modality and part."""
    found: dict[str, list] = {}
    for part, parameters in parameter_groups(model).items():
        if part == "heads":
            continue
        for name, p in parameters:
            if p.requires_grad:
                kind = "adapter" if part == "adapters" else "backbone"
                modality = MODALITY_NAMES[name.split(".")[1]]
                found.setdefault(f"{modality} {kind}", []).append(p)
    return found


def _compare(a: Tensor, b: Tensor, lam: float) -> dict[str, float]:
    norm_a, norm_b = float(a.norm()), float(b.norm())
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else float("nan")
    return {"cosine": cosine, "ratio": lam * norm_b / norm_a if norm_a else float("nan")}


# ---- which external corpus ----------------------------------------------------------------------


def external_distance(
    target: FeatureStore, external: FeatureStore, modalities: Sequence[str] = MODALITIES
) -> pd.DataFrame:
    """How far away is the external corpus? Labels for every corpus, words where both have text.

    Words: the share of the target's test words that external training texts hold; how well words
    tell the corpora apart (1 is a corpus of its own, 0.5 chance); and what a ridge on words learns
    for the target's test split from either corpus, as a correlation. Frames of different feature
    sets cannot be compared.

    Args:
        target: corpus of stage 2.
        external: corpus of stage 1.
        modalities: those that the model reads; without text, words do not matter.

    Returns:
        Columns measure, value, meaning.
    """
    y, z = target["train"].y, external["train"].y
    lines = [
        ("label mean, target", y.mean(), "of the training split"),
        ("label mean, external", z.mean(), "of the training split"),
        ("label deviation, target", y.std(), "of the training split"),
        ("label deviation, external", z.std(), "of the training split"),
    ]
    if all("t" in have for have in (modalities, target.info.modalities, external.info.modalities)):
        lines += _word_distance(target, external)
    return pd.DataFrame(lines, columns=["measure", "value", "meaning"])


def _word_distance(target: FeatureStore, external: FeatureStore) -> list[tuple[str, float, str]]:
    test, language = target["test"], target.info.language
    train = {"target": target["train"], "external": external["train"]}
    texts = {corpus: list(view.columns["text"]) for corpus, view in train.items()}
    test_texts = list(test.columns["text"])
    words_of = word_counter(language).build_analyzer()
    known = {word for text in texts["external"] for word in words_of(text)}
    said = [word for text in test_texts for word in words_of(text)]
    lines = [("words known", float(np.mean([w in known for w in said])),
              "share of the target's test words that external training texts hold")]  # fmt: skip
    for corpus, view in train.items():
        x, x_test = bag_of_words(texts[corpus], test_texts, language=language)
        y_hat = ridge_predict(x, view.y, x_test, standardise=False)
        meaning = "correlation on the target's test split of a ridge on these words"
        lines.append((f"words of {corpus}", float(np.corrcoef(y_hat, test.y)[0, 1]), meaning))
    n, rng = min(map(len, texts.values())), np.random.default_rng(0)
    both = [part[i] for part in texts.values() for i in rng.permutation(len(part))[:n]]
    x, _ = bag_of_words(both, both[:1], language=language)
    which = np.repeat([0, 1], n)
    guess = cross_val_predict(LogisticRegression(max_iter=200), x, which, cv=3)
    lines.append(("corpora told apart", float((guess == which).mean()),
                  "accuracy of a linear classifier of words, 0.5 is chance"))  # fmt: skip
    return lines


def class_groups(ids: Iterable[str], classes: Int[np.ndarray, " N"]) -> dict[str, list[str]]:
    """Ids of the utterances of each sentiment class, under its signed number; empty ones, too."""
    ids, reach = np.asarray(list(ids)), int(np.abs(classes).max())
    return {f"{c:+d}" if c else "0": ids[classes == c].tolist() for c in range(-reach, reach + 1)}
