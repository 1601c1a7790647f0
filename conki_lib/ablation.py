"""Rows of every table as data: a name, the settings it changes, its meaning; and their runs.

`conki_lib.training.fine_tune` runs or loads a row.

Source: paper, experiments; parts of C4, readings, switches and sweeps are this project's additions.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml

from conki_lib.config import PRESETS, RunConfig, near_names
from conki_lib.records import Record, config_key, load_records


@dataclass(frozen=True)
class Variant:
    """One row: what it changes in a profile's configuration, and what that means."""

    name: str
    group: str
    meaning: str
    changes: dict[str, Any]


_CONTROLS = {
    "text-only": (
        "text backbone and a regression head", {"kind": "text-only", "modalities": "t"}
    ),
    "late fusion": ("one predictor per modality, averaged", {"kind": "late-fusion"}),
    "TFN": ("tensor fusion of all modalities", {"kind": "tfn"}),
    "LMF": ("low-rank multimodal fusion", {"kind": "lmf"}),
}  # fmt: skip
# what a profile has beside configs/<profile>.yml, which all rows share:
# (profile, row) -> values of its own: the best trials on the profile's validation split
TUNED = {("mosi-open", "text-only"): {"lr_heads": 1e-3, "epochs": 12}}
# profile -> rows trained by default beside full and w/o C4; there text carries nearly everything
_BY_DEFAULT = {"mosi-open": ["text-only"]}


def _variants() -> dict[str, Variant]:
    rows = [
        Variant("full", "components", "ConKI with all its components", {}),
        Variant("w/o C1", "components", "no external data: adapters start random and are trained "
                "in stage 2", {"external": None}),
        Variant("w/o C2", "components", "no adapters: no knowledge-specific representations",
                {"specific": False, "external": None}),
        Variant("w/o C3", "components", "no general knowledge: the text backbone starts random",
                {"text_init": "random"}),
        Variant("w/o C3 pan", "components", "second reading of w/o C3: no pan-knowledge "
                "representations", {"pan": False}),
        Variant("w/o C4", "components", "no contrastive loss: lambda = 0", {"lam": 0.0}),
    ]  # fmt: skip
    words = {"P1": "modality-level positive", "P2": "sample-level positive",
             "N1": "knowledge-level negative", "N2": "sample-level negative"}  # fmt: skip
    rows += [
        Variant(
            f"w/o {name}", "parts of C4", f"L_con without the {word} pairs", {"without": [name]}
        )
        for name, word in words.items()
    ]
    rows += [
        Variant(m, "modalities", f"modalities {' + '.join(m)} only", {"modalities": m})
        for m in ("t", "v", "a", "tv", "ta", "va")
    ]
    for name, (words, changes) in _CONTROLS.items():
        plain = {**changes, "lam": 0.0, "external": None}
        trained_before = {**changes, "lam": 0.0, "stage1_train": "all"}
        rows.append(Variant(name, "controls", words, plain))
        meaning = f"{words}; trained on the external corpus first"
        rows.append(Variant(f"{name} + external", "controls", meaning, trained_before))
    rows += [
        Variant("form=paper", "readings", "denominators per sample, summed over samples; lambda "
                "divided by the batch size", {"form": "paper"}),
        Variant("n1=literal", "readings", "N1 pairs for O rows only", {"n1": "literal"}),
    ]  # fmt: skip
    return {row.name: row for row in rows}


def _switches() -> dict[str, Variant]:
    released = PRESETS["released"]
    sizes = {k: released[k] for k in ("adapter_width", "adapter_heads", "adapter_ff")}
    schedule = {k: v for k, v in released.items() if k.startswith("stage1_")}
    several = {"adapters=released": sizes, "stage1=released": schedule}  # settings
    meanings = {
        "padding=released": "means include padded steps, adapters attend to them",
        "encoder_dropout=0.5": "vision and audio encoders as released",
        "adapters=released": "width 768, 12 heads, feed-forward 3072 as released, whatever d is",
        "adapter_init_std=0.0002": "adapters start as released",
        "adapter_text_pooling=pooler": "A_t from a pooler, as released",
        "text_pooling=pooler": "O_t from the backbone's pooler",
        "fusion=concat": "representations side by side, no gate",
        "stage1=released": "epochs and rates of stage 1 as released",
        "stage1_pan=false": "the heads of stage 1 read A_m alone",
        "freeze_adapters=false": "adapters are trained on in stage 2",
        "adapter_gradient=false": "no gradient through adapters into the backbones",
    }
    rows = {}
    for name, meaning in meanings.items():
        setting, _, value = name.partition("=")
        changes = several.get(name) or {setting: yaml.safe_load(value)}
        rows[name] = Variant(name, "switches", meaning, changes)
    return rows


VARIANTS = _variants()  # the rows of the main table
SWITCHES = _switches()  # one point of the audit each, shown by notebook 07
_NAMED = VARIANTS | SWITCHES
_SWEEP = re.compile(r"(lam|tau|batch_size)=(\d*\.?\d+(?:e-?\d+)?)")


def variant(name: str) -> Variant:
    """Look a row up by name; ``lam=0.1``, ``tau=0.2``, ``batch_size=16`` are rows too.

    Raises:
        ValueError: no such row; lists the near names.
    """
    if name in _NAMED:
        return _NAMED[name]
    if match := _SWEEP.fullmatch(name):
        setting, value = match.groups()
        number = int(value) if value.isdigit() else float(value)
        return Variant(name, "sweeps", f"{setting} set to {value}", {setting: number})
    raise ValueError(
        f"unknown variant {name!r}{near_names(name, _NAMED)}. Known are {', '.join(_NAMED)}, "
        "lam=<number>, tau=<number>, batch_size=<number>"
    )


def default_rows(profile: str) -> list[str]:
    """The rows that a profile trains by default; others are shown from committed records."""
    return ["full", "w/o C4", *_BY_DEFAULT.get(profile, ())]


def why_not(profile: RunConfig, name: str) -> str | None:
    """Say why a row cannot be run on a profile; None where it can."""
    changes = variant(name).changes
    has = "".join(profile.model.modalities)
    wanted = changes.get("modalities", "")
    if missing := [m for m in wanted if m not in has]:
        return f"the profile has no {''.join(missing)}"
    if any("text_" in setting for setting in changes) and "t" not in has:
        return "the profile has no pretrained backbone"
    if profile.data.external is None and "+ external" in name:
        return "the profile has no external corpus"
    if "+ external" in name and not _taught(profile, wanted):
        return "the external corpus has none of its modalities"
    return None


def _taught(profile: RunConfig, modalities: str) -> set[str]:
    """The modalities of a row that the profile's external corpus has, too; all where unknown."""
    from conki_lib.data import CORPORA  # loads PyTorch

    wanted, external = set(modalities or profile.model.modalities), profile.data.external
    return wanted & set(CORPORA[external].modalities) if external in CORPORA else wanted


def configure(
    profile: str, variant_name: str = "full", seed: int | None = None, **overrides: Any
) -> RunConfig:
    """The configuration of one row of a profile; overrides that are not None win.

    A row that changes nothing here (``ta`` where the profile has text and audio) is called full.
    Modalities of which the external corpus has none are run without it: as in full, where an
    adapter that no external data reached is trained in stage 2, from random values.

    Raises:
        FileNotFoundError: no such profile.
        ValueError: no such row, or the profile cannot run it; says why.
    """
    base = RunConfig.from_profile(profile)
    if reason := why_not(base, variant_name):
        raise ValueError(f"variant {variant_name!r} is not for profile {profile!r}: {reason}")
    tuned = TUNED.get((profile, variant_name.removesuffix(" + external")), {})
    changes = tuned | variant(variant_name).changes
    if "modalities" in changes and not _taught(base, changes["modalities"]):
        changes["external"] = None
    if variant_name == "form=paper":
        changes["lam"] = base.contrast.lam / base.stage2.batch_size
    overrides = {k: v for k, v in {**overrides, "seed": seed}.items() if v is not None}
    full = base.replace(variant="full", **overrides)
    row = base.replace(variant=variant_name, **{**changes, **overrides})
    return full if config_key(row, 2) == config_key(full, 2) else row


# ---- the rows that records hold -----------------------------------------------------------------


def row_order(names: Iterable[str]) -> list[str]:
    """Sort rows as the tables show them: as defined, then sweeps by setting and value."""
    known = list(_NAMED)

    def place(name: str) -> tuple:
        if name in _NAMED:
            return known.index(name), "", 0.0
        setting, _, value = name.partition("=")
        return len(known), setting, float(value)

    return sorted(dict.fromkeys(names), key=place)


def runs_of(profile: str, *, fold: str | None = None) -> list[Record]:
    """The finished runs behind a profile's tables: one per row and seed, of any code version.

    A record counts if its settings are those that `configure` gives today; precision, device and
    micro-batches may differ. Of several for one row and seed, today's code wins, then the newest.
    Tuning runs and runs with other settings stay out, and so do those on another version of the
    target corpus than the best of them.

    Args:
        profile: name of a profile.
        fold: of the target corpus; the profile's where None.
    """
    fold = fold or RunConfig.from_profile(profile).data.fold
    rows: dict[str, str] = {}
    ours = [r for r in load_records(profile) if r.stage == 2 and r.fold == fold]
    ours = sorted((r for r in ours if _is_a_row(r, rows)), key=lambda r: r.rank)
    data = [r.data.get(r.settings["target"]) for r in ours]
    found = {(r.variant, r.seed): r for r, x in zip(ours, data, strict=True) if x == data[-1]}
    order = row_order(name for name, _ in found)
    return sorted(found.values(), key=lambda r: (order.index(r.variant), r.seed))


def _is_a_row(record: Record, rows: dict[str, str]) -> bool:
    """Are a record's settings those that its row has today? `rows` keeps what was asked before."""
    try:
        if record.variant not in rows:
            wanted = configure(record.profile, record.variant, fold=record.fold)
            rows[record.variant] = row_key(wanted)
        return row_key(record.config) == rows[record.variant]
    except ValueError:
        return False  # a row or a setting that is no more


def row_key(config: RunConfig) -> str:
    """Hash of the settings that a run has by its row, whatever its seed and precision."""
    return config_key(config.replace(seed=0, precision="auto"), 2)


def run_table(records: Iterable[Record]) -> pd.DataFrame:
    """One line per run: variant, group, seed, key, what made it, epoch, seconds, test metrics."""
    lines = [
        {"variant": r.variant, "group": variant(r.variant).group, "seed": r.seed, "key": r.key,
         "code": "current" if r.is_current else "older",
         "device": r.provenance.get("device", ""), "precision": r.settings.get("precision", ""),
         "epoch": r.best_epoch, "seconds": r.provenance.get("seconds"), **r.metrics.get("test", {})}
        for r in records
    ]  # fmt: skip
    return pd.DataFrame(lines)


def coverage(profile: str, runs: pd.DataFrame) -> pd.DataFrame:
    """Every row of the tables with its number of runs, and the reason where there is none.

    Returns:
        Columns variant, group, n, reason (empty where n > 0), meaning; in the tables' order.
    """
    base = RunConfig.from_profile(profile)
    names, lines = list(runs["variant"]) if len(runs) else [], []
    for name in row_order([*VARIANTS, *names]):
        row, n = variant(name), names.count(name)
        reason = "" if n else why_not(base, name) or (
            "not run" if configure(profile, name).variant == name else "the same as full here"
        )  # fmt: skip
        lines.append({"variant": name, "group": row.group, "n": n, "reason": reason,
                      "meaning": row.meaning})  # fmt: skip
    return pd.DataFrame(lines)
