"""How long the two README commands' work takes: `make reproduce`, and one run of mosi-open.

    python bench/profiles.py            # ten minutes on an idle machine, or half an hour
    python bench/profiles.py --steps    # seconds of a step in bf16 and in fp32, nothing written
    python bench/profiles.py --page     # the page from the committed results

In a copy of the project, from nothing (no corpora, no runs): the whole pipeline of the default
profile, with the time of every job from Snakemake's log; then `conki train` of both stages of
mosi-open, whose corpora are fetched before, as the network is not what is measured. Offline,
CONKI_MIRROR names a folder with the published files; without either, mosi-open is left out. Last, a
step of stage 2 in bf16 and in fp32, in turns: what `precision: auto` chooses between. Writes
results/bench/profiles.json, with the last measurement and the seconds of all earlier ones, and
docs/benchmarks/profiles.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from faults import copied, isolated
from report import facts, machine, publish, published

from conki_lib.config import RuntimeConfig
from conki_lib.fitting import chosen_precision

COPIED = ("Snakefile", "profiles", "conki_lib", "notebooks", "configs", "docs", "results")
ASKED = {"reproduce": 240, "mosi-open": 360}  # seconds, on two cores
MOSI, CORES = "mosi-open", 2
TOLD = ("day", "code that determines results", "load before the start")


def timed(folder: Path, *words: str, **more: str) -> tuple[float, str]:
    """Seconds and output of one call of `conki` in the copy; an error ends the benchmark."""
    if mirror := os.environ.get("CONKI_MIRROR"):
        more["CONKI_MIRROR"] = mirror
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "conki_lib.cli", *words],
        cwd=folder, env=isolated(folder, **more), capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"conki {' '.join(words)} failed:\n{said[-3000:]}")
    return time.monotonic() - start, said


def jobs(said: str) -> list[dict]:
    """Name and seconds of each job, from the times in Snakemake's log, which are whole seconds."""
    now, begun, found = None, {}, []
    for line in said.splitlines():
        if stamp := re.match(r"\[(\w{3} \w{3} +\d+ [\d:]+ \d{4})\]", line):
            now = datetime.strptime(stamp[1], "%a %b %d %H:%M:%S %Y")
        elif rule := re.match(r"(?:local)?rule (\w+):", line):
            job = {"rule": rule[1]}
        elif output := re.match(r"    output: .*/\.jobs/(\S+)", line):
            job["job"] = output[1]
        elif number := re.match(r"    jobid: (\d+)", line):
            begun[number[1]] = job | {"begun": now}
        elif ended := re.match(r"Finished jobid: (\d+)", line):
            job = begun.pop(ended[1])
            seconds = (now - job.pop("begun")).total_seconds()
            found.append(job | {"seconds": seconds})
    return found


def steps(turns: int = 3) -> dict[str, float]:
    """Seconds of a step of stage 2 of the default profile, in each precision; they take turns."""
    import torch

    from conki_lib import ablation, fitting, training
    from conki_lib.model import build_model

    config, stores = training.resolve(ablation.configure("synthetic"))
    store = stores[config.data.target]
    loader = training.make_loaders(config, store, config.stage2, splits=("train",))["train"]
    batches = sorted(loader, key=lambda batch: sum(int(x.sum()) for x in batch.lengths.values()))
    batch, objective = batches[len(batches) // 2], training.Objective(config.contrast)
    model = build_model(config.model).train()
    optimizer = fitting.make_optimizer(model, config.stage2)
    spent: dict[str, list[float]] = {"bf16": [], "fp32": []}
    for turn in range(turns + 1):  # the first is not counted
        for name, seconds in spent.items():
            start = time.perf_counter()
            with fitting.precision(name):
                optimizer.zero_grad()
                objective(model(batch), batch.y)["loss"].backward()
                optimizer.step()
            seconds += [time.perf_counter() - start] * (turn > 0)
    return {name: statistics.median(x) for name, x in spent.items()} | {
        "threads": torch.get_num_threads()
    }


def run() -> dict:
    """All measurements."""
    automatic = chosen_precision(RuntimeConfig(precision="auto"))
    result: dict = {"machine": machine(), "precision": automatic, "cores": CORES}
    with tempfile.TemporaryDirectory() as name:
        folder = copied(Path(name).resolve(), COPIED)
        seconds, said = timed(folder, "pipeline", "--cores", str(CORES))
        result["reproduce"] = {"seconds": seconds, "jobs": jobs(said)}
        print(json.dumps(result, indent=1), flush=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--steps"]
        done = subprocess.run(
            command, cwd=folder, env=isolated(folder), stdout=subprocess.PIPE, check=True
        )
        result["step"] = json.loads(done.stdout.splitlines()[-1])
        try:
            for corpus in (MOSI, "meld-text"):
                timed(folder, "fetch", corpus)
        except RuntimeError as error:
            print(f"{MOSI} is left out: {error}")
            return result
        words = ("train", "--profile", MOSI, "--seed", "0")
        seconds, said = timed(folder, *words, OMP_NUM_THREADS=str(CORES))
        result[MOSI] = {"seconds": seconds, "stages": stages(folder)}
    return result


def stages(folder: Path) -> dict[str, float]:
    """Seconds of both stages, as their records say."""
    found = {}
    for path in (folder / "runs" / MOSI).glob("*/record.json"):
        record = json.loads(path.read_text())
        found[f"stage {record['stage']}"] = record["provenance"]["seconds"]
    return found


def brief(result: dict) -> dict:
    """What is kept of a measurement when a later one takes its place."""
    told = {name: result["machine"][name] for name in TOLD}
    seconds = {name: result[name]["seconds"] for name in ASKED if name in result}
    return {**told, "precision": result["precision"], **seconds}


def page(last: dict, earlier: list[dict]) -> str:
    """The page of the benchmark; every number in it comes from the results."""
    lines = [
        f"| {one['day']} | `{one['code that determines results']}` | {one['precision']} "
        f"| {one['load before the start']} | " + " | ".join(whole(one.get(n)) for n in ASKED) + " |"
        for one in [*earlier, brief(last)]
    ]
    return PAGE.format(**parts(last), lines="\n".join(lines))


def whole(seconds: float | None) -> str:
    """A cell of the table of all measurements."""
    return "" if seconds is None else f"{seconds:.0f} s"


def parts(result: dict) -> dict[str, str]:
    """What the page says of one measurement."""
    asked = "\n".join(
        f"| {name} | {ASKED[name]} s | {seconds:.0f} s | "
        f"{'met' if seconds <= ASKED[name] else '**missed**'} |"
        for name, seconds in brief(result).items()
        if name in ASKED
    )
    lines = sorted(result["reproduce"]["jobs"], key=lambda job: -job["seconds"])
    spent = sum(job["seconds"] for job in lines)
    shares = [
        f"| {job.get('job') or job['rule']} | {job['seconds']:.0f} | {job['seconds'] / spent:.0%} |"
        for job in lines
        if job["seconds"] >= 1
    ]
    stages_of = result.get(MOSI, {}).get("stages", {})
    told = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in sorted(stages_of.items()))
    step = result["step"]
    words = "{bf16:.2f} s in bf16, {fp32:.2f} s in fp32".format(**step)
    words += f" ({step['bf16'] / step['fp32']:.1f} to 1, {step['threads']} threads)"
    return {
        "facts": facts(result), "asked": asked, "step": words, "told": told or "not measured",
        "cores": str(result["cores"]), "precision": result["precision"], "spent": f"{spent:.0f}",
        "shares": "\n".join(shares),
    }  # fmt: skip


PAGE = """# The default profiles, from nothing

Written by `python bench/profiles.py`; every number below comes from `results/bench/profiles.json`.
`reproduce`: what `make reproduce` does once everything is installed, in a copy without corpora and
runs: both corpora are generated, three models trained in two stages, all notebooks executed.
`mosi-open`: `conki train --profile mosi-open`, both stages, corpora fetched before. Seconds of jobs
are by the clock, from Snakemake's log; jobs run side by side, so they add up to more than the
whole. Each begins with a new Python process, most with a kernel. Notebook 03 is the job `stage1`,
notebook 04 `full` and `wo-C4`. As a rule `full` trains stage 1, too, `wo-C4` waits for that, and
notebook 03 finds it done. Notebooks 05 and 06 show kept figure data where these are of runs with
equal settings, data and code, as they are on a clean checkout; else they measure trained models
anew, which takes longer.

{facts}
- `precision: auto` means: {precision}

| what | asked at most | found | |
|---|---:|---:|---|
{asked}

{cores} cores. Stages of the run of mosi-open, as its records say (stage 2 counts from the start of
the command, stage 1 included): {told}. A step of stage 2 of `synthetic`:
{step}.

| job of `reproduce` | seconds | share of {spent} s |
|---|---:|---:|
{shares}

## All measurements

In the order of the work. Between those of `reproduce` the default profile became smaller and the
pipeline better ([BENCHMARKS](../BENCHMARKS.md) says how); what `mosi-open` trains stayed the same.
The first processor has instructions for bf16, which both took then; the others have none. The rest
is the machine, which is faster in one hour than in another.

| day | code | auto is | load before | reproduce | mosi-open |
|---|---|---|---:|---:|---:|
{lines}
"""


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="the page from the results")
    parser.add_argument("--steps", action="store_true", help="steps in both precisions alone")
    given = parser.parse_args()
    if given.steps:
        print(json.dumps(steps()))
        return
    last, earlier = (published("profiles")[name] for name in ("last", "earlier"))
    if not given.page:
        earlier, last = [*earlier, brief(last)], run()
    publish("profiles", {"last": last, "earlier": earlier}, page(last, earlier))
    print(page(last, earlier))


if __name__ == "__main__":
    main()
