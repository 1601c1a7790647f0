"""Does today's code give the same results as that of an earlier commit, to the bit?

    python bench/equal_code.py --against HEAD    # 15 minutes on two cores
    python bench/equal_code.py --page            # the page from the committed results

Records name a hash of the code that determines results. A change that is meant to change no result,
such as a clearer error, changes the hash too, and all records would be by "older code". So both
codes run here, side by side on one machine, with one thread: every row of the tables and every
switch on a tiny profile, each precision, and the profiles that can be had for one epoch at their
own sizes. Metrics, history, predictions and weights of both stages are compared. Only if all are
equal, the pair of hashes goes to results/equal_code.json, by which `Record.is_current` counts such
records, and the page docs/benchmarks/equal_code.md is written. Offline, CONKI_MIRROR names a folder
with the published files; profiles whose corpora cannot be had are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from faults import PROFILE, environment, project
from report import HERE, facts, machine

from conki_lib.pipeline import parse_rows
from conki_lib.records import EQUAL_CODE, write_text

PAGE = HERE / "docs/benchmarks/equal_code.md"
OPEN = ("synthetic", "mosi-open", "mmmo-open")
ONE_EPOCH = {"epochs": 1, "stage1_epochs": 1, "precision": "fp32", "device": "cpu"}
WAYS = (
    {"precision": "fp32-fast"}, {"precision": "bf16"}, {"accumulate": 2}, {"stage1_cache": False},
    {"checkpoint_activations": True},
)  # fmt: skip
RUNNER = """
import json, os, sys
from hashlib import sha256
from pathlib import Path

import pandas as pd
import torch

from conki_lib import ablation, records, training
from conki_lib.data import corpora

torch.set_num_threads(1)
home, found = Path(os.environ["CONKI_HOME"]), {}


def outcome(folder):
    record = records.load_run(folder)
    values, table = b"", folder / "predictions.parquet"
    if table.is_file():
        values = pd.util.hash_pandas_object(pd.read_parquet(table)).to_numpy().tobytes()
    weights = (folder / "model.safetensors").read_bytes()
    hashes = {"predictions": sha256(values).hexdigest(), "weights": sha256(weights).hexdigest()}
    facts = {"metrics": record.metrics, "history": record.history, "best epoch": record.best_epoch}
    return facts | hashes


for name, profile, row, changes in json.loads(sys.argv[1]):
    os.environ["CONKI_RUNS"] = str(home / "cases" / records.slug(name))
    config = ablation.configure(profile, row, 0).replace(**changes)
    try:
        for corpus in filter(None, (config.data.target, config.data.external)):
            corpora.fetch(corpus)
    except (OSError, ValueError) as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        continue
    training.fine_tune(config)
    runs = sorted((home / "cases" / records.slug(name)).glob("*/*/record.json"))
    found[name] = {records.load_run(p.parent).variant: outcome(p.parent) for p in runs}
    print(name, file=sys.stderr, flush=True)
print(json.dumps(found))
"""
HASH = "from conki_lib.records import code_hash; print(code_hash())"


def cases() -> Iterator[tuple[str, str, str, dict]]:
    """What is run by both codes: a name, the profile, the row, and settings that differ from it."""
    for profile in OPEN:
        yield profile, profile, "full", ONE_EPOCH
    for way in WAYS:
        yield ", ".join(f"{k}={v}" for k, v in way.items()), PROFILE, "full", way
    for row in dict.fromkeys(parse_rows("all", "synthetic") + parse_rows("switches", "synthetic")):
        yield row, PROFILE, row, {}


def extracted(revision: str, folder: Path) -> Path:
    """The files of a commit."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(HERE), "archive", revision], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def called(folder: Path, code: str, *words: str) -> subprocess.Popen:
    """Python in a copy of the project, which it imports."""
    told = {k: os.environ[k] for k in ("CONKI_MIRROR",) if k in os.environ}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=folder, text=True, stdout=subprocess.PIPE,
        env=environment(folder, CONKI_HEADLESS="1", **told),
    )  # fmt: skip


def said(process: subprocess.Popen) -> str:
    """The last line of what a process printed; an error ends the comparison."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args[1:3]} failed, see above")
    return out.splitlines()[-1]


def compared(earlier: dict, now: dict) -> list[str]:
    """Where two outcomes differ: case, run and what of it."""
    sides = [
        {(case, run): found for case, runs in side.items() for run, found in runs.items()}
        for side in (earlier, now)
    ]
    return [
        f"{case}, {run}: {what}"
        for case, run in sorted({*sides[0], *sides[1]})
        for what in ("metrics", "history", "best epoch", "predictions", "weights")
        if len({repr(side.get((case, run), {}).get(what)) for side in sides}) > 1
    ]


def run(revision: str) -> dict | None:
    """Run both codes; None where they are one."""
    result: dict = {"earlier": "", "code": "", "machine": machine()}
    with tempfile.TemporaryDirectory() as name:
        place, chosen = Path(name).resolve(), json.dumps(list(cases()))
        copies = {"earlier": place / "earlier", "code": place / "now"}
        for side, source in (("earlier", extracted(revision, place / "commit")), ("code", HERE)):
            copies[side].mkdir()
            project(copies[side], source)
            result[side] = said(called(copies[side], HASH))
        if result["earlier"] == result["code"]:
            return None
        processes = [called(copy, RUNNER, chosen) for copy in copies.values()]
        try:
            earlier, now = (json.loads(said(process)) for process in processes)
        finally:
            for process in processes:
                process.kill()
    cases_run = {case: sorted(runs) for case, runs in now.items()}
    return result | {"cases": cases_run, "different": compared(earlier, now)}


def page(shown: list[dict]) -> str:
    """The page of all comparisons, the newest first."""
    return TEXT.format(parts="\n".join(map(part, reversed(shown))))


def part(one: dict) -> str:
    """One comparison."""
    runs = sum(map(len, one["cases"].values()))
    return PART.format(
        **one, facts=facts(one), runs=runs, named=", ".join(f"`{case}`" for case in one["cases"])
    )


TEXT = """# Code that gives the same results

Written by `python bench/equal_code.py` from `results/equal_code.json`. Every record names a hash of
the code that determines results. Where a change was meant to change none, both codes ran the cases
below side by side on one processor: metrics, history, predictions and weights of every run were
equal to the bit. Records of the earlier code then count as current, and are not labelled older.
What no case is about was not shown: records of several processes do not count; those of one GPU do,
though no GPU was compared.

A case is a row of the tables or a setting, on a tiny profile with all modalities; those named after
a profile are its row `full` for one epoch at its own sizes, in fp32 (`synthetic`: its generated
corpora have fewer utterances here).

{parts}"""
PART = """## {earlier} → {code}

{facts}
- runs of both stages: {runs}

{named}
"""


def main() -> int:
    """Compare, and keep what was shown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="HEAD", help="commit with the earlier code")
    parser.add_argument("--page", action="store_true", help="the page from the committed results")
    given = parser.parse_args()
    shown = json.loads(EQUAL_CODE.read_text()) if EQUAL_CODE.is_file() else []
    if not given.page:
        result = run(given.against)
        if result is None:
            print("the code that determines results is the same")
            return 0
        if result["different"]:
            print("not equal:", *result["different"], sep="\n  ")
            return 1
        del result["different"]
        pair = result["earlier"], result["code"]
        shown = [one for one in shown if (one["earlier"], one["code"]) != pair] + [result]
        write_text(EQUAL_CODE, json.dumps(shown, indent=1) + "\n")
    write_text(PAGE, page(shown).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
