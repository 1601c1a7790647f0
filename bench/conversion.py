"""Time and memory of conversion against plain pickle.load, and a store of MOSEI's size.

    python bench/conversion.py            # about a quarter of an hour, 16 GB of disk for a while
    python bench/conversion.py --quick    # a minute, nothing kept

Every measurement is a process of its own, taken in turns; memory is its peak beyond the imports.
On a busy machine read the ratios. The files are generated in a temporary folder and removed; the
largest is left out if the disk is too small. Writes results/bench/conversion.json and
docs/benchmarks/.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FRACTIONS = (1 / 64, 1 / 16, 1 / 4)  # of MOSEI's utterances
ROUNDS, BATCHES = 3, 200
FORMS = {"protocol 2": 2, "protocol 5": 5}


def peak(what: str = "VmHWM") -> float:
    """Memory of this process in MB: at most so far, or now (VmRSS, RssAnon)."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


class Meter:
    """Time, processor time and peak memory of what is done inside."""

    def __enter__(self) -> "Meter":
        self.base, self.start, self.cpu = peak(), time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.found = {
            "seconds": time.perf_counter() - self.start,
            "cpu_seconds": time.process_time() - self.cpu,
            "mb": peak() - self.base,
        }


# --- one measurement, in a process of its own ---------------------------------------------------


def load(path: Path) -> dict:
    """What today's tools do."""
    import numpy  # noqa: F401

    with Meter() as meter, path.open("rb") as file:
        pickle.load(file)
    return meter.found


def convert(path: Path) -> dict:
    """`conki convert`."""
    from conki_lib.data import convert

    with Meter() as meter:
        store = convert(path, path.with_suffix(""))
    return meter.found | {"store_bytes": sum(f.stat().st_size for f in store.iterdir())}


def inspect(path: Path) -> dict:
    """`conki inspect` on the pickle."""
    from conki_lib.data.formats import inspect_path

    with Meter() as meter:
        str(inspect_path(path))
    return meter.found


def opened(path: Path) -> dict:
    """Open a store and touch its table; what is resident afterwards."""
    from conki_lib.data import open_store

    base, start = peak("VmRSS"), time.perf_counter()
    store = open_store(path)
    seconds, alone = time.perf_counter() - start, peak("VmRSS") - base
    store["train"][0]
    first = time.perf_counter() - start
    return {
        "seconds": seconds,
        "mb": alone,
        "first_seconds": first,
        "first_mb": peak("VmRSS") - base,
    }


def batches(path: Path) -> dict:
    """Random batches of 32 from the map and from RAM, in turns, and once with a cold cache."""
    import numpy as np

    from conki_lib.data import make_loader, open_store

    def collator(store):
        loader = make_loader(store["train"], modalities=("v", "a"), batch_size=32, shuffle=True)
        return loader.dataset.__getitems__

    def spent(collate, chosen):
        start = time.perf_counter()
        for rows in chosen:
            collate(rows)
        return time.perf_counter() - start

    mapped, held = open_store(path), open_store(path)
    rng, n = np.random.default_rng(0), len(mapped["train"])
    rounds = [
        [rng.choice(n, 32, replace=False).tolist() for _ in range(20)] for _ in range(BATCHES // 20)
    ]
    from_map = collator(mapped)
    forget(path)
    cold = spent(from_map, rounds[0])
    base = peak("RssAnon")
    for chosen in rounds:
        spent(from_map, chosen)
    anonymous, files = peak("RssAnon") - base, peak("RssFile")
    held.__dict__["_values"] = {m: np.array(v) for m, v in mapped._values.items()}
    from_ram = collator(held)
    for collate in (from_map, from_ram):
        spent(collate, rounds[0])
    pairs = [(spent(from_map, chosen), spent(from_ram, chosen)) for chosen in rounds]
    per = 20 / 1000
    return {
        "ms_map": statistics.median(a for a, _ in pairs) / per,
        "ms_ram": statistics.median(b for _, b in pairs) / per,
        "speed_over_ram": statistics.median(b / a for a, b in pairs),
        "ms_cold": cold / per,
        "anonymous_mb": anonymous,
        "mapped_mb": files,
    }


def forget(path: Path) -> None:
    """Ask the system to drop the store's files from its cache."""
    for file in path.iterdir():
        with file.open("rb") as opened_file:
            os.fsync(opened_file.fileno())
            os.posix_fadvise(opened_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


TASKS = {f.__name__: f for f in (load, convert, inspect, opened, batches)}


def measure(task: str, path: Path) -> dict:
    """Run one task in a new process."""
    command = [sys.executable, __file__, "--task", task, str(path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = {"task": task, **json.loads(done.stdout.splitlines()[-1])}
    print(
        path.name,
        {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()},
        flush=True,
    )
    return result


# --- the run --------------------------------------------------------------------------------


def sizes(fraction: float) -> dict:
    """The layout of unaligned MOSEI, float64, with a part of its utterances."""
    from layouts import MOSEI

    counts = tuple(max(2, round(n * fraction)) for n in MOSEI["counts"])
    return {**MOSEI, "counts": counts, "dtype": "f8"}


def generate(path: Path, fraction: float, protocol: int | None = None) -> dict:
    """Write a file; its size, that of its largest array, and the valid share of its frames."""
    from layouts import write_mmsa_layout

    options = sizes(fraction)
    write_mmsa_layout(path, protocol=protocol, **options)
    largest = options["counts"][0] * options["steps"]["a"] * options["widths"]["a"] * 8
    return {
        "utterances": sum(options["counts"]),
        "bytes": path.stat().st_size,
        "largest_array_bytes": largest,
    }


def at_sizes(folder: Path, fractions: tuple[float, ...], rounds: int) -> list[dict]:
    """pickle.load and convert in turns, at each size."""
    rows = []
    for fraction in fractions:
        path = folder / f"{fraction:.4f}.pkl"
        known = generate(path, fraction)
        for k in range(rounds):
            for task in ("load", "convert"):
                rows.append({**known, "round": k, **measure(task, path)})
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink()
    return rows


def at_forms(folder: Path, fraction: float) -> list[dict]:
    """The smallest size as other protocols write it."""
    rows = []
    for form, protocol in FORMS.items():
        path = folder / f"{form}.pkl".replace(" ", "")
        known = generate(path, fraction, protocol)
        rows += [{"form": form, **known, **measure(task, path)} for task in ("load", "convert")]
        path.unlink()
    return rows


def at_full_size(folder: Path, fraction: float) -> dict:
    """MOSEI's size: converted, inspected, opened, read in random batches."""
    path = folder / "mosei.pkl"
    result = generate(path, fraction)
    done = measure("convert", path)
    valid = done["store_bytes"] / (result["bytes"] / 2)  # float32 beside float64
    result |= {"convert": done, "share_of_padded": valid, "inspect": measure("inspect", path)}
    path.unlink()
    store = path.with_suffix("")
    return result | {"open": measure("opened", store), "batches": measure("batches", store)}


def draw(result: dict):
    """Time and memory against the size of the file."""
    import matplotlib.pyplot as plt
    import pandas as pd

    from conki_lib.plots.style import MUTED, use_style

    use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    rows = pd.DataFrame(result["sizes"]).groupby(["task", "bytes"]).median(numeric_only=True)
    full = result["full"]
    for task, label, color, marker in (
        ("load", "pickle.load" + ", largest file not tried" * bool(full), "#C1272D", "s-"),
        ("convert", "conki convert", "#2166AC", "o-"),
    ):
        part = rows.loc[task].reset_index()
        if task == "convert" and full:
            part = pd.concat([part, pd.DataFrame([{"bytes": full["bytes"], **full["convert"]}])])
        left.plot(part["bytes"] / 1e9, part["cpu_seconds"], marker, color=color, label=label)
        right.plot(part["bytes"] / 1e9, part["mb"] / 1000, marker, color=color, label=label)
    biggest = max(full.get("bytes", 0), max(r["bytes"] for r in result["sizes"])) / 1e9
    right.axhline(2, ls=":", color=MUTED)
    right.annotate("2 GB", (biggest, 2), va="bottom", ha="right", color=MUTED)
    left.set(title="Processor time", ylabel="seconds", xscale="log", yscale="log")
    right.set(title="Peak memory beyond the imports", ylabel="GB", xscale="log", yscale="log")
    for ax in (left, right):
        ax.set_xlabel("size of the pickle, GB")
        ax.legend()
    return fig


def page(result: dict) -> str:
    """The page of the benchmark; every number in it comes from the result."""
    import pandas as pd

    rows = pd.DataFrame(result["sizes"]).groupby(["bytes", "task"]).median(numeric_only=True)
    lines = []
    for size in rows.index.levels[0]:
        plain, ours = rows.loc[size, "load"], rows.loc[size, "convert"]
        bound = 1.3 * plain["largest_array_bytes"] / 1e6 + 300
        lines.append(
            f"| {size / 1e9:.2f} GB | {_times(plain)} | {_times(ours)} | "
            f"{plain['mb']:,.0f} MB | {ours['mb']:,.0f} MB | {plain['mb'] / ours['mb']:.1f} | "
            f"{bound:,.0f} MB |"
        )
    full = result["full"]
    if full:
        ours = full["convert"]
        bound = 1.3 * full["largest_array_bytes"] / 1e6 + 300
        lines.append(
            f"| {full['bytes'] / 1e9:.2f} GB | | {_times(ours)} | | {ours['mb']:,.0f} MB "
            f"| | {min(bound, 2000):,.0f} MB |"
        )
    forms = "\n".join(
        f"| {r['form']} | {r['bytes'] / 1e9:.2f} GB | {r['task']} | {_times(r)} "
        f"| {r['mb']:,.0f} MB |"
        for r in result["forms"]
    )
    from report import facts

    return PAGE.format(facts=facts(result), lines="\n".join(lines), forms=forms, full=_full(full))


def _times(row) -> str:
    return f"{row['cpu_seconds']:.1f} s ({row['seconds']:.1f} s)"


def _full(full: dict) -> str:
    if not full:
        return "Left out: the disk had too little space."
    opened_, read = full["open"], full["batches"]
    rows = [
        ("open_store: time", f"{opened_['seconds'] * 1000:.1f} ms", "under 200 ms"),
        ("open_store: resident beyond the imports", f"{opened_['mb']:.1f} MB", "under 150 MB"),
        (
            "with the table read and one utterance fetched: time",
            f"{opened_['first_seconds']:.2f} s",
            "",
        ),
        (
            "with the table read and one utterance fetched: resident",
            f"{opened_['first_mb']:.1f} MB",
            "",
        ),
        ("random batch of 32, mapped file", f"{read['ms_map']:.1f} ms", ""),
        ("random batch of 32, same frames in RAM", f"{read['ms_ram']:.1f} ms", ""),
        (
            "speed, mapped over RAM (median of turns)",
            f"{read['speed_over_ram']:.2f}",
            "at least 0.5",
        ),
        ("random batch of 32, page cache emptied", f"{read['ms_cold']:.1f} ms", ""),
        (f"own memory after {BATCHES} batches", f"{read['anonymous_mb']:.0f} MB", ""),
        (
            "size on disk over the padded float32 size",
            f"{full['share_of_padded']:.2f}",
            "0.50 valid",
        ),
        ("conki inspect on the pickle: time", _times(full["inspect"]), ""),
        ("conki inspect on the pickle: peak memory", f"{full['inspect']['mb']:.0f} MB", ""),
    ]
    table = "\n".join(f"| {a} | {b} | {c} |" for a, b, c in rows)
    return f"{full['utterances']:,} utterances.\n\n| | found | asked |\n|---|---:|---:|\n{table}"


PAGE = """# Conversion and the store: time and memory

Written by `python bench/conversion.py`; every number below comes from
`results/bench/conversion.json`.
Files are generated in the layout of MMSA's unaligned MOSEI (500 x 35 vision, 500 x 74 audio,
float64, half of the frames valid) with a part of its utterances; medians of processes that took
turns. Times are processor time, and in brackets what the clock said while others used the machine;
memory is the peak of a process beyond its imports.

{facts}

![time and memory against the size of the file](conversion.png)

| pickle | pickle.load | convert | pickle.load | convert | ratio of memory | allowed for convert |
|---:|---:|---:|---:|---:|---:|---:|
{lines}

`convert` reads the file twice (SHA-256, then rows), writes the store and computes statistics;
`pickle.load` only loads, and what follows it in a loader (copies, a cast to float32,
standardisation) is not counted. Arrays stay in the file and rows are read one by one; allowed is
1.3 x the largest array + 300 MB, and 2 GB for the largest file. Plain loading of the largest file
was not tried.

The smallest size as other protocols write it:

| form | pickle | | time | peak memory |
|---|---:|---|---:|---:|
{forms}

## A store of MOSEI's size

{full}
"""


def main() -> None:
    """Run everything, or one task for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", action="store_true", help="page and figure from the results")
    given = parser.parse_args()
    if given.task:
        print(json.dumps(TASKS[given.task](given.path)))
        return
    from report import publish, published

    result = published("conversion") if given.page else run(given.quick)
    if not given.quick:
        publish("conversion", result, page(result), draw(result))
    print(page(result))


def run(quick: bool) -> dict:
    """All measurements."""
    from report import machine

    os.environ["TQDM_DISABLE"] = "1"
    fractions = tuple(f / 16 for f in FRACTIONS) if quick else FRACTIONS
    with tempfile.TemporaryDirectory() as name:
        folder, full = Path(name), 1 / 32 if quick else 1.0
        result = {
            "machine": machine(),
            "sizes": at_sizes(folder, fractions, 1 if quick else ROUNDS),
            "forms": at_forms(folder, fractions[0]),
        }
        room = shutil.disk_usage(folder).free > 18e9 * full
        return result | {"full": at_full_size(folder, full) if room else {}}


if __name__ == "__main__":
    main()
