"""Kill the pipeline twenty times at random moments; it must always end in the same records.

    python bench/faults.py                      # 17 minutes
    python bench/faults.py --kills 2 --seed 1   # a short look, nothing kept

A copy of this project in a temporary folder trains a tiny profile: the real Snakefile and
notebooks, the embedded corpora with fewer utterances, a random BERT of two layers. After one
undisturbed run, the pipeline is started from nothing, killed by SIGKILL, and started again until it
ends; then from nothing once more, until all kills are spent. Three kinds of kill take turns: every
process at once, as when a machine goes down; only the first one, so that its jobs live on beside
the next start; and only a notebook's kernel. Most kills come at a random second, some are aimed at
a rule that is short: fetch, merge. At the end two pipelines are started at once, and one that was
begun anew (FRESH=1) is killed: the next start must go on with it. Writes results/bench/faults.json
and docs/benchmarks/faults.md.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from layouts import save_bert
from report import HERE, facts, machine, publish, published

KILLS, PROFILE, ROWS = 20, "tiny", "full"
LONGEST = 75.0  # seconds until a kill at most; on a busy machine the whole takes longer
COPIED = ("Snakefile", "profiles", "conki_lib", "notebooks", "configs")
SIZES = {"(600, 150, 300)": "(72, 36, 36)", "(3200, 400, 400)": "(96, 36, 36)"}
SETTINGS = dict(
    target="synthetic", external="synthetic-external", modalities="tva", d=16, encoder_heads=2,
    encoder_ff=16, adapter_width=8, adapter_heads=2, adapter_ff=8, adapter_text_layers=[0, 1],
    max_tokens=24, stage1_epochs=5, epochs=8, batch_size=24, stage1_batch_size=24,
    precision="fp32", device="cpu",
)  # fmt: skip
WORDS = "the it is was i not a great dull fine , . ##ly".split()
MADE = ("runs", "results", "figures", "tmp", "data/synthetic", "data/synthetic-external")
KINDS = ("everything", "first process", "kernel")
AIMS = (None, None, None, "fetch", "merge")  # at a random second, or when this rule has begun
WORKING = (".lock", ".pipeline.lock", ".jobs")  # part of a folder of runs, not left by a kill


# --- the project that is killed -----------------------------------------------------------------


def copied(folder: Path, names: Sequence[str], source: Path = HERE) -> Path:
    """Copy parts of a project, and the list of checksums, but no corpora and no runs."""
    for name in names:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, folder / name)
    (folder / "data").mkdir()
    shutil.copyfile(source / "data/registry.txt", folder / "data/registry.txt")
    return folder


def isolated(folder: Path, **more: str) -> dict[str, str]:
    """The copy is imported before anything else, and nothing of the checkout is written."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CONKI_")}
    path = os.pathsep.join(p for p in (str(folder), os.environ.get("PYTHONPATH")) if p)
    return kept | {"PYTHONPATH": path, "CONKI_HOME": str(folder)} | more


def project(folder: Path, source: Path = HERE) -> Path:
    """A copy of a project with the tiny profile beside its own, and a backbone."""
    copied(folder, COPIED, source)
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
    """One thread, no hub, and a folder of its own for what is temporary."""
    (folder / "tmp").mkdir(exist_ok=True)
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return isolated(folder, TMPDIR=str(folder / "tmp"), **own | more)


def start(folder: Path, log: Path, *more: str) -> subprocess.Popen:
    """Start the pipeline up to the merged records, in a process group of its own."""
    command = [sys.executable, "-m", "conki_lib.cli", "pipeline", "--profile", PROFILE]
    command += ["--rows", ROWS, "--cores", "2", *more, "train"]
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=folder, env=environment(folder), stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


# --- killing ------------------------------------------------------------------------------------


def ours(folder: Path) -> list[int]:
    """All live processes of the copy; kernels have sessions of their own, so groups miss them."""
    return marked(f"CONKI_HOME={folder}")


def marked(setting: str) -> list[int]:
    """All live processes whose environment holds this `NAME=value`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if setting.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # ended meanwhile
    return found


def kill(folder: Path, leader: subprocess.Popen, kind: str) -> tuple[str, int | None]:
    """SIGKILL the first process, every process of the copy, or a kernel where there is one.

    Returns:
        What was killed, and how the pipeline ended by itself if that was only a kernel.
    """
    kernels = [p for p in ours(folder) if b"ipykernel_launcher" in _command(p)]
    if kind == "kernel" and kernels:
        kill_one(kernels[-1])
        return kind, leader.wait()
    kind = "first process" if kind == "kernel" else kind
    leader.kill()
    leader.wait()
    if kind == "everything":
        kill_all(folder)
    return kind, None


def kill_all(folder: Path) -> None:
    """SIGKILL every process of the copy, and those that they start meanwhile."""
    while found := ours(folder):
        for process in found:
            kill_one(process)
        time.sleep(0.1)


def kill_one(process: int) -> None:
    """SIGKILL a process, if it still lives."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass  # ended meanwhile


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


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


@dataclass(frozen=True)
class Blow:
    """When and what to kill: after some seconds, and where aimed, after this rule has begun."""

    kind: str
    seconds: float
    aim: str | None = None


def said(log: Path, since: int) -> str:
    """What stands in a log after some bytes; its last character may be half written."""
    return log.read_bytes()[since:].decode(errors="replace")


def attempt(folder: Path, log: Path, blow: Blow | None, *more: str) -> dict:
    """Start the pipeline and kill it, unless it has ended by then."""
    known, began = trained(folder), time.monotonic()
    seen = log.stat().st_size if log.is_file() else 0
    leader, killed = start(folder, log, *more), ""
    due = began + blow.seconds if blow and not blow.aim else math.inf
    while (code := leader.poll()) is None:
        if blow and due == math.inf and f"rule {blow.aim}:" in said(log, seen):
            due = time.monotonic() + blow.seconds
        if time.monotonic() >= due:
            killed, code = kill(folder, leader, blow.kind)
            break
        time.sleep(0.02)
    now = trained(folder)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "killed": killed,
        "aim": killed and blow.aim,
        "code": code,
        "during": phase(said(log, seen)),
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


def leftovers(folder: Path) -> dict[str, int]:
    """How much only a killed writer leaves: hidden files, and what stands aside on purpose."""
    found = [p for name in ("runs", "results", "data") for p in (folder / name).rglob(".*")]
    return {
        "hidden files": sum(not p.name.endswith(WORKING) for p in found),
        "unfinished notebooks": len(list((folder / "runs/notebooks/failed").glob("*"))),
        "folders of sockets": len(list((folder / "tmp").glob("conki-*"))),
    }


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
        blow = _blow(rng, longest, first=not attempts) if spent < kills else None
        attempts.append(attempt(folder, log, blow))
        print(attempts[-1], flush=True)
    kill_all(folder)  # jobs that outlived their first process
    return {"attempts": attempts, "leftovers": leftovers(folder)}


def _blow(rng: random.Random, longest: float, first: bool) -> Blow:
    kind, aim = rng.choice(KINDS), rng.choice(AIMS)
    if aim and (first or aim == "merge"):  # a corpus is fetched in the first start alone
        return Blow(kind, rng.uniform(0, 2), aim)
    return Blow(kind, rng.uniform(0.02, 1) * longest)


def second_start(folder: Path, log: Path) -> dict:
    """Start two pipelines at once on one folder: what the second one says, and what it leaves."""
    forget(folder)
    first = start(folder, log)
    while not (folder / f"runs/.{PROFILE}.pipeline.lock").is_file() and first.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    second_log = log.with_name("second.log")
    second = start(folder, second_log)
    code = second.wait()
    words = second_log.read_text().strip().replace(str(folder), "PROJECT")
    return {"first": first.wait(), "second": code, "said": words.replace(str(first.pid), "N")}


def begun_anew(folder: Path, log: Path, expected: dict) -> dict:
    """Begin anew, though all is finished, kill it, the same again, then start it without."""
    before = trained(folder)
    # aimed: had one of them ended before its kill, the next would rightly begin once more
    first = attempt(folder, log, Blow("everything", 6, "full"), "--fresh")
    second = attempt(folder, log, Blow("everything", 14, "full"), "--fresh")
    last = attempt(folder, log, None)
    now, third = trained(folder), attempt(folder, log, None)
    found = {
        "killed_after": [first["seconds"], second["seconds"]],
        "finished_by_the_kills": [first["finished_after"], second["finished_after"]],
        "trained_again": sum(before.get(name) != when for name, when in now.items()),
        "runs": len(before),
        "kept": len(list((folder / "runs/replaced").glob("*/*/record.json"))),
        "repeated": second["repeated"] + last["repeated"] + third["repeated"],
    }
    as_it_must = (
        first["killed"] and second["killed"] and last["code"] == 0 and not found["repeated"]
        and found["trained_again"] == found["kept"] == found["runs"]
        and not (folder / f"runs/.{PROFILE}.fresh").exists()
    )  # fmt: skip
    print(found, flush=True)
    return found | {"equal": bool(as_it_must) and outcome(folder) == expected}


def run(kills: int, seed: int) -> dict:
    """The undisturbed run, all rounds of kills, two at once, and one begun anew."""
    rng, of_machine = random.Random(seed), machine()
    with tempfile.TemporaryDirectory() as name:
        folder = project(Path(name).resolve())
        log = folder / "log.txt"
        plain = attempt(folder, log, None)
        if plain["code"] != 0:
            raise SystemExit(f"the undisturbed run failed:\n{log.read_text()[-4000:]}")
        print("undisturbed:", plain, flush=True)
        expected, rounds = outcome(folder), []
        while (left := kills - sum(_kills(r) for r in rounds)) > 0:
            rounds.append(one_round(folder, log, left, min(LONGEST, plain["seconds"]), rng))
            rounds[-1] |= _compared(folder, expected, rounds[-1], log)
        both = second_start(folder, log)
        fine = both["first"] == 0 and both["second"] != 0
        both |= {"equal": fine and outcome(folder) == expected}
        anew = begun_anew(folder, log, expected)
        return {"machine": of_machine, "seed": seed, "undisturbed_seconds": plain["seconds"],
                "rounds": rounds, "two_at_once": both, "anew": anew}  # fmt: skip


def _kills(one: dict) -> int:
    return sum(bool(a["killed"]) for a in one["attempts"])


def _compared(folder: Path, expected: dict, one: dict, log: Path) -> dict:
    if one["attempts"][-1]["code"] != 0:
        print(log.read_text()[-4000:], flush=True)
        return {"equal": False, "differs": ["the pipeline failed"]}
    found = outcome(folder)
    differs = [part for part in expected if found[part] != expected[part]]
    differs += ["a finished run was repeated"] * any(a["repeated"] for a in one["attempts"])
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
        f"{sum(a['repeated'] for a in r['attempts'])} | "
        f"{' + '.join(map(str, r['leftovers'].values()))} | "
        f"{'equal' if r['equal'] else 'DIFFER: ' + ', '.join(r['differs'])} |"
        for i, r in enumerate(rounds, start=1)
    ]
    return PAGE.format(
        kills=len(killed),
        kinds=", ".join(f"{k} {n}" for k, n in Counter(a["killed"] for a in killed).items()),
        aimed=sum(bool(a["aim"]) for a in killed),
        anew=result["anew"],
        killed_after=" and ".join(map(str, result["anew"]["killed_after"])),
        finished=" and ".join(map(str, result["anew"]["finished_by_the_kills"])),
        anew_outcome="equal" if result["anew"]["equal"] else "NOT equal",
        seed=result["seed"],
        seconds=result["undisturbed_seconds"],
        repeated=sum(a["repeated"] for a in attempts),
        phases=", ".join(f"{name} {n}" for name, n in phases.most_common()),
        facts=facts(result),
        lines="\n".join(lines),
        second=both["second"],
        said=both["said"],
        both="equal" if both["equal"] else "NOT equal",
    )


def _moments(one: dict) -> str:
    marks = {"everything": "all", "first process": "first", "kernel": "kernel"}
    blows = [
        f"{a['seconds']:.0f} s ({marks[a['killed']]}{', ' + a['aim'] if a['aim'] else ''})"
        for a in one["attempts"] if a["killed"]
    ]  # fmt: skip
    return ", ".join(blows) or "not at all: it had ended"


PAGE = """# Killed at random moments

Written by `python bench/faults.py`; every number below comes from `results/bench/faults.json`.
A tiny profile (fetch, stage 1, `full`, merge; the real Snakefile and notebooks in a copy of the
project) was run once undisturbed ({seconds} s) and then killed by SIGKILL {kills} times (seed
{seed}; {kinds}): every process at once; only the first process, whose jobs then live on beside the
next start; or only a notebook's kernel, where one was there, after which the pipeline ends by
itself. {aimed} were aimed at a short rule, the others came at a random second. Each round
begins with nothing, and the pipeline is started again until it ends. Compared with the undisturbed
run are all records (provenance aside), the predictions, and the SHA-256 of every run's weights. A
finished run that was trained again would count as repeated: {repeated} were. What was going on when
the kills came (`epochs`: a checkpoint was there or being written): {phases}.

{facts}

Left over at the end are hidden files of a killed writer + notebooks as far as they came, kept on
purpose in `runs/notebooks/failed/` + folders of sockets in `$TMPDIR`, a few bytes each.

| round | killed after | runs found finished | repeated | left over | outcome |
|---:|---|---:|---:|---:|---|
{lines}

## Two at once

A second pipeline on the same folder ended with exit code {second}; the first went on, and its
outcome was {both} to the undisturbed run. The second said:

```
{said}
```

## Begun anew, and killed

With all records there, `FRESH=1` moved {anew[kept]} finished runs aside and began anew. It was
started so twice, and every process was killed after {killed_after} s, when {finished} runs had been
trained; the third start, without `FRESH=1`, went on: {anew[trained_again]} of {anew[runs]} were
trained again and {anew[repeated]} twice; the outcome was {anew_outcome} to the undisturbed run.
"""


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", action="store_true", help="the page from the results")
    given = parser.parse_args()
    result = published("faults") if given.page else run(given.kills, given.seed)
    if given.kills >= KILLS:
        publish("faults", result, page(result))
    print(page(result))
    parts = (*result["rounds"], result["two_at_once"], result["anew"])
    if not all(part["equal"] for part in parts):
        raise SystemExit("records differ from those of the undisturbed run")


if __name__ == "__main__":
    main()
