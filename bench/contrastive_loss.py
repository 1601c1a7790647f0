"""Time and memory of the contrastive loss, forward and backward: alternatives and limits.

    python bench/contrastive_loss.py            # about ten minutes on two cores, one on a GPU
    python bench/contrastive_loss.py --quick    # a minute, nothing written
    python bench/contrastive_loss.py --page     # pages and figures from the committed results

All variants of a batch size take turns in one process, with one precision of matrix products, so
that a busy machine slows all of them alike: read the ratios, by the clock where the machine was
idle, else of processor time with --threads 1. Memory is the peak beyond the input, each in a
process of its own. Writes results/bench/contrastive_loss.{json,csv} and docs/benchmarks/.

Uses a GPU where there is one; then the results' names end in `_cuda`, only the clock counts, memory
is that of PyTorch's allocator, and two variants more take part (EXTRA).
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import pandas as pd
import psutil
import torch
from report import facts, machine, publish
from torch import Tensor

from conki_lib import tiles
from conki_lib.config import ROOT
from conki_lib.losses import contrastive_loss, dense_loss, log_f
from conki_lib.pairs import REPS, rows_of
from conki_lib.plots.style import INK, MUTED, use_style

D_MODEL, TAU = 768, 0.07
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
RESULTS = ROOT / "results/bench"
CLEAR = Path("/proc/self/clear_refs")
EXTRA = ("compiled", "retiled")  # variants that a CPU leaves out unless asked for
SLOW = ("loop", "lists")  # variants that take their turn in a few rounds only
OTHER_TILE = tiles.TILE if GPU else tiles.GPU_TILE  # the tile that suits the other device


@dataclass(frozen=True)
class Plan:
    """What a sweep does."""

    rounds: dict[int, int]  # by batch size
    measured: dict[str, tuple[int, ...]]  # batch sizes by variant
    largest: dict[str, int]  # batch sizes; beyond, minutes or all memory
    few: int  # rounds of slow variants


FULL = Plan(
    rounds={32: 60, 128: 20, 512: 7, 1024: 5},
    measured={
        "supcon": (128, 512, 1024, 2048),
        "dense": (128, 512, 1024, 2048),
        "auto": (128, 512, 1024, 2048, 4096),
        "tiled": (128, 512, 1024, 2048, 4096, 8192, 16384),
        "compiled": (128, 512, 1024),
        "retiled": (128, 512, 1024, 2048, 4096),
    },
    largest={"loop": 128, "lists": 512},
    few=4,
)
FULL_GPU = Plan(
    rounds={32: 60, 128: 40, 512: 20, 1024: 20, 4096: 5},
    measured={
        "supcon": (128, 512, 1024, 2048),
        "dense": (128, 512, 1024, 2048, 4096),
        "auto": (128, 512, 1024, 2048, 4096),
        "tiled": (128, 512, 1024, 2048, 4096, 8192, 16384, 32768),
        "compiled": (128, 512, 1024, 4096),
        "retiled": (128, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    },
    largest={"loop": 128, "lists": 128, "supcon": 1024},
    few=2,
)
QUICK = Plan({32: 9, 128: 5}, {name: (64, 128) for name in FULL.measured}, FULL.largest, 2)
STYLES = {
    "loop": ("Python loop over the mask's entries", "#B07D2B", "v-"),
    "lists": ("Python loop over lists", "#E3C16F", "v-"),
    "supcon": ("pytorch-metric-learning SupConLoss", "#C1272D", "^-"),
    "dense": ("dense: autograd with masks", "#F08A5D", "s-"),
    "tiled": ("tiled", "#2166AC", "o-"),
    "auto": ("auto", "#0B6B3A", "D-"),
    "retiled": ("tiled, the other device's tiles", "#92C5DE", "o--"),
    "compiled": ("dense by torch.compile", "#7B3294", "s--"),
    "limit 4": ("limit of tiled: bare products, 4 R²d", MUTED, ":"),
    "limit 3": ("limit of auto: bare products, 3 R²d, and exp", INK, ":"),
}


def batch(B: int, kind: str = "random") -> tuple[Tensor, Tensor]:
    """B samples of six representations, and labels of seven classes, on the device."""
    g = torch.Generator(DEVICE).manual_seed(B)
    reps = torch.empty(B, len(REPS), D_MODEL, device=DEVICE).normal_(generator=g)
    y = torch.randint(-3, 4, (B,), generator=g, device=DEVICE)
    centres = torch.randn(7, D_MODEL, generator=g, device=DEVICE)
    if kind == "clustered":
        reps += centres[y + 3, None]
    if kind == "collapsed":
        reps = centres[0] + 0.2 * reps
    if kind == "one point":
        reps, y = centres[0] + 0.01 * reps, torch.zeros_like(y)
    return reps, y.float()


def by_method(method: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The library's loss."""
    return lambda reps, y: contrastive_loss(reps, y, tau=TAU, method=method)


def mask_of_entries(rows: list[tuple[bool, int]]) -> Tensor:
    """Write the positives' mask entry by entry."""
    mask = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for p, row in enumerate(rows):
        for q, other in enumerate(rows):
            mask[p, q] = p != q and row == other
    return mask


def mask_of_lists(rows: list[tuple[bool, int]]) -> Tensor:
    """Make lists of plain numbers, and a mask of them at the end."""
    return torch.tensor(
        [[p != q and row == other for q, other in enumerate(rows)] for p, row in enumerate(rows)]
    )


def by_loop(reps: Tensor, y: Tensor, *, mask: Callable) -> Tensor:
    """A mask from two Python loops, then the dense loss; a row's kind and class decide."""
    rows = rows_of(y)
    positive = mask(list(zip(rows.pan.tolist(), rows.label.tolist(), strict=True)))
    return released(reps.flatten(0, 1), positive.to(reps.device))


def released(x: Tensor, positive: Tensor, tau: float = TAU) -> Tensor:
    """The dense loss of rows that all have a positive pair."""
    scores = log_f(x, x, tau=tau)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    log_denominator = scores.masked_fill(itself, -math.inf).logsumexp(1)
    return (log_denominator - (scores * positive).sum(1) / positive.sum(1)).mean()


@partial(torch.compile, fullgraph=True, dynamic=False)
def released_by_kind(x: Tensor, kind: Tensor) -> Tensor:
    """The dense loss without the checks of labels, which a graph cannot hold; masks are fused."""
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    return released(x, (kind[:, None] == kind) & ~itself)


def by_compiler(reps: Tensor, y: Tensor) -> Tensor:
    """The dense loss, compiled for its batch size; kind and class are one number."""
    rows = rows_of(y)
    return released_by_kind(reps.flatten(0, 1), 2 * rows.label + rows.pan)


def by_other_tiles(reps: Tensor, y: Tensor) -> Tensor:
    """The library's tiled loss with the tile that suits the other kind of device."""
    with mock.patch.multiple(tiles, TILE=OTHER_TILE, GPU_TILE=OTHER_TILE):
        return by_method("tiled")(reps, y)


def by_supcon(reps: Tensor, y: Tensor) -> Tensor:
    """The same loss by pytorch-metric-learning: kind and class together are its labels."""
    from pytorch_metric_learning.losses import SupConLoss

    rows = rows_of(y)
    return SupConLoss(temperature=TAU)(reps.flatten(0, 1), 2 * rows.label + rows.pan)


def bare_products(reps: Tensor, y: Tensor, *, times: int) -> None:
    """Only what every exact method multiplies: z z' once or twice (half of it), and E z.

    As few and as large products as there can be, without masks, sums, weights, norms. With the
    similarities kept (once), exp is part of the limit.
    """
    z = reps.detach().flatten(0, 1)
    half = z[: len(z) // 2]
    for _ in range(times):
        e = z @ half.T
    if times == 1:
        e.mul_(1 / D_MODEL).exp_()
    _ = e @ half, e.T @ z


VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "loop": partial(by_loop, mask=mask_of_entries),
    "lists": partial(by_loop, mask=mask_of_lists),
    "supcon": by_supcon,
    "dense": by_method("dense"),
    "tiled": by_method("tiled"),
    "auto": by_method("auto"),
    "retiled": by_other_tiles,
    "compiled": by_compiler,
    "limit 4": partial(bare_products, times=2),
    "limit 3": partial(bare_products, times=1),
}


@contextmanager
def product_precision(name: str) -> Iterator[None]:
    """Set the precision of fp32 matrix products for all that is compared, and leave it as found."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if GPU:
        torch.cuda.synchronize()


def once(variant: str, reps: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Run forward and backward; return seconds by the clock and of the processor, and the loss."""
    reps.grad = None
    synchronise()
    start, busy = time.perf_counter(), time.process_time()
    loss = VARIANTS[variant](reps, y)
    if loss is not None:
        loss.backward()
    synchronise()
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    return seconds, cpu, math.nan if loss is None else loss.item()


def attempt(variant: str, reps: Tensor, y: Tensor) -> tuple[float, float, float] | str:
    """As `once`; the error's name where a GPU's memory does not suffice or a compiler fails."""
    try:
        return once(variant, reps, y)
    except Exception as error:
        if variant != "compiled" and not isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"{variant}, B = {len(y)}: {error!r}"[:2000], flush=True)
        return type(error).__name__


def take_turns(B: int, rounds: int, names: list[str], few: int) -> list[dict]:
    """Time all variants of one batch size, round by round; ratios to auto are per round."""
    reps, y = batch(B)
    reps.requires_grad_()
    seconds, cpu = {name: [] for name in names}, {name: [] for name in names}
    losses, failed = {}, {}
    for turn in range(rounds + 1):  # the first round warms up
        for name in names:
            if name in failed or (name in SLOW and turn > few):
                continue
            found = attempt(name, reps, y)
            if isinstance(found, str):
                failed[name] = found
                continue
            spent, busy, losses[name] = found
            if turn:
                seconds[name].append(spent)
                cpu[name].append(busy)
    agree = [loss for loss in losses.values() if not math.isnan(loss)]
    assert max(agree) - min(agree) < 1e-4 * max(agree), losses
    rows = [
        {
            "variant": name,
            "B": B,
            "rounds": len(spent),
            "seconds": statistics.median(spent),
            "fastest": min(spent),
            "over_auto": median_ratio(spent, seconds["auto"]),
            "over_tiled": median_ratio(spent, seconds["tiled"]),
            "cpu_seconds": statistics.median(cpu[name]),
            "cpu_over_auto": median_ratio(cpu[name], cpu["auto"]),
            "cpu_over_tiled": median_ratio(cpu[name], cpu["tiled"]),
        }
        for name, spent in seconds.items()
        if name not in failed
    ]
    return rows + [{"variant": name, "B": B, "failed": why} for name, why in failed.items()]


def median_ratio(x: list[float], y: list[float]) -> float:
    """The median over rounds of how many times longer x took than y in the same round."""
    return statistics.median(a / b for a, b in zip(x, y, strict=False))


def measure(variant: str, B: int, precision: str, threads: int) -> dict:
    """Run one variant once: seconds, and peak memory beyond the input.

    In a process of its own; on a GPU, whose allocator counts exactly, in this one.
    """
    if GPU:
        with product_precision(precision):
            return one(variant, B)
    command = [sys.executable, __file__, "--one", variant, str(B), "--precision", precision]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(variant: str, B: int) -> dict:
    """Measure this process; a small batch before loads what the first call loads, or compiles."""
    small, y = batch(B if variant == "compiled" else 8)
    attempt(variant, small.requires_grad_(), y)
    reps, y = batch(B)
    reps.requires_grad_()
    before = forget_peak()
    found = attempt(variant, reps, y)
    if isinstance(found, str):
        return {"variant": variant, "B": B, "failed": found}
    seconds, cpu, loss = found
    extra = peak() - before
    return {
        "variant": variant,
        "B": B,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "loss": loss,
        "extra_bytes": extra,
        "extra_in_reps": extra / (reps.numel() * 4),
    }


def forget_peak() -> int:
    """Let the peak begin anew, where the system can; return the bytes in use now.

    On a GPU those of PyTorch's allocator, else those of the process that are resident.
    """
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if CLEAR.exists():
        CLEAR.write_text("5")
    return psutil.Process().memory_info().rss


def peak() -> int:
    """Most bytes in use since `forget_peak`; since the start of the process, elsewhere."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    if not CLEAR.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def accuracy(B: int = 128) -> list[dict]:
    """The fp32 gradient against float64: relative error in norm, the largest over temperatures."""
    rows = []
    for kind in ("random", "clustered", "collapsed", "one point"):
        reps, y = batch(B, kind)
        for method in ("dense", "tiled", "auto"):
            for tau in (0.01, 0.0125, 0.0142, 0.015, 0.03, 0.07, 0.3, 1.0):
                exact, x = reps.double().requires_grad_(), reps.clone().requires_grad_()
                dense_loss(exact, y, tau=tau).backward()
                contrastive_loss(x, y, tau=tau, method=method).backward()
                error = float((x.grad - exact.grad).norm() / exact.grad.norm())
                rows.append({"data": kind, "method": method, "tau": tau, "error": error})
    return rows


def machine_of(precision: str, device: torch.device = DEVICE) -> dict:
    """What the figures depend on."""
    gpu = device.type == "cuda"
    found = {"GPU": torch.cuda.get_device_name(), "CUDA": torch.version.cuda} if gpu else {}
    return {
        **found,
        **machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "product precision": precision,
        "GFLOP a second, large fp32 product": round(gflops(device)),
    }


def on_gpu(result: dict) -> bool:
    """Whether results are those of a GPU."""
    return "GPU" in result["machine"]


def name_of(result: dict, name: str) -> str:
    """The name of the results' files; a GPU's stand beside a CPU's."""
    return f"{name}_cuda" if on_gpu(result) else name


def device_of(result: dict) -> str:
    """The device of a result, as figures name it."""
    facts = result["machine"]
    return facts["GPU"] if on_gpu(result) else f"{facts['processor']}, threads: {facts['threads']}"


def committed(name: str) -> list[dict]:
    """The results that there are, of CPUs and of a GPU."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}*.json"))]


def gflops(device: torch.device, rounds: int = 7) -> float:
    """Billions of operations a second in the best of a few large products."""
    n, spent = 8192 if device.type == "cuda" else 3072, []
    x = torch.randn(n, n, device=device)
    for _ in range(rounds):
        synchronise()
        start = time.perf_counter()
        x @ x
        synchronise()
        spent.append(time.perf_counter() - start)
    return 2 * n**3 / min(spent) / 1e9


def sweep(precision: str, threads: int, quick: bool, extra: list[str]) -> dict:
    """Time in turns, measure alone, check accuracy."""
    plan = QUICK if quick else FULL_GPU if GPU else FULL
    absent = {name for name in EXTRA if name not in extra}
    if not find_spec("pytorch_metric_learning"):
        absent.add("supcon")
    with product_precision(precision):
        result = {"machine": machine_of(precision), "timed": [], "measured": []}
        for B, rounds in plan.rounds.items():
            names = [v for v in VARIANTS if v not in absent and B <= plan.largest.get(v, B)]
            result["timed"] += take_turns(B, rounds, names, plan.few)
            print(pd.DataFrame(result["timed"]).query(f"B == {B}").to_string(), flush=True)
        result["accuracy"] = accuracy()
    for variant, sizes in plan.measured.items():
        for B in sizes if variant not in absent else ():
            result["measured"].append(measure(variant, B, precision, threads))
            print(result["measured"][-1], flush=True)
    return result


def draw(result: dict) -> plt.Figure:
    """Time and memory against the batch size, for all variants and limits."""
    use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2))
    timed, measured = pd.DataFrame(result["timed"]), pd.DataFrame(result["measured"])
    gpu = on_gpu(result)
    time_ = "seconds" if gpu else "cpu_seconds"
    for variant, (label, color, line) in STYLES.items():
        rows = timed[timed["variant"] == variant][["B", time_]]
        alone = measured[measured["variant"] == variant]
        rows = pd.concat([rows, alone[alone["B"] > rows["B"].max()][["B", time_]]])
        if len(rows):
            left.plot(rows["B"], rows[time_], line, color=color, label=label)
        if len(alone):
            right.plot(alone["B"], alone["extra_bytes"] / 2**20, line, color=color, label=label)
    sizes = measured["B"].drop_duplicates().sort_values()
    bound = 3.2 * sizes * len(REPS) * D_MODEL * 4 / 2**20
    right.plot(sizes, bound, "-.", color=MUTED, label="3.2 times the size of the input")
    unit = "seconds" if gpu else "processor seconds"
    left.set(title="Time" if gpu else "Time grows as B²", ylabel=f"{unit}, forward and backward")
    right.set(title="Memory of tiled grows as B", ylabel="MiB beyond the input")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", xlabel="B, samples of six representations, d = 768")
        ax.set_xticks(sorted({*timed["B"], *sizes}), sorted({*timed["B"], *sizes}), rotation=45)
        ax.minorticks_off()
    lines = {line.get_label(): line for ax in (left, right) for line in ax.get_lines()}
    fig.legend(
        lines.values(),
        lines,
        title=device_of(result),
        title_fontsize=10,
        loc="outside right center",
    )
    return fig


def page(result: dict) -> str:
    """The page of the benchmark; every number in it comes from the result."""
    timed, measured = pd.DataFrame(result["timed"]), pd.DataFrame(result["measured"])
    errors = pd.DataFrame(result["accuracy"]).groupby(["data", "method"])["error"].max().unstack()
    gpu = on_gpu(result)
    texts, mark = (GPU_TEXTS, "") if gpu else (CPU_TEXTS, "cpu_")
    measured["MiB"] = measured["extra_bytes"] / 2**20
    timed["ms"] = timed["seconds"] * 1000
    timed["cpu_ms"] = timed["cpu_seconds"] * 1000

    def by_size(rows: pd.DataFrame, value: str, form: str) -> str:
        table = rows.pivot(index="variant", columns="B", values=value)
        return _table(table.loc[[name for name in STYLES if name in table.index]], form)

    parts = dict(
        name=name_of(result, "contrastive_loss"),
        facts="\n".join([facts(result), *absences(timed, measured)]),
        verdicts=_table((gpu_verdicts if gpu else verdicts)(timed, measured), ".3g"),
        ms=by_size(timed, "ms", ".3g"),
        cpu_ms=by_size(timed, "cpu_ms", ".3g"),
        over_auto=by_size(timed, f"{mark}over_auto", ".2f"),
        over_tiled=by_size(timed, f"{mark}over_tiled", ".2f"),
        memory=by_size(measured, "MiB", ".0f"),
        share=measured.query("variant == 'tiled'")["extra_in_reps"].iloc[-1],
        alone=by_size(measured, f"{mark}seconds", ".3g"),
        data="\n".join(text for kind, text in DATA.items() if kind in errors.index),
        errors=_table(errors, ".1e"),
        growth=growth(measured, f"{mark}seconds"),
    )
    if gpu:
        parts |= against_the_compiler(timed)
    return PAGE.format(**parts, **{key: text.format(**parts) for key, text in texts.items()})


def against_the_compiler(timed: pd.DataFrame) -> dict[str, float]:
    """Milliseconds that a compiled loss saves at the smallest batch and loses at the largest."""
    ms = timed.pivot(index="B", columns="variant", values="ms").dropna(subset=["compiled"])
    saved = ms["auto"] - ms["compiled"]
    small, large = ms.index.min(), ms.index.max()
    return {"small": small, "large": large, "saved": saved[small], "lost": -saved[large]}


def absences(timed: pd.DataFrame, measured: pd.DataFrame) -> list[str]:
    """Say which cells are empty because something is not installed or failed."""
    lines = []
    if "supcon" not in set(timed["variant"]):
        lines.append("- not installed, and left out: pytorch-metric-learning")
    for how, rows in (("timed", timed), ("measured", measured)):
        failed = rows[rows["failed"].notna()] if "failed" in rows else rows[:0]
        lines += [
            f"- failed when it was {how}, B = {row['B']}: {STYLES[row['variant']][0]}, "
            f"{row['failed']}"
            for _, row in failed.iterrows()
        ]
    return lines


def ratios(timed: pd.DataFrame, variant: str, B: int, by: str) -> list[float]:
    """How many times longer a variant took than another, by the clock and by processor time."""
    found = timed.query(f"variant == '{variant}' and B == {B}")
    how = [f"over_{by}", f"cpu_over_{by}"]
    return found.iloc[0][how].tolist() if len(found) else [math.nan] * 2


def verdicts(timed: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """What was asked for beside what was found, in this run on this machine."""
    largest = measured.query("variant == 'tiled'").iloc[-1]
    last = int(timed["B"].max())

    def ratio(variant: str, B: int, by: str) -> list[float]:
        return ratios(timed, variant, B, by)

    def inverse(variant: str, B: int, by: str) -> list[float]:
        return [1 / x for x in ratio(variant, B, by)]

    big = f"tiled, B = {largest['B']}:"
    rows = {
        f"dense / auto, B = {last}": ["at least 3", *ratio("dense", last, "auto")],
        f"dense / tiled, B = {last}": ["at least 2.2", *ratio("dense", last, "tiled")],
        f"SupConLoss / auto, B = {last}": ["at least 5", *ratio("supcon", last, "auto")],
        f"auto / its limit, B = {last}": ["at most 1.25", *inverse("limit 3", last, "auto")],
        f"tiled / its limit, B = {last}": ["at most 1.25", *inverse("limit 4", last, "tiled")],
        "loop over entries / auto, B = 32": ["at least 50", *ratio("loop", 32, "auto")],
        "dense / auto, B = 32": ["at least 1", *ratio("dense", 32, "auto")],
        f"{big} seconds": ["under 120", largest["seconds"], largest["cpu_seconds"]],
        f"{big} MiB": ["under 1024", largest["MiB"], ""],
        f"{big} R d numbers": ["at most 3.2", largest["extra_in_reps"], ""],
    }
    return pd.DataFrame(rows, index=["asked", "by the clock", "by processor time"]).T


def gpu_verdicts(timed: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """On a GPU only one thing is asked: whether compilation beats tiles. The rest is shown."""
    largest = measured.query("variant == 'tiled'").iloc[-1]
    sizes = [int(B) for B in timed["B"].unique()]
    asked = "clearly above 1, for a path of its own"
    rows = {
        f"auto / compiled, B = {B}": [asked, 1 / ratios(timed, "compiled", B, "auto")[0]]
        for B in sizes
        if "compiled" in set(timed["variant"])
    }
    for B in (sizes[0], sizes[-1]):
        rows |= {
            f"dense / auto, B = {B}": ["", ratios(timed, "dense", B, "auto")[0]],
            f"tiled / auto, B = {B}": ["", ratios(timed, "tiled", B, "auto")[0]],
            f"tiled / its limit, B = {B}": ["", 1 / ratios(timed, "limit 4", B, "tiled")[0]],
        }
    big = f"tiled, B = {largest['B']}:"
    rows |= {
        f"{big} seconds": ["", largest["seconds"]],
        f"{big} MiB": ["", largest["MiB"]],
        f"{big} R d numbers": ["", largest["extra_in_reps"]],
    }
    return pd.DataFrame(rows, index=["asked", "found"]).T


def growth(measured: pd.DataFrame, column: str) -> str:
    """Exponents of tiled's time and memory between its two largest batches."""
    rows = measured.query("variant == 'tiled'")[["B", column, "extra_bytes"]].iloc[-2:]
    grown = rows.map(math.log).diff().iloc[-1]
    time_, memory = grown[column] / grown["B"], grown["extra_bytes"] / grown["B"]
    return f"time as B^{time_:.2f}, memory as B^{memory:.2f}"


def _table(frame: pd.DataFrame, form: str) -> str:
    names = {k: v[0] for k, v in STYLES.items()}
    frame = frame.rename(index=names).rename_axis(None).rename_axis(None, axis=1)
    texts = frame.map(lambda x: x if isinstance(x, str) else format(x, form))
    return texts.replace("nan", "").to_markdown(disable_numparse=True)


PAGE = """# The contrastive loss: time and memory{where}

Written by `python bench/contrastive_loss.py`; every number below comes from
`results/bench/{name}.json`. d = 768, six representations a sample, R = 6 B, tau 0.07.

{facts}

![time and memory against the batch size]({name}.png)

## Asked and found

{verdicts}

The limits are bare matrix products of the same operation count, as few and as large as can be.
Ratios are medians over rounds in which all variants take turns, in one process, with the same
precision of matrix products. {care}

## Forward and backward

Milliseconds by the clock, medians:

{ms}

{times}

How many times that of `tiled`:

{over_tiled}

## MiB beyond the input, gradient included

{peak} `tiled` takes {share:.2f} R d numbers at the largest batch.
Between its two largest batches it grows: {growth}.

{memory}

{unit} of those single runs:

{alone}

## Error of the fp32 gradient

Against float64, relative in norm, B = 128, the largest over temperatures from 0.01 to 1.

{data}

{errors}
"""
DATA = {
    "random": "Random: independent normal numbers.",
    "clustered": "Clustered: one centre per class, cosine about .5.",
    "collapsed": "Collapsed: x = c + 0.2 noise.",
    "one point": """One point: all of one class, x = c + 0.01 noise; sums over positives and over
all pairs nearly cancel there.""",
}
CPU_TEXTS = {
    "where": "",
    "care": """A busy machine disturbs the clock; processor time with one thread
it hardly does. Seconds say as much about the machine as about the code: the largest batch needs
4 R² d operations, whatever else is done.""",
    "times": """Milliseconds of processor time, all threads together:

{cpu_ms}

How many times the processor time of `auto`:

{over_auto}""",
    "peak": "The peak of a process of its own.",
    "unit": "Processor seconds",
}
GPU_TEXTS = {
    "where": " on a GPU",
    "care": """The GPU is waited for after every
call, so that launching counts too. The compiled variant is the dense loss, masks included, in one
graph per batch size; compilation itself is not in the time. It holds R x R numbers, which tiles
avoid. Where starting kernels decides (B = {small}), it saves {saved:.1f} ms of `auto`; where
products do (B = {large}), it takes {lost:.1f} ms more. A whole step at the released shapes takes
many times that (training_step), and each batch size, the last one of an epoch too, would be
compiled anew: the library has no such path. Starting kernels is the processor's part: a load above
1 before the start disturbs the small sizes. The loss keeps a GPU from TF32, and so does this
benchmark, limits included. An empty cell was not run, or failed.""",
    "times": """How many times the time of `auto`:

{over_auto}""",
    "peak": "The peak of PyTorch's allocator; CUDA's own context is not in it.",
    "unit": "Seconds",
}


def write(result: dict) -> None:
    """Write the records, the figure and the page."""
    name = name_of(result, "contrastive_loss")
    publish(name, result, page(result), draw(result))
    rows = [{"how": how, **row} for how in ("timed", "measured") for row in result[how]]
    pd.DataFrame(rows).to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.6g")


def main() -> None:
    """Sweep and write, or one measurement for the parent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--page", action="store_true", help="redraw from the committed results")
    parser.add_argument(
        "--precision", default="highest" if GPU else "medium", help="of fp32 matrix products"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--extra", nargs="*", default=EXTRA if GPU else (), choices=EXTRA, help="variants more"
    )
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        with product_precision(options.precision):
            print(json.dumps(one(options.one[0], int(options.one[1]))))
        return
    if options.page:
        for result in committed("contrastive_loss"):
            write(result)
        return
    result = sweep(options.precision, options.threads, options.quick, options.extra)
    if options.quick:
        draw(result)
        print(page(result))
    else:
        write(result)


if __name__ == "__main__":
    main()
