"""Paper against released code: what each difference does, measured by switching it.

The rows are data, in ``docs/audit.yml``; ``docs/AUDIT.md`` is generated from them and from the
measured effects in ``results/*/audit_effects.json``. Effects on a loss or an output are measured on
toys and corpora in seconds; effects on training are read from run records, never guessed.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from conki_lib.ablation import row_order, run_table, runs_of
from conki_lib.adapters import AdapterModule
from conki_lib.config import ROOT, ModelConfig, RunConfig
from conki_lib.data import Batch, FeatureStore, tokenise
from conki_lib.encoders import TransformerStack, load_tokenizer
from conki_lib.losses import contrastive_loss, log_f
from conki_lib.model import Gate, build_model
from conki_lib.pairs import REPS, Labels, pair_masks, sentiment_class
from conki_lib.records import predictions
from conki_lib.statistics import metric_set, paired_differences, videos_of

TOY = dict(d=32, widths={"toy": {"v": 5, "a": 3}}, modalities="va", encoder_heads=4, encoder_ff=32,
           encoder_positions=64, adapter_width=16, adapter_heads=4, adapter_ff=16)  # fmt: skip


def read_rows(root: Path = ROOT) -> list[dict[str, Any]]:
    """The audit's rows: point, paper, released, ours, setting, effect, rows."""
    return yaml.safe_load((root / "docs" / "audit.yml").read_text())


# ---- effects on the loss ------------------------------------------------------------------------


def toy_reps(n: int = 16) -> tuple[Float[Tensor, "n K d"], Float[Tensor, " n"]]:
    """Random representations and labels in float64, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    reps = torch.randn(n, len(REPS), 32, generator=generator, dtype=torch.float64)
    y = (1.5 * torch.randn(n, generator=generator, dtype=torch.float64)).round(decimals=1)
    return reps.requires_grad_(), y.clamp(-3, 3)


def compare_losses(one: Tensor, other: Tensor, reps: Tensor) -> dict[str, float]:
    """Values of two losses and the cosine between their gradients at the representations."""
    a, b = (
        torch.autograd.grad(loss, reps, retain_graph=True)[0].flatten() for loss in (one, other)
    )
    return {"one": one.item(), "other": other.item(), "cosine": cosine_similarity(a, b, 0).item()}


def pooled_loss(
    reps: Float[Tensor, "B K d"], y: Labels, *, within: float = 1.0
) -> Float[Tensor, ""]:
    """L_con in the paper's form, with a weight for the pairs of P1 alone.

    `within` 1 counts ordered pairs, as this project does; 0.5 counts each unordered pair of P1
    once, as the appendix draws them. The symmetric N1's pairs inside a sample, which are ordered
    too, keep their weight, and pairs across samples their one anchor.
    """
    rows, pairs = reps.flatten(0, 1), pair_masks(y, REPS)
    weight = torch.where(pairs.P1, within, pairs.all.to(reps.dtype))
    scores = log_f(rows, rows, tau=0.07).unflatten(0, reps.shape[:2]).flatten(1)
    weight = weight.unflatten(0, reps.shape[:2]).flatten(1)
    positive = weight * pairs.positive.unflatten(0, reps.shape[:2]).flatten(1)
    denominator = (scores + weight.log()).logsumexp(1)
    return (denominator - (positive * scores).sum(1) / positive.sum(1)).sum()


def supervised_contrastive(rows: Float[Tensor, "R d"], label: Tensor) -> Float[Tensor, ""]:
    """The plain supervised contrastive loss at tau = 0.07: cross-entropy, mean over positives.

    Source: Khosla et al. 2020, L_out.
    """
    z = normalize(rows, dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool)
    logits = (z @ z.T / 0.07).masked_fill(itself, -torch.inf)
    positive = (label[:, None] == label) & ~itself
    losses = []
    for i in range(len(rows)):
        chosen = positive[i].nonzero().flatten()
        repeated = logits[i].expand(len(chosen), -1)
        losses.append(cross_entropy(repeated, chosen))
    return torch.stack(losses).mean()


def _form() -> str:
    reps, y = toy_reps()
    found = compare_losses(
        contrastive_loss(reps, y), contrastive_loss(reps, y, form="paper") / len(y), reps
    )
    return (f"toy of 16 samples: {found['one']:.2f} per row, {found['other']:.2f} per sample; "
            f"cosine of the gradients {found['cosine']:.3f}")  # fmt: skip


def _batch_size() -> str:
    values = {}
    for n in (8, 32):
        reps, y = toy_reps(n)
        values[n] = [contrastive_loss(reps, y, form=f).item() for f in ("released", "paper")]
    grow = [b / a for a, b in zip(values[8], values[32], strict=True)]
    return (f"from 8 to 32 samples the released form grows {grow[0]:.2f}-fold, the paper's sum "
            f"{grow[1]:.2f}-fold; the row form=paper divides lambda by the batch size")  # fmt: skip


def _n1() -> str:
    reps, y = toy_reps()
    found = compare_losses(contrastive_loss(reps, y), contrastive_loss(reps, y, n1="literal"), reps)
    return (f"toy: {found['one']:.2f} symmetric, {found['other']:.2f} literal; cosine of the "
            f"gradients {found['cosine']:.3f}")  # fmt: skip


def _p1() -> str:
    reps, y = toy_reps()
    found = compare_losses(pooled_loss(reps, y), pooled_loss(reps, y, within=0.5), reps)
    change = found["other"] / found["one"] - 1
    return (f"toy, paper form, P1 alone: {found['one']:.2f} ordered, {found['other']:.2f} un"
            f"ordered ({change:+.1%}); cosine of the gradients {found['cosine']:.4f}")  # fmt: skip


def _supcon() -> str:
    reps, y = toy_reps()
    kind = torch.tensor([name.startswith("O") for name in REPS]).repeat(len(y))
    label = 2 * sentiment_class(y).repeat_interleave(len(REPS)) + kind
    plain = supervised_contrastive(reps.flatten(0, 1), label)
    gap = abs(plain - contrastive_loss(reps, y)).item()
    return f"toy: the plain loss on labels (kind, class) differs from L_con by {gap:.0e}"


# ---- effects on the model -----------------------------------------------------------------------


def toy_batch(pad: int = 0) -> Batch:
    """16 random vision and audio sequences of 2 to 12 steps; `pad` appends padding, no more."""
    generator, n = torch.Generator().manual_seed(0), 16
    lengths = {m: torch.randint(2, 13, (n,), generator=generator) for m in "va"}
    inputs = {}
    for m, d in (("v", 5), ("a", 3)):
        x = torch.randn(n, 12, d, generator=generator)
        x[torch.arange(12) >= lengths[m][:, None]] = 0
        inputs[m] = torch.cat([x, x.new_zeros(n, pad, d)], dim=1)
    ids = tuple(str(i) for i in range(n))
    return Batch(inputs, lengths, torch.zeros(n), ids, torch.arange(n), "toy")


@torch.no_grad()
def padding_effect(padding: str, pad: int = 40) -> dict[str, float]:
    """Change of O_m, A_m (relative to their length) and y^ (to its deviation) under padding.

    Args:
        padding: the setting, "masked" or "released".
        pad: steps of padding that are appended.
    """
    torch.manual_seed(0)
    model = build_model(ModelConfig(**TOY, padding=padding)).eval()
    plain, padded = model(toy_batch()), model(toy_batch(pad))
    change = (padded.reps - plain.reps).norm(dim=2) / plain.reps.norm(dim=2)
    kinds = {kind: [k for k, name in enumerate(plain.names) if name[0] == kind] for kind in "OA"}
    found = {kind: change[:, k].mean().item() for kind, k in kinds.items()}
    moved = (padded.y_hat - plain.y_hat).abs().mean() / plain.y_hat.std()
    return found | {"y_hat": moved.item()}


def _padding() -> str:
    masked, released = (padding_effect(p) for p in ("masked", "released"))
    return (f"toy, 40 padded steps: O_m moves by {released['O']:.0%} of its length as released, "
            f"by {masked['O']:.0g} masked; y^ by {released['y_hat']:.1f} of its deviation, "
            f"by {masked['y_hat']:.0g}")  # fmt: skip


def _padding_adapters() -> str:
    masked, released = (padding_effect(p) for p in ("masked", "released"))
    return (f"toy, 40 padded steps: A_m moves by {released['A']:.0%} of its length as released, "
            f"by {masked['A']:.0g} masked")  # fmt: skip


@torch.no_grad()
def _init() -> str:
    x, changes = torch.randn(8, 10, 32, generator=torch.Generator().manual_seed(0)), []
    for std in (0.0002, 0.02):
        torch.manual_seed(0)
        module = AdapterModule(ModelConfig(**TOY, adapter_init_std=std)).eval()
        changes.append(((module(x, None) - x).norm() / x.norm()).item())
    return (f"toy, {TOY['adapter_width']} wide inside: a new module changes its input by "
            f"{changes[0]:.0e} of its length at 0.0002, by {changes[1]:.0e} at 0.02, and by more "
            "the wider it is")  # fmt: skip


@torch.no_grad()
def _stack() -> str:
    torch.manual_seed(0)
    stack = TransformerStack(2, 32, 4, 32, 0.1).eval()
    stock = nn.TransformerEncoder(stack.layers[0], 2, enable_nested_tensor=False).eval()
    stock.layers = stack.layers
    x = torch.randn(4, 9, 32)
    gap = (stack(x, None)[-1] - stock(x)).abs().max().item()
    return f"the last hidden state differs from the stock encoder's output by {gap:.0g}"


def _gate() -> str:
    parameters = sum(p.numel() for p in Gate(3 * 768, 8).parameters())
    return f"the gate adds {parameters / 1e6:.2f} million parameters at d = 768"


TOYS: dict[str, Callable[[], str]] = {
    "form": _form, "batch_size": _batch_size, "n1": _n1, "p1": _p1, "supcon": _supcon,
    "padding": _padding, "padding_adapters": _padding_adapters, "init": _init, "stack": _stack,
    "gate": _gate,
}  # fmt: skip


# ---- effects on a corpus, effects in records ----------------------------------------------------


def ties(y: Float[np.ndarray, " N"]) -> dict[str, float]:
    """How many labels lie on a tie, and how many pairs change sides if ties round away from 0."""
    y = np.asarray(y, np.float64)
    even, away = np.rint(y), np.sign(y) * np.floor(np.abs(y) + 0.5)
    changed = (even[:, None] == even) != (away[:, None] == away)
    n = len(y)
    return {"labels": float((np.abs(y) % 1 == 0.5).mean()), "pairs": changed.sum() / (n * (n - 1))}


def corpus_effects(config: RunConfig, store: FeatureStore) -> dict[str, str]:
    """Effects that the target corpus alone decides: ties of r(.), cut texts."""
    found = ties(store["train"].y)
    effects = {"ties": f"{found['labels']:.0%} of the training labels are ties; rounding them away "
               f"from 0 would move {found['pairs']:.0%} of the pairs of utterances "
               "between P2 and N2"}  # fmt: skip
    if "t" in config.model.modalities:
        tokenizer = load_tokenizer(config.model.text_backbone)
        texts = [text for split in store.splits for text in store[split].columns["text"]]
        lengths = np.array([len(t) for t in tokenise(texts, tokenizer, max_tokens=512)])
        effects["tokens"] = (f"{(lengths > 50).mean():.1%} of the texts are longer than 50 word "
                             f"pieces, {(lengths > 64).mean():.1%} than 64")  # fmt: skip
    return effects


def row_differences(profile: str, *, draws: int = 2000) -> dict[str, pd.DataFrame]:
    """Paired differences to `full`, from a profile's records, in three families.

    Returns:
        ``"rows"`` of the main table, ``"switches"`` of the audit's points and ``"sweeps"``, each
        with Holm's correction of its own; empty tables where there is no run.
    """
    records = runs_of(profile)
    runs = run_table(records)
    found = {family: pd.DataFrame() for family in ("rows", "switches", "sweeps")}
    if runs.empty or "full" not in set(runs["variant"]):
        return found
    test = predictions(profile)
    test = test[test["key"].isin(runs["key"]) & (test["split"] == "test")]
    chance = {
        "metrics": metric_set(runs), "draws": draws,
        "clusters": videos_of(records[0].settings["target"], test["id"].unique()),
    }  # fmt: skip
    places = {name: place for place, name in enumerate(row_order(test["variant"]))}
    test = test.sort_values("variant", key=lambda names: names.map(places), kind="stable")
    groups = test["variant"].map(dict(zip(runs["variant"], runs["group"], strict=True)))
    groups = groups.where(groups.isin(["switches", "sweeps"]), "rows")
    for family in found:
        part = test[(groups == family) | (test["variant"] == "full")]
        found[family] = paired_differences(part, **chance)
    return found


def record_effects(profile: str, differences: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Effects that only training shows, in words; nothing where no run is.

    Args:
        profile: name of a profile.
        differences: from `row_differences`.

    Returns:
        Names of measurements, and names of rows: the paired difference to `full` in MAE; of swept
        settings: its range.
    """
    full = [r for r in runs_of(profile) if r.variant == "full"]
    if not full:
        return {}
    effects = _of_full(run_table(full), full)
    for table in (differences["rows"], differences["switches"]):
        for row in table[table["metric"] == "mae"].itertuples() if len(table) else ():
            p = f", Holm p {row.p_holm:.2g}" if row.seeds > 1 else ""
            effects[row.variant] = (f"{row.variant}: MAE {row.difference:+.3f} [{row.low:+.3f}, "
                                    f"{row.high:+.3f}], n = {row.seeds}{p}")  # fmt: skip
    return effects | sweep_effects(differences["sweeps"])


def sweep_effects(differences: pd.DataFrame) -> dict[str, str]:
    """Say for each swept setting, in one line, how far the MAE moves from that of the base row.

    Args:
        differences: from `conki_lib.statistics.paired_differences`, of the sweeps' rows alone.
    """
    if differences.empty:
        return {}
    mae = differences[differences["metric"] == "mae"].set_index("variant")
    effects = {}
    for setting, part in mae.groupby(lambda name: name.partition("=")[0]):
        ends = (part["difference"].idxmin(), part["difference"].idxmax())
        low, high = (f"{part['difference'][name]:+.3f} ({name})" for name in ends)
        sure = ", ".join(row_order(part.index[part["p_holm"] < 0.05])) or "none"
        effects[f"sweep of {setting}"] = (
            f"sweep of {setting}, {len(part)} other values, n = {part['seeds'].min()}: MAE "
            f"{low} to {high}; at Holm p < 0.05: {sure}"
        )
    return effects


def _of_full(runs: pd.DataFrame, records: list) -> dict[str, str]:
    gaps = [r.history[-1]["valid_mae"] - r.history[r.best_epoch - 1]["valid_mae"] for r in records]
    effects = {"selection": f"the last epoch's validation MAE is {np.mean(gaps):+.3f} against the "
               f"chosen one's (>= 0 by construction), n = {len(gaps)}"}  # fmt: skip
    if len(runs) > 1:
        effects["seeds"] = (f"MAE of full: deviation {runs['mae'].std():.3f}, range "
                            f"{np.ptp(runs['mae']):.3f} over n = {len(runs)} seeds")  # fmt: skip
    if "acc2_has0" in runs:
        gap = (runs["acc2_non0"] - runs["acc2_has0"]).mean()
        effects["acc2"] = f"non0 minus has0: {100 * gap:+.1f} points, n = {len(runs)}"
    return effects


# ---- the page -----------------------------------------------------------------------------------


def held_effects(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """Profile -> measured effects, as committed; toys stand under "toy"."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((root / "results").glob("*/audit_effects.json")):
        found[path.parent.name] = json.loads(path.read_text())
    return found


def effect_of(row: dict[str, Any], effects: dict[str, dict[str, str]]) -> list[str]:
    """The measured effects of one row, toys once, others with their profile."""
    lines: list[str] = []
    for name in (*row["effect"], *row_order(row["rows"])):
        found = {profile: held[name] for profile, held in effects.items() if name in held}
        by_profile = [f"{profile}: {text}" for profile, text in found.items()]
        lines += sorted(found.values())[:1] if name in TOYS else by_profile
    return lines


def measured_by(row: dict[str, Any], effects: Mapping[str, str]) -> dict[str, bool]:
    """Has a point an effect by training rows or sweeps, and has it one by anything else?"""
    of_training = {*row["rows"], *(e for e in row["effect"] if e.startswith("sweep of"))}
    others = set(row["effect"]) - of_training
    return {
        "by training rows": any(name in effects for name in of_training),
        "on toys, labels or all runs of full": any(name in effects for name in others),
    }


def page(root: Path = ROOT) -> str:
    """The text of ``docs/AUDIT.md``."""
    effects = held_effects(root)
    lines = [
        "# Audit: paper, released code, this project", "",
        "Generated by notebook [07](../notebooks/07_paper_vs_release.ipynb) from `audit.yml` and "
        "the measured effects; edit those, not this page. What paper and released code do is "
        "stated as facts, and what is inferred says so; nothing of the released code is copied. "
        "Toys are measured in seconds on random numbers; effects on training come from run "
        "records: the difference to `full`, paired, with a 95 % interval over videos and seeds; an "
        "MAE above 0 is worse, n counts seeds, Holm p is corrected over the profile's main rows, "
        "sweeps or switches. `mosi-open` is CMU-MOSI, `mmmo-open` ICT-MMMO; rows are explained "
        "[below each table](../results/mosi-open/tables/main.md). No record, no number.", "",
        "| point | paper | released code | here | setting | measured effect |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in read_rows(root):
        measured = "<br>".join(effect_of(row, effects)) or "not measured"
        setting = row["setting"].replace("|", "or")
        cells = [row[c] for c in ("point", "paper", "released", "ours")]
        lines.append("| " + " | ".join([*cells, setting, measured]) + " |")
    return "\n".join(lines) + "\n"
