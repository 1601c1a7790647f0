"""Kill the pipeline twenty times at random moments; it must always end in the same records.

    python bench/faults.py                      # a quarter of an hour on an idle machine
    python bench/faults.py --kills 2 --seed 1   # a short look, nothing kept

A copy of this project in a temporary folder trains a tiny profile: the real Snakefile and
notebooks, the embedded corpora with fewer utterances, a random BERT of two layers. After one
undisturbed run, the pipeline is started from nothing, killed by SIGKILL, and started again until it
ends; then from nothing once more, until all kills are spent. Two kinds of kill take turns: every
process at once, as when a machine goes down, and only the first one, so that its jobs live on
beside the next start. Writes results/bench/faults.json and docs/benchmarks/faults.md.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

from layouts import save_bert

HERE = Path(__file__).resolve().parents[1]
KILLS, PROFILE, ROWS = 20, "tiny", "full"
LONGEST = 75.0  # seconds until a kill at most; on a busy machine the whole takes longer
COPIED = ("Snakefile", "profiles", "conki_lib", "notebooks")
SIZES = {"(600, 150, 300)": "(72, 36, 36)", "(3200, 400, 400)": "(96, 36, 36)"}
SETTINGS = dict(
    target="synthetic", external="synthetic-external", modalities="tva", d=16, encoder_heads=2,
    encoder_ff=16, adapter_width=8, adapter_heads=2, adapter_ff=8, adapter_text_layers=[0, 1],
    max_tokens=24, stage1_epochs=5, epochs=8, batch_size=24, stage1_batch_size=24,
    precision="fp32", device="cpu",
)  # fmt: skip
WORDS = "the it is was i not a great dull fine , . ##ly".split()
MADE = ("runs", "results", "figures", "data/synthetic", "data/synthetic-external")
WORKING = (".lock", ".pipeline.lock", ".jobs")  # part of a folder of runs, not left by a kill


# --- the project that is killed -----------------------------------------------------------------


def project(folder: Path) -> Path:
    """Copy the project into a folder and give it the tiny profile and a backbone."""
    for name in COPIED:
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copyfile
        copy(HERE / name, folder / name)
    for name in ("data", "configs"):
        (folder / name).mkdir()
    shutil.copyfile(HERE / "data/registry.txt", folder / "data/registry.txt")
    generator = folder / "conki_lib/data/synthetic.py"
    text = generator.read_text()
    for size, smaller in SIZES.items():
        assert size in text, f"{generator.name} has no corpus of {size} any more: mend SIZES"
        text = text.replace(size, smaller)
    generator.write_text(text)
    backbone = save_bert(folder / "bert", WORDS, max_position_embeddings=32)
    settings = SETTINGS | {"text_backbone": backbone}
    (folder / f"configs/{PROFILE}.yml").write_text(json.dumps(settings))  # JSON is YAML
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The copy is imported before anything else, and nothing of the checkout is written."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CONKI_")}
    path = os.pathsep.join(p for p in (str(folder), os.environ.get("PYTHONPATH")) if p)
    added = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return kept | added | {"TOKENIZERS_PARALLELISM": "false", "CONKI_HOME": str(folder)} | more


def start(folder: Path, log: Path) -> subprocess.Popen:
    """Start the pipeline up to the merged records, in a process group of its own."""
    command = [sys.executable, "-m", "conki_lib.cli", "pipeline", "--profile", PROFILE]
    command += ["--rows", ROWS, "--cores", "2", "train"]
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


# --- killing ------------------------------------------------------------------------------------


def ours(folder: Path) -> list[int]:
    """All live processes of the copy; kernels have sessions of their own, so groups miss them."""
    mark, found = f"CONKI_HOME={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # ended meanwhile
    return found


def kill(folder: Path, leader: subprocess.Popen, everything: bool) -> None:
    """SIGKILL the first process, or every process of the copy."""
    leader.kill()
    leader.wait()
    while everything and (found := ours(folder)):
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def trained(folder: Path) -> dict[str, float]:
    """When each finished run was finished, by its folder."""
    return {p.parent.name: p.stat().st_mtime for p in (folder / "runs").glob("*/*/record.json")}


def phase(said: str) -> str:
    """What the pipeline was doing last: starting, a rule before its training, or epochs of it."""
    rules = list(re.finditer(r"^(?:local)?rule (\w+):", said, re.M))
    if not rules:
        return "start"
    epochs = " epochs" if re.search(r"epoch \d+/\d+", said[rules[-1].end() :]) else ""
    return rules[-1][1] + epochs


def attempt(folder: Path, log: Path, after: float | None, everything: bool) -> dict:
    """Start the pipeline and kill it after some seconds, unless it has ended by then."""
    known, began = trained(folder), time.monotonic()
    seen = log.stat().st_size if log.is_file() else 0
    leader = start(folder, log)
    try:
        code = leader.wait(timeout=after)
    except subprocess.TimeoutExpired:
        kill(folder, leader, everything)
        code = None
    now = trained(folder)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "killed": code is None and ("everything" if everything else "first process"),
        "code": code,
        "during": phase(log.read_text()[seen:]),
        "finished_before": len(known),
        "finished_after": len(now),
        "repeated": sum(now.get(name) != when for name, when in known.items()),
    }


# --- what is compared ---------------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, object]:
    """Records without provenance, predictions, and the hash of every run's weights."""
    import pandas as pd

    results = folder / "results" / PROFILE
    records = [json.loads(line) for line in (results / "records.jsonl").open()]
    for record in records:
        record.pop("provenance")
    table = pd.read_parquet(results / "predictions.parquet")
    weights = sorted((folder / "runs").glob("*/*/model.safetensors"))
    return {
        "records": records,
        "predictions": sha256(pd.util.hash_pandas_object(table).to_numpy().tobytes()).hexdigest(),
        "weights": {p.parent.name: sha256(p.read_bytes()).hexdigest() for p in weights},
    }


def leftovers(folder: Path) -> list[str]:
    """Files and folders that only a killed writer leaves, wherever they lie."""
    found = [p for name in ("runs", "results", "data") for p in (folder / name).rglob(".*")]
    kept = [p for p in found if not p.name.endswith(WORKING)]
    return sorted(str(p.relative_to(folder)) for p in kept)


def forget(folder: Path) -> None:
    """Back to nothing: no corpora, no runs, no results."""
    for name in MADE:
        shutil.rmtree(folder / name, ignore_errors=True)


def one_round(folder: Path, log: Path, kills: int, longest: float, rng: random.Random) -> dict:
    """From nothing to the end, with as many kills as it takes and are allowed."""
    forget(folder)
    attempts: list[dict] = []
    while not attempts or attempts[-1]["killed"]:
        spent = sum(bool(a["killed"]) for a in attempts)
        after = rng.uniform(0.02, 1) * longest if spent < kills else None
        attempts.append(attempt(folder, log, after, everything=rng.random() < 0.5))
        print(attempts[-1], flush=True)
    kill(folder, start_nothing(), everything=True)  # jobs that outlived their first process
    return {"attempts": attempts, "leftovers": leftovers(folder)}


def start_nothing() -> subprocess.Popen:
    """A process that ends at once."""
    return subprocess.Popen([sys.executable, "-c", ""])


def second_start(folder: Path, log: Path) -> dict:
    """Start two pipelines at once on one folder: what the second one says, and what it leaves."""
    forget(folder)
    first = start(folder, log)
    while not (folder / "runs/.pipeline.lock").is_file() and first.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    second_log = log.with_name("second.log")
    second = start(folder, second_log)
    code = second.wait()
    said = second_log.read_text().strip().replace(str(folder), "PROJECT")
    return {"first": first.wait(), "second": code, "said": said.replace(str(first.pid), "N")}


def run(kills: int, seed: int) -> dict:
    """The undisturbed run, all rounds of kills, and two at once."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = project(Path(name).resolve())
        log = folder / "log.txt"
        plain = attempt(folder, log, None, everything=True)
        if plain["code"] != 0:
            raise SystemExit(f"the undisturbed run failed:\n{log.read_text()[-4000:]}")
        print("undisturbed:", plain, flush=True)
        expected, rounds = outcome(folder), []
        while (left := kills - sum(_kills(r) for r in rounds)) > 0:
            rounds.append(one_round(folder, log, left, min(LONGEST, plain["seconds"]), rng))
            rounds[-1] |= _compared(folder, expected, rounds[-1], log)
        both = second_start(folder, log)
        both |= {"equal": both["first"] == 0 and outcome(folder) == expected}
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        machine |= {"load": round(os.getloadavg()[1], 1)}
        return {"machine": machine, "seed": seed, "undisturbed_seconds": plain["seconds"],
                "rounds": rounds, "two_at_once": both}  # fmt: skip


def _kills(one: dict) -> int:
    return sum(bool(a["killed"]) for a in one["attempts"])


def _compared(folder: Path, expected: dict, one: dict, log: Path) -> dict:
    if one["attempts"][-1]["code"] != 0:
        print(log.read_text()[-4000:], flush=True)
        return {"equal": False, "differs": ["the pipeline failed"]}
    found = outcome(folder)
    differs = [part for part in expected if found[part] != expected[part]]
    return {"equal": not differs, "differs": differs}


# --- the page -----------------------------------------------------------------------------------


def page(result: dict) -> str:
    """The page of the benchmark; every number in it comes from the result."""
    rounds, both = result["rounds"], result["two_at_once"]
    attempts = [a for r in rounds for a in r["attempts"]]
    killed = [a for a in attempts if a["killed"]]
    phases = Counter(a.get("during", "not noted") for a in killed)
    lines = [
        f"| {i} | {_moments(r)} | {max(a['finished_before'] for a in r['attempts'])} | "
        f"{sum(a['repeated'] for a in r['attempts'])} | {len(r['leftovers'])} | "
        f"{'equal' if r['equal'] else 'DIFFER: ' + ', '.join(r['differs'])} |"
        for i, r in enumerate(rounds, start=1)
    ]
    return PAGE.format(
        kills=len(killed),
        everything=sum(a["killed"] == "everything" for a in killed),
        seed=result["seed"],
        seconds=result["undisturbed_seconds"],
        repeated=sum(a["repeated"] for a in attempts),
        phases=", ".join(f"{name} {n}" for name, n in phases.most_common()),
        facts="\n".join(f"- {k}: {v}" for k, v in result["machine"].items()),
        lines="\n".join(lines),
        second=both["second"],
        said=both["said"],
        both="equal" if both["equal"] else "NOT equal",
    )


def _moments(one: dict) -> str:
    marks = {"everything": "all", "first process": "first"}
    return ", ".join(
        f"{a['seconds']:.0f} s ({marks[a['killed']]})" for a in one["attempts"] if a["killed"]
    )


PAGE = """# Killed at random moments

Written by `python bench/faults.py`; every number below comes from `results/bench/faults.json`.
A tiny profile (fetch, stage 1, `full`, merge; the real Snakefile and notebooks in a copy of the
project) was run once undisturbed ({seconds} s) and then killed by SIGKILL {kills} times (seed
{seed}): {everything} times every process at once, otherwise only the first process, whose jobs then
live on beside the next start. Each round begins with nothing, and the pipeline is started again
until it ends. Compared with the undisturbed run are all records (provenance aside), the
predictions, and the SHA-256 of every run's weights. A finished run that was trained again would
count as repeated: {repeated} were. What was going on when the kills came (`epochs`: a checkpoint
was there or being written): {phases}.

{facts}

| round | killed after | runs found finished | repeated | left-over files | outcome |
|---:|---|---:|---:|---:|---|
{lines}

## Two at once

A second pipeline on the same folder ended with exit code {second}; the first went on, and its
outcome was {both} to the undisturbed run. The second said:

```
{said}
```
"""


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", action="store_true", help="the page from the results")
    given = parser.parse_args()
    results, docs = HERE / "results/bench/faults.json", HERE / "docs/benchmarks/faults.md"
    result = json.loads(results.read_text()) if given.page else run(given.kills, given.seed)
    if given.kills >= KILLS:
        for path, text in ((results, json.dumps(result, indent=1) + "\n"), (docs, page(result))):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    print(page(result))
    if not all(part["equal"] for part in (*result["rounds"], result["two_at_once"])):
        raise SystemExit("records differ from those of the undisturbed run")


if __name__ == "__main__":
    main()
