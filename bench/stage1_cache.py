"""Stage 1 from cached hidden states against backbones that run anew in every epoch.

    python bench/stage1_cache.py            # about 25 minutes with one thread, 2 GB of disk
    python bench/stage1_cache.py --quick    # tiny sizes, nothing written
    python bench/stage1_cache.py --page     # page and figure from the committed results

Stage 1 trains adapters on frozen backbones. Its `fit` runs one epoch (training, then validation) on
`synthetic-external` with and without the cache, in turns, from the same weights and seed. Weights
and predictions after it are compared. What the parts take alone (reading states, backbones) says
where the time goes, and how large the ratio could be if reading were free.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CONKI_HEADLESS"] = "1"

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from contrastive_loss import device_of, machine_of, median_ratio
from layouts import SPECIAL, save_bert
from report import facts, publish, published
from torch import nn
from torch.utils.data import DataLoader

from conki_lib.config import RunConfig
from conki_lib.data import FeatureStore, fetch, open_store
from conki_lib.data.store import write_store
from conki_lib.fitting import Job, fit, precision
from conki_lib.model import build_model, freeze_for_injection
from conki_lib.plots.style import PAIR_COLORS, use_style
from conki_lib.states import StateReader
from conki_lib.training import make_loaders, state_readers, task_only

CORPUS, NAME = "synthetic-external", "stage1_cache"
BASE = dict(d=768, layers=12, heads=12, ff=3072)
TINY = dict(d=16, layers=3, heads=2, ff=32)
RELEASED = dict(adapter_width=768, adapter_heads=12, adapter_ff=3072)


@dataclass(frozen=True)
class Case:
    """A backbone and adapters on a part of the corpus."""

    label: str
    adapters: dict
    backbone: dict | None = None  # sizes of a BERT of random weights; None: the default backbone
    utterances: tuple[int, int] = (1600, 200)  # train, valid
    rounds: int = 3


CASES = {
    "default": Case("MiniLM, 6 layers of 384; adapters 128 wide", {}),
    "base, small": Case(
        "BERT-base, 12 layers of 768; adapters 128 wide", {}, BASE, (480, 64)
    ),
    "base, released": Case(
        "BERT-base, 12 layers of 768; adapters as released, 768 wide", RELEASED, BASE, (480, 64)
    ),
    "default, text": Case("text alone: MiniLM; adapters 128 wide", {"modalities": "t"}),
    "base, text": Case(
        "text alone: BERT-base; adapters 128 wide", {"modalities": "t"}, BASE, (480, 64)
    ),
}  # fmt: skip
SMALL = dict(adapter_width=8, adapter_heads=2, adapter_ff=12, encoder_heads=2, encoder_ff=24)
QUICK = {"tiny": Case("a tiny BERT and tiny adapters", SMALL, TINY, (64, 16), 2)}


def part_of(store: FeatureStore, folder: Path, counts: tuple[int, int]) -> FeatureStore:
    """A store of the first utterances of both splits."""
    views = [store[split] for split in ("train", "valid")]
    rows = np.concatenate([v.rows[:n] for v, n in zip(views, counts, strict=True)])
    tables = [v.table.iloc[:n] for v, n in zip(views, counts, strict=True)]
    table = pd.concat(tables)[["id", "video", "clip", "text", "y", "standard"]]
    sequences = {m: [store.frames(m, int(row)) for row in rows] for m in store.info.widths}
    facts = dict(name=CORPUS, language="en", label_range=(-3.0, 3.0))
    return open_store(
        write_store(folder / CORPUS, table.reset_index(drop=True), sequences, **facts)
    )


class TimedJob(Job):
    """Also remembers the processor time at the end of the epoch, before checkpoints are written."""

    def score(self, split: str) -> dict[str, float]:
        """As `Job` does; the last thing in an epoch."""
        result = super().score(split)
        self.ended = time.process_time()
        return result


class Bench:
    """Stage 1 of one case: model, loaders and cache."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.folder = folder
        self.store = part_of(open_store(fetch(CORPUS)), folder, case.utterances)
        widths = {CORPUS: dict(self.store.info.widths)}
        chosen = dict(case.adapters, stage1_epochs=1, device="cpu", widths=widths)
        if case.backbone:
            texts = [text for s in ("train", "valid") for text in self.store[s].table["text"]]
            words = sorted({word for text in texts for word in text.lower().split()})
            size = max(30522, len(SPECIAL) + len(words))  # as BERT's, but all words are known
            bert = dict(weights=False, vocab_size=size, **case.backbone)
            name = save_bert(folder / "bert", words, **bert)
            chosen |= dict(text_backbone=name, text_init="random", d=case.backbone["d"])
        self.config = RunConfig(**chosen)
        torch.manual_seed(0)
        self.model = build_model(self.config.model)
        freeze_for_injection(self.model)
        self.start = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.loaders = self.new_loaders()
        self.readers: dict[str, StateReader] = {}

    def new_loaders(self) -> dict[str, DataLoader]:
        """Loaders of both splits; text is tokenised here."""
        return make_loaders(self.config, self.store, self.config.stage1, splits=("train", "valid"))

    def build_cache(self) -> dict:
        """Compute all states; seconds and bytes."""
        start = time.perf_counter()
        self.readers = state_readers(self.model, self.config, self.store, self.loaders)
        assert self.readers, "the disk has too little space"
        seconds = time.perf_counter() - start
        files = [f for f in (self.folder / "runs").rglob("*") if f.is_file()]
        return {"build_seconds": seconds, "bytes": sum(f.stat().st_size for f in files)}

    def epoch(self, cached: bool, turn: int) -> tuple[dict[str, float], dict, pd.DataFrame]:
        """One epoch of `fit` from the start: its seconds, weights and predictions after it."""
        self.model.load_state_dict(self.start)
        job = TimedJob(
            f"{'cached' if cached else 'recomputed'} {turn}", self.model, self.loaders,
            self.config.stage1, self.config.runtime, task_only, (-3.0, 3.0),
            self.folder / f"fit-{cached}-{turn}", self.readers if cached else {},
        )  # fmt: skip
        job.folder.mkdir()
        busy = time.process_time()
        _, history = fit(job)
        spent = {"clock": history[0]["seconds"], "cpu": job.ended - busy}
        weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        predictions = job.predict("valid")
        shutil.rmtree(job.folder)
        return spent, weights, predictions

    @torch.no_grad()
    def alone(self) -> dict[str, float]:
        """Seconds that reading states and running backbones take in an epoch, nothing else."""
        self.model.eval()
        return {
            "reading": sum(seconds(self.loaders[s], self.readers[s]) for s in self.readers),
            "backbones": sum(seconds(self.loaders[s], self.model.encode) for s in self.readers),
        }


def seconds(loader: DataLoader, what: Callable) -> float:
    """Time a pass over a loader that does something with every batch."""
    start = time.perf_counter()
    for batch in loader:
        what(batch)
    return time.perf_counter() - start


def measure(case: Case) -> dict:
    """All that is asked of one case."""
    with workplace() as folder, precision("fp32-fast"):
        bench = Bench(case, folder)
        result = {"label": case.label, "utterances": case.utterances, "rounds": case.rounds}
        result |= bench.build_cache()
        result |= {"trained": count(bench.model, True), "frozen": count(bench.model, False)}
        spent: dict[str, list[dict]] = {"cached": [], "recomputed": [], "alone": []}
        for turn in range(case.rounds):
            spent["alone"].append(bench.alone())
            after = {}
            for name in ("cached", "recomputed"):
                found, *after[name] = bench.epoch(name == "cached", turn)
                spent[name].append(found)
            result |= differences(*after.values(), start=bench.start)
    return result | summary(spent)


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder that also takes the cache."""
    before = os.environ.get("CONKI_RUNS")
    with tempfile.TemporaryDirectory() as name:
        os.environ["CONKI_RUNS"] = str(Path(name) / "runs")
        try:
            yield Path(name)
        finally:
            os.environ.pop("CONKI_RUNS")
            if before is not None:
                os.environ["CONKI_RUNS"] = before


def count(model: nn.Module, trained: bool) -> int:
    """Parameters that are trained, or frozen."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad == trained)


def differences(cached: list, recomputed: list, *, start: dict) -> dict[str, float]:
    """How far weights and predictions lie apart after the epoch, and how far weights went."""
    (w, table), (v, other) = cached, recomputed
    return {
        "weights_apart": max(float((w[k] - v[k]).abs().max()) for k in w),
        "weights_moved": max(float((v[k] - start[k]).abs().max()) for k in v),
        "predictions_apart": float((table["y_hat"] - other["y_hat"]).abs().max()),
        "mae_apart": abs(mae(table) - mae(other)),
    }


def mae(table: pd.DataFrame) -> float:
    """Mean absolute error of predictions."""
    return float((table["y_hat"] - table["y"]).abs().mean())


def summary(spent: dict[str, list[dict]]) -> dict[str, float]:
    """Medians over rounds; ratios of the same round."""
    result = {}
    for name, rounds in spent.items():
        for what in rounds[0]:
            result[f"{name}_{what}"] = statistics.median(r[what] for r in rounds)
    for how in ("clock", "cpu"):
        sides = [[r[how] for r in spent[name]] for name in ("recomputed", "cached")]
        result[f"ratio_{how}"] = median_ratio(*sides)
    return result


def run(cases: dict[str, Case]) -> dict:
    """All cases."""
    with precision("fp32-fast"):
        result = {
            "machine": machine_of(torch.get_float32_matmul_precision(), torch.device("cpu")),
            "cases": {},
        }
    for name, case in cases.items():
        result["cases"][name] = measure(case)
        print(name, json.dumps(result["cases"][name], indent=1), flush=True)
    return result


# --- page and figure ----------------------------------------------------------------------------


def draw(result: dict) -> plt.Figure:
    """Processor time of an epoch over its utterances, both ways, per case."""
    use_style()
    rows = pd.DataFrame(result["cases"]).T
    fig, ax = plt.subplots(figsize=(8, 3.6))
    at, counts = np.arange(len(rows)), rows["utterances"].map(sum)
    sides = (("recomputed", "backbones anew", "P1"), ("cached", "from the cache", "N1"))
    for i, (name, label, color) in enumerate(sides):
        values = (1000 * rows[f"{name}_cpu"] / counts).astype(float)
        bars = ax.barh(at + 0.4 * i - 0.2, values, 0.36, color=PAIR_COLORS[color], label=label)
        ax.bar_label(bars, [f"{x:.3g}" for x in values], padding=3, fontsize=9)
    ax.set_yticks(at, [label.replace("; ", "\n") for label in rows["label"]])
    ax.set(title="An utterance in an epoch of stage 1", xlabel="milliseconds of processor time")
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.grid(axis="y", visible=False)
    ax.legend(title=device_of(result), title_fontsize=10, loc="best")
    return fig


def page(result: dict) -> str:
    """The page of the benchmark; every number in it comes from the result."""
    cases = result["cases"].values()
    speed = [
        f"| {c['label']} | {c['recomputed_clock']:.1f} s | {c['cached_clock']:.1f} s "
        f"| {c['ratio_clock']:.1f} | {c['ratio_cpu']:.1f} | {limit(c):.1f} | at least 10 |"
        for c in cases
    ]
    parts = [
        f"| {c['label']} | {c['utterances'][0]} + {c['utterances'][1]} | {c['frozen'] / 1e6:.1f} "
        f"| {c['trained'] / 1e6:.1f} | {c['alone_backbones']:.2f} s | {c['alone_reading']:.2f} s "
        f"| {c['build_seconds']:.1f} s | {c['bytes'] / 1e6:.0f} MB | {pays_after(c)} |"
        for c in cases
    ]
    same = [
        f"| {c['label']} | {c['weights_apart']:.1e} | {c['weights_moved']:.1e} "
        f"| {c['predictions_apart']:.1e} | {c['mae_apart']:.1e} |"
        for c in cases
    ]
    return PAGE.format(
        facts=facts(result),
        speed="\n".join(speed),
        parts="\n".join(parts),
        same="\n".join(same),
        met=verdict([c["ratio_clock"] for c in cases]),
        rounds=max(c["rounds"] for c in cases),
    )


def limit(c: dict) -> float:
    """The ratio, if reading states took no time."""
    return c["recomputed_clock"] / (c["cached_clock"] - c["alone_reading"])


def pays_after(c: dict) -> str:
    """Epochs after which the building of the cache is saved."""
    saved = c["recomputed_clock"] - c["cached_clock"]
    return f"{c['build_seconds'] / saved:.1f}" if saved > 0 else "never"


def verdict(ratios: list[float]) -> str:
    """Whether ten times was reached, in words."""
    met = sum(ratio >= 10 for ratio in ratios)
    return f"Ten times is reached in {met} of {len(ratios)} cases by the clock."


PAGE = """# Stage 1 from cached hidden states

Written by `python bench/stage1_cache.py`; every number below comes from
`results/bench/stage1_cache.json`.

Stage 1 trains adapters on frozen backbones, whose hidden states never change. The library computes
them once, and trains from a memory-mapped cache. Here one epoch of `fit`, training and validation,
runs both ways in turns, from the same weights and seed, on `synthetic-external` or its first
utterances; batches of 32, fp32-fast, medians of {rounds} rounds. The BERT has random weights, which
changes no time. Where other work ran beside, as the load says, read the processor time. With
`padding: released` (profiles `mosi`, `mosei`, `sims`) states depend on their batch's longest
sequence: there is no cache, and stage 1 runs its backbones anew.

{facts}

![processor time of an utterance in an epoch, both ways](stage1_cache.png)

## Asked and found

| | backbones anew | from the cache | ratio by the clock | processor time | free reading | asked |
|---|---:|---:|---:|---:|---:|---:|
{speed}

{met}

The cache takes the backbones out of the epoch; what stays is training the adapters, forward
and backward, and the heads. The ratio therefore is one plus backbones over adapters, and small
adapters below a large backbone gain most. "Free reading" is the ratio if reading states took no
time: no cache can do better with the same adapters. Vision and audio cost their adapters most, by
their many steps; the last two cases are those of an external corpus of text alone, such as
`meld-text`.

## What the parts take

Parameters in millions; seconds of a pass over both splits that does nothing else.

| | utterances | frozen | trained | backbones | reading states | building | size | epochs to pay |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{parts}

The last column is the time of building over the time that an epoch saves. A cache is shared by all
runs with the same backbone, plugged-in layers and corpus, whatever their adapters' sizes.

## The same result

Largest absolute differences between both ways after the epoch; beside them, how far the weights
moved in it. States are computed in batches of other lengths than those that training sees, so that
sums are rounded differently.

| | weights | weights moved by | predictions on valid | MAE |
|---|---:|---:|---:|---:|
{same}
"""


def main() -> None:
    """Measure, write the record, the figure and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    parser.add_argument("--page", action="store_true", help="redraw from the committed results")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.page:
        result = published(NAME)
    else:
        result = run(QUICK if given.quick else CASES)
    if given.quick:
        draw(result)
        print(page(result))
        return
    publish(NAME, result, page(result), draw(result))


if __name__ == "__main__":
    main()
