"""Time and memory of the contrastive loss, forward and backward: alternatives and limits.

    python bench/contrastive_loss.py            # the whole sweep: about half an hour on two cores
    python bench/contrastive_loss.py --quick    # a minute, nothing written

All variants of a batch size take turns in one process, with one precision of matrix products, so
that a busy machine slows all of them alike: read the ratios, by the clock where the machine was
idle, else of processor time with --threads 1. Memory is the peak beyond the input, each in a
process of its own. Writes results/bench/contrastive_loss.{json,csv} and docs/benchmarks/.
"""

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import psutil
import torch
from torch import Tensor

from conki_lib.config import ROOT
from conki_lib.losses import contrastive_loss, dense_loss, log_f
from conki_lib.pairs import REPS, rows_of
from conki_lib.plots.style import INK, MUTED, save_figure, use_style

D_MODEL, TAU = 768, 0.07
RESULTS, DOCS = ROOT / "results/bench", ROOT / "docs/benchmarks"
CLEAR = Path("/proc/self/clear_refs")
TIMED = {32: 60, 128: 20, 512: 7, 1024: 5}  # batch size -> rounds
MEASURED = {
    "supcon": (128, 512, 1024, 2048),
    "dense": (128, 512, 1024, 2048),
    "auto": (128, 512, 1024, 2048, 4096),
    "tiled": (128, 512, 1024, 2048, 4096, 8192, 16384),
}
LARGEST = {"loop": 128, "lists": 512}  # beyond this, minutes
STYLES = {
    "loop": ("Python loop over the mask's entries", "#B07D2B", "v-"),
    "lists": ("Python loop over lists", "#E3C16F", "v-"),
    "supcon": ("pytorch-metric-learning SupConLoss", "#C1272D", "^-"),
    "dense": ("dense: autograd with masks", "#F08A5D", "s-"),
    "tiled": ("tiled", "#2166AC", "o-"),
    "auto": ("auto", "#0B6B3A", "D-"),
    "limit 4": ("limit of tiled: bare products, 4 R²d", MUTED, ":"),
    "limit 3": ("limit of auto: bare products, 3 R²d, and exp", INK, ":"),
}


def batch(B: int, kind: str = "random") -> tuple[Tensor, Tensor]:
    """B samples of six representations, and labels of seven classes."""
    g = torch.Generator().manual_seed(B)
    reps = torch.empty(B, len(REPS), D_MODEL).normal_(generator=g)
    y = torch.randint(-3, 4, (B,), generator=g)
    centres = torch.randn(7, D_MODEL, generator=g)
    if kind == "clustered":
        reps += centres[y + 3, None]
    if kind == "collapsed":
        reps = centres[0] + 0.2 * reps
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
    x = reps.flatten(0, 1)
    scores = log_f(x, x, tau=TAU)
    everything = ~torch.eye(len(x), dtype=torch.bool)
    log_denominator = scores.masked_fill(~everything, -math.inf).logsumexp(1)
    return (log_denominator - (scores * positive).sum(1) / positive.sum(1)).mean()


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


def once(variant: str, reps: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Run forward and backward; return seconds by the clock and of the processor, and the loss."""
    reps.grad = None
    start, busy = time.perf_counter(), time.process_time()
    loss = VARIANTS[variant](reps, y)
    if loss is not None:
        loss.backward()
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    return seconds, cpu, math.nan if loss is None else loss.item()


def take_turns(B: int, rounds: int) -> list[dict]:
    """Time all variants of one batch size, round by round; ratios to auto are per round."""
    reps, y = batch(B)
    reps.requires_grad_()
    names = [name for name in VARIANTS if B <= LARGEST.get(name, B)]
    seconds, cpu, losses = {name: [] for name in names}, {name: [] for name in names}, {}
    for turn in range(rounds + 1):  # the first round warms up
        for name in names:
            if name in LARGEST and turn > 4:
                continue
            spent, busy, losses[name] = once(name, reps, y)
            if turn:
                seconds[name].append(spent)
                cpu[name].append(busy)
    agree = [loss for loss in losses.values() if not math.isnan(loss)]
    assert max(agree) - min(agree) < 1e-4 * max(agree), losses
    return [
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
    ]


def median_ratio(x: list[float], y: list[float]) -> float:
    """The median over rounds of how many times longer x took than y in the same round."""
    return statistics.median(a / b for a, b in zip(x, y, strict=False))


def measure(variant: str, B: int, precision: str, threads: int) -> dict:
    """Run one variant once in a process of its own: seconds, and peak memory beyond the input."""
    command = [sys.executable, __file__, "--one", variant, str(B), "--precision", precision]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(variant: str, B: int) -> dict:
    """Measure this process; a small batch before loads what the first call loads."""
    small, y = batch(8)
    once(variant, small.requires_grad_(), y)
    reps, y = batch(B)
    reps.requires_grad_()
    before = forget_peak()
    seconds, cpu, loss = once(variant, reps, y)
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
    """Let the peak begin anew, where the system can; return the bytes resident now."""
    if CLEAR.exists():
        CLEAR.write_text("5")
    return psutil.Process().memory_info().rss


def peak() -> int:
    """Most bytes resident since `forget_peak`; since the start of the process, elsewhere."""
    if not CLEAR.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def accuracy(B: int = 128) -> list[dict]:
    """The fp32 gradient against float64: relative error in norm, the largest over temperatures."""
    rows = []
    for kind in ("random", "clustered", "collapsed"):
        reps, y = batch(B, kind)
        for method in ("dense", "tiled", "auto"):
            for tau in (0.01, 0.0125, 0.0142, 0.015, 0.03, 0.07, 0.3, 1.0):
                exact, x = reps.double().requires_grad_(), reps.clone().requires_grad_()
                dense_loss(exact, y, tau=tau).backward()
                contrastive_loss(x, y, tau=tau, method=method).backward()
                error = float((x.grad - exact.grad).norm() / exact.grad.norm())
                rows.append({"data": kind, "method": method, "tau": tau, "error": error})
    return rows


def machine(precision: str) -> dict:
    """What the figures depend on."""
    return {
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "product precision": precision,
        "GFLOP a second, large fp32 product": round(gflops()),
        "load before the start": round(psutil.getloadavg()[0], 1),
    }


def processor() -> str:
    """Its name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gflops(n: int = 3072, rounds: int = 7) -> float:
    """Billions of operations a second in the best of a few large products."""
    x, spent = torch.ones(n, n), []
    for _ in range(rounds):
        start = time.perf_counter()
        x @ x
        spent.append(time.perf_counter() - start)
    return 2 * n**3 / min(spent) / 1e9


def sweep(precision: str, threads: int, quick: bool) -> dict:
    """Time in turns, measure alone, check accuracy."""
    timed, measured = (
        ({32: 9, 128: 5}, {v: (64, 128) for v in MEASURED}) if quick else (TIMED, MEASURED)
    )
    with product_precision(precision):
        result = {"machine": machine(precision), "timed": [], "measured": []}
        for B, rounds in timed.items():
            result["timed"] += take_turns(B, rounds)
            print(pd.DataFrame(result["timed"]).query(f"B == {B}").to_string(), flush=True)
        result["accuracy"] = accuracy()
    for variant, sizes in measured.items():
        for B in sizes:
            result["measured"].append(measure(variant, B, precision, threads))
            print(result["measured"][-1], flush=True)
    return result


def draw(result: dict) -> plt.Figure:
    """Time and memory against the batch size, for all variants and limits."""
    use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    timed, measured = pd.DataFrame(result["timed"]), pd.DataFrame(result["measured"])
    for variant, (label, color, line) in STYLES.items():
        rows = timed[timed["variant"] == variant][["B", "cpu_seconds"]]
        alone = measured[measured["variant"] == variant]
        rows = pd.concat([rows, alone[alone["B"] > rows["B"].max()][["B", "cpu_seconds"]]])
        left.plot(rows["B"], rows["cpu_seconds"], line, color=color, label=label)
        if len(alone):
            right.plot(alone["B"], alone["extra_bytes"] / 2**20, line, color=color, label=label)
    sizes = measured["B"].drop_duplicates().sort_values()
    bound = 3.2 * sizes * len(REPS) * D_MODEL * 4 / 2**20
    right.plot(sizes, bound, ":", color=MUTED, label="3.2 R d numbers")
    left.set(title="Time grows as B²", ylabel="processor seconds, forward and backward")
    right.set(title="Memory of tiled grows as B", ylabel="MiB beyond the input")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", xlabel="B, samples of six representations, d = 768")
        ax.set_xticks(sorted({*timed["B"], *sizes}), sorted({*timed["B"], *sizes}), rotation=45)
        ax.minorticks_off()
        ax.set_ylim(top=30 * ax.get_ylim()[1])  # room for the legend above the curves
        ax.legend(loc="upper left", fontsize=8)
    return fig


def page(result: dict) -> str:
    """The page of the benchmark; every number in it comes from the result."""
    timed, measured = pd.DataFrame(result["timed"]), pd.DataFrame(result["measured"])
    errors = pd.DataFrame(result["accuracy"]).groupby(["data", "method"])["error"].max().unstack()
    measured["MiB"] = measured["extra_bytes"] / 2**20
    timed["ms"] = timed["seconds"] * 1000
    timed["cpu_ms"] = timed["cpu_seconds"] * 1000

    def by_size(rows: pd.DataFrame, value: str, form: str) -> str:
        table = rows.pivot(index="variant", columns="B", values=value)
        return _table(table.loc[[name for name in STYLES if name in table.index]], form)

    return PAGE.format(
        facts="\n".join(f"- {key}: {value}" for key, value in result["machine"].items()),
        verdicts=_table(verdicts(timed, measured), ".3g"),
        ms=by_size(timed, "ms", ".3g"),
        cpu_ms=by_size(timed, "cpu_ms", ".3g"),
        over_auto=by_size(timed, "cpu_over_auto", ".2f"),
        over_tiled=by_size(timed, "cpu_over_tiled", ".2f"),
        memory=by_size(measured, "MiB", ".0f"),
        share=measured.query("variant == 'tiled'")["extra_in_reps"].iloc[-1],
        alone=by_size(measured, "cpu_seconds", ".3g"),
        errors=_table(errors, ".1e"),
        growth=growth(measured),
    )


def verdicts(timed: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """What was asked for beside what was found, in this run on this machine."""
    largest = measured.query("variant == 'tiled'").iloc[-1]
    last = int(timed["B"].max())

    def ratio(variant: str, B: int, by: str) -> list[float]:
        row = timed.query(f"variant == '{variant}' and B == {B}").iloc[0]
        return [row[f"over_{by}"], row[f"cpu_over_{by}"]]

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


def growth(measured: pd.DataFrame) -> str:
    """Exponents of tiled's time and memory between its two largest batches."""
    rows = measured.query("variant == 'tiled'")[["B", "cpu_seconds", "extra_bytes"]].iloc[-2:]
    grown = rows.map(math.log).diff().iloc[-1]
    time_, memory = grown["cpu_seconds"] / grown["B"], grown["extra_bytes"] / grown["B"]
    return f"time as B^{time_:.2f}, memory as B^{memory:.2f}"


def _table(frame: pd.DataFrame, form: str) -> str:
    names = {k: v[0] for k, v in STYLES.items()}
    frame = frame.rename(index=names).rename_axis(None).rename_axis(None, axis=1)
    texts = frame.map(lambda x: x if isinstance(x, str) else format(x, form))
    return texts.replace("nan", "").to_markdown(disable_numparse=True)


PAGE = """# The contrastive loss: time and memory

Written by `python bench/contrastive_loss.py`; every number below comes from
`results/bench/contrastive_loss.json`. d = 768, six representations a sample, R = 6 B, tau 0.07.

{facts}

![time and memory against the batch size](contrastive_loss.png)

## Asked and found

{verdicts}

The limits are bare matrix products of the same operation count, as few and as large as can be.
Ratios are medians over rounds in which all variants take turns, in one process, with the same
precision of matrix products. A busy machine disturbs the clock; processor time with one thread
it hardly does. Seconds say as much about the machine as about the code: the largest batch needs
4 R² d operations, whatever else is done.

## Forward and backward

Milliseconds by the clock, medians:

{ms}

Milliseconds of processor time, all threads together:

{cpu_ms}

How many times the processor time of `auto`:

{over_auto}

How many times that of `tiled`:

{over_tiled}

## MiB beyond the input, gradient included

The peak of a process of its own. `tiled` takes {share:.2f} R d numbers at the largest batch.
Between its two largest batches it grows: {growth}.

{memory}

Processor seconds of those single runs:

{alone}

## Error of the fp32 gradient

Against float64, relative in norm, B = 128, the largest over temperatures from 0.01 to 1. Clustered:
one centre per class, cosine about .5. Collapsed: x = c + 0.2 noise.

{errors}
"""


def main() -> None:
    """Sweep, write the records, the figure and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing written")
    parser.add_argument("--page", action="store_true", help="redraw from the committed results")
    parser.add_argument("--precision", default="medium", help="of fp32 matrix products")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        with product_precision(options.precision):
            print(json.dumps(one(options.one[0], int(options.one[1]))))
        return
    if options.page:
        result = json.loads((RESULTS / "contrastive_loss.json").read_text())
    else:
        result = sweep(options.precision, options.threads, options.quick)
    if options.quick:
        print(page(result))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "contrastive_loss.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = [{"how": how, **row} for how in ("timed", "measured") for row in result[how]]
    pd.DataFrame(rows).to_csv(RESULTS / "contrastive_loss.csv", index=False, float_format="%.6g")
    save_figure(draw(result), "contrastive_loss", "bench", producer="contrastive_loss", folder=DOCS)
    (DOCS / "contrastive_loss.md").write_text(page(result))


if __name__ == "__main__":
    main()
