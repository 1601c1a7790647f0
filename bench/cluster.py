"""The pipeline on a cluster that is played by this machine: overhead of a job, kills, requests.

    python bench/cluster.py             # a dozen minutes
    python bench/cluster.py --jobs 8    # a short look, nothing kept

Needs `pip install snakemake-executor-plugin-cluster-generic snakemake-executor-plugin-slurm`. The
commands of Slurm (sbatch, sacct, srun, ...) are stand-ins: sbatch writes down what a job asks for
and queues it, and this script runs the queue, a few jobs at a time, in sessions of their own. In a
copy of the project, four things are looked at:

1. 200 jobs that do nothing (`--config conki=true`): time and processor time per job, beside the
   same jobs on Snakemake's executor for one machine;
2. a tiny profile whose training job is killed by SIGKILL after a checkpoint: it must be submitted
   again and resume, no other job may be submitted twice, and a second call must submit nothing;
3. profiles/slurm with Slurm's own plugin: what sbatch is asked for, rule by rule;
4. the plan of profiles/kubernetes, where its plugin is installed.

Writes results/bench/cluster.json and docs/benchmarks/cluster.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

from faults import PROFILE, environment, kill_one, marked, project
from report import facts, machine, publish, published

JOBS, SLOTS = 200, 2
PLUGINS = ("cluster_generic", "slurm", "slurm_jobstep")
KUBERNETES = ("snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_fs")
QUICK = ["--seconds-between-status-checks", "1", "--latency-wait", "5", "--nocolor"]
COMMANDS = {
    # the last argument is the job's script, or --wrap=COMMAND
    "sbatch": """id=$(date +%s%N | cut -c6-16)
printf '%s\\0' "$@" > "$SPOOL/.$id" && mv "$SPOOL/.$id" "$SPOOL/$id.asked" && echo "$id"
""",
    "state": 'cat "$SPOOL/$1.state" 2>/dev/null || echo running\n',  # for cluster-generic
    "sacct": """cd "$SPOOL"; for state in *.state; do
  case "$(cat "$state" 2>/dev/null)" in
    success) echo "${state%.state}|COMPLETED";; failed) echo "${state%.state}|FAILED";;
    running) echo "${state%.state}|RUNNING";;
  esac
done
""",
    "squeue": 'exec sacct "$@"\n',
    # the options end where the command begins; the plugin always gives -n1 first
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"\n',
    "sinfo": 'echo "PARTITION cpu* gpu"\n',
    "scontrol": 'echo "MinJobAge = 300 sec"\n',
    "sacctmgr": "exit 0\n",
    "sshare": "exit 0\n",
    "scancel": "exit 0\n",
}


# --- a cluster of one machine -------------------------------------------------------------------


class Cluster:
    """Stand-ins for Slurm's commands, and a thread that runs what sbatch has queued."""

    def __init__(self, folder: Path, project_folder: Path, slots: int = SLOTS) -> None:
        self.spool, self.bin, self.slots = folder / "spool", folder / "bin", slots
        self.jobs: dict[str, dict] = {}
        self.project, self.ended = project_folder, threading.Event()
        for place in (self.spool, self.bin):
            place.mkdir(parents=True)
        for name, text in COMMANDS.items():
            (self.bin / name).write_text("#!/bin/sh\n" + text)
            (self.bin / name).chmod(0o755)
        self.environment = environment(
            project_folder,
            SPOOL=str(self.spool),
            PATH=f"{self.bin}{os.pathsep}{os.environ['PATH']}",
        )

    def __enter__(self) -> "Cluster":
        self.workers = [threading.Thread(target=self._work) for _ in range(self.slots)]
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for worker in self.workers:
            worker.join()

    def _work(self) -> None:
        while not self.ended.is_set():
            for asked in sorted(self.spool.glob("*.asked")):
                try:
                    taken = asked.rename(asked.with_suffix(".taken"))
                except FileNotFoundError:
                    continue  # another slot was quicker
                self._run(taken)
                break
            else:
                time.sleep(0.05)

    def _run(self, taken: Path) -> None:
        words = taken.read_text().split("\0")[:-1]
        wrapped = [w.removeprefix("--wrap=") for w in words if w.startswith("--wrap=")]
        line = wrapped[0] if wrapped else f"sh {words[-1]}"
        name, start = taken.stem, time.monotonic()
        log = (self.spool / f"{name}.log").open("w")
        state = self.spool / f"{name}.state"
        state.write_text("running")
        job = subprocess.Popen(
            ["sh", "-c", line], cwd=self.project, env=self.environment | {"SLURM_JOB_ID": name},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        text = line if wrapped else Path(words[-1]).read_text()  # Snakemake removes its scripts
        asked = [word for word in words if not word.startswith("--wrap=")]
        self.jobs[name] = {"asked": asked, "rule": _rule(text)}
        _, status, used = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(status)
        self.jobs[name] |= {
            "code": job.returncode,
            "seconds": time.monotonic() - start,
            "cpu_seconds": used.ru_utime + used.ru_stime,
        }
        state.write_text("success" if job.returncode == 0 else "failed")

    def kill(self, name: str) -> None:
        """SIGKILL all processes of a job, as a cluster does at a time limit or a preemption."""
        for process in marked(f"SLURM_JOB_ID={name}"):
            kill_one(process)

    def running(self, rule: str) -> list[str]:
        """Ids of jobs of a rule that are at work."""
        jobs = list(self.jobs.items())
        return [name for name, job in jobs if "code" not in job and job["rule"] == rule]


def _rule(text: str) -> str:
    """The rule of a job, from the call of Snakemake inside its script."""
    found = re.search(r"--allowed-rules['\"]? ['\"]?(\w+)", text)
    return found[1] if found else "?"


def snakemake(cluster: Cluster, *words: str, log: Path) -> dict:
    """One call of Snakemake in the copy, and what it used beside its jobs."""
    command = [sys.executable, "-m", "snakemake", "--nolock", *words]
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=cluster.project, env=cluster.environment, stdout=file, stderr=file
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words[:4])} ... failed:\n{log.read_text()[-4000:]}")
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": time.monotonic() - start, "cpu_seconds": cpu}


GENERIC = [
    "--executor", "cluster-generic", "--jobs", "20", "--retries", "1",
    "--cluster-generic-submit-cmd",
    "sbatch --cpus-per-task={threads} --mem={resources.mem_mb} -t {resources.runtime}",
    "--cluster-generic-status-cmd", "state", *QUICK,
]  # fmt: skip


# --- 1. jobs that do nothing --------------------------------------------------------------------


def overhead(folder: Path, place: Path, jobs: int) -> dict:
    """Schedule jobs that do nothing: through the cluster, and on one machine."""
    targets = [f"runs/{PROFILE}/.rehearsal/wo-C1-s{seed}-standard" for seed in range(jobs)]
    config = ["--config", f"profile={PROFILE}", "conki=true", "rows='w/o C1'", f"seeds='{jobs}'"]
    with Cluster(place / "many", folder) as cluster:
        local = snakemake(
            cluster, "--cores", "2", *targets, *config, log=place / "local.log"
        )  # fmt: skip
        _remove_markers(folder)
        whole = snakemake(cluster, *GENERIC, *targets, *config, log=place / "many.log")
        done = list(cluster.jobs.values())
    count = len(done)
    _remove_markers(folder)
    return {
        "jobs": count,
        "asked": jobs,
        "slots": SLOTS,
        "failed": sum(job["code"] != 0 for job in done),
        "wall_per_job": whole["seconds"] / count,
        "job_seconds": statistics.median(job["seconds"] for job in done),
        "job_cpu_seconds": statistics.median(job["cpu_seconds"] for job in done),
        "scheduler_cpu": whole["cpu_seconds"] / count,
        "local_wall_per_job": local["seconds"] / count,
        "local_cpu": local["cpu_seconds"] / count,
    }


def _remove_markers(folder: Path) -> None:
    for path in (folder / "runs" / PROFILE / ".rehearsal").glob("*"):
        path.unlink()


# --- 2. a killed job ----------------------------------------------------------------------------


def killed_job(folder: Path, place: Path) -> dict:
    """Train the tiny profile through the cluster and kill the training job after a checkpoint."""
    config = ["--config", f"profile={PROFILE}", "rows='w/o C4'"]
    with Cluster(place / "killed", folder) as cluster:
        watcher = threading.Thread(target=_kill_after_checkpoint, args=(cluster,), daemon=True)
        watcher.start()
        snakemake(cluster, *GENERIC, "train", *config, log=place / "killed.log")
        jobs = list(cluster.jobs.values())
        logs = "".join(p.read_text() for p in cluster.spool.glob("*.log"))
        snakemake(cluster, *GENERIC, "train", *config, log=place / "killed-again.log")
        again = len(cluster.jobs) - len(jobs)
    counts: dict[str, list[int]] = {}
    for job in jobs:
        counts.setdefault(job["rule"], []).append(job["code"])
    resumed = re.findall(r"resuming \S+ after epoch \d+", logs)
    return {"codes": counts, "resumed": resumed, "submitted_by_second_call": again}


def _kill_after_checkpoint(cluster: Cluster) -> None:
    """Wait for a checkpoint of stage 2, then kill its job, once."""
    while not cluster.ended.is_set():
        names = cluster.running("variant")
        if names and list(cluster.project.glob(f"runs/{PROFILE}/wo-C4-*/checkpoint-*")):
            cluster.kill(names[0])
            return
        time.sleep(0.05)


# --- 3. the profile for Slurm -------------------------------------------------------------------


def slurm(folder: Path, place: Path) -> dict:
    """All rules through profiles/slurm and Slurm's plugin, doing nothing: what is asked for."""
    config = ["--config", f"profile={PROFILE}", "conki=true"]
    plan = dry_run(folder, "slurm", config)
    quick = ["--slurm-init-seconds-before-status-checks", "1", *QUICK]
    words = ["--workflow-profile", "profiles/slurm", *quick, *config]
    with Cluster(place / "slurm", folder) as cluster:
        spent = snakemake(cluster, *words, log=place / "slurm.log")
        jobs = list(cluster.jobs.values())
    asked: dict[str, dict] = {}
    for job in jobs:
        asked.setdefault(job["rule"], _requests(job))
    _remove_markers(folder)
    return {
        "dry_run_code": plan,
        "jobs": len(jobs),
        "failed": sum(job["code"] != 0 for job in jobs),
        "job_cpu_seconds": statistics.median(job["cpu_seconds"] for job in jobs),
        "seconds": spent["seconds"],
        "asked": asked,
    }


def dry_run(folder: Path, name: str, config: list[str]) -> int:
    """The exit code of a plan through one of the profiles for clusters."""
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--workflow-profile", f"profiles/{name}", "--nolock",
         "--dry-run", "--quiet", "all", *config],
        cwd=folder, env=environment(folder), capture_output=True, text=True, check=False,
    ).returncode  # fmt: skip


# --- 4. the profile for Kubernetes --------------------------------------------------------------


def kubernetes(folder: Path) -> str:
    """Whether its dry run passes: pods need a cluster, a plan does not."""
    if not all(map(find_spec, KUBERNETES)):
        return "was not tried, since its plugins are not installed"
    code = dry_run(folder, "kubernetes", ["--config", f"profile={PROFILE}", "rows='w/o C4'"])
    return "passes" if code == 0 else "FAILS"


# --- what must hold -----------------------------------------------------------------------------


def problems(result: dict) -> list[str]:
    """What is not as it must be."""
    many, killed, asked = result["overhead"], result["killed"], result["slurm"]
    codes = {rule: sorted(found) for rule, found in killed["codes"].items()}
    checks = {
        "a job that does nothing failed": many["failed"] or asked["failed"],
        "not every job was submitted": many["jobs"] != many["asked"],
        "the killed job was not submitted again, once": len(codes.get("variant", [])) != 2
        or 0 not in codes["variant"],
        "a job that was not killed failed": any(
            any(found) for rule, found in codes.items() if rule != "variant"
        ),
        "no run was resumed": not killed["resumed"],
        "the second call submitted jobs": killed["submitted_by_second_call"],
        "a dry run fails": asked["dry_run_code"] or result["kubernetes"] == "FAILS",
        "a rule that trains asks for no GPU": not all(
            asked["asked"].get(rule, {}).get("gpu") for rule in ("stage_1", "full", "variant")
        ),
    }  # fmt: skip
    return [text for text, failed in checks.items() if failed]


def _option(job: dict, name: str) -> str:
    """What follows an option, be it `--name value` or `--name=value`."""
    words = job["asked"]
    for i, word in enumerate(words):
        if word == name:
            return words[i + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return ""


def _requests(job: dict) -> dict[str, str]:
    """What a job asks of Slurm."""
    options = {
        "partition": ("-p",),
        "gpu": ("--gpus", "--gres"),
        "memory_mb": ("--mem",),
        "minutes": ("-t",),
        "cpus": ("--cpus-per-task", "--cpus-per-gpu"),
    }
    return {
        k: next((v for n in names if (v := _option(job, n))), "") for k, names in options.items()
    }


# --- the page -----------------------------------------------------------------------------------


def page(result: dict) -> str:
    """The page of the benchmark; every number in it comes from the result."""
    many, killed, asked = result["overhead"], result["killed"], result["slurm"]
    rows = "\n".join(
        f"| {rule} | {r['gpu'] or 'none'} | {r['minutes']} | {r['memory_mb']} | {r['cpus']} | "
        f"{r['partition']} |"
        for rule, r in sorted(asked["asked"].items())
    )
    codes = "\n".join(
        f"| {rule} | {len(found)} | {', '.join(map(str, found))} |"
        for rule, found in sorted(killed["codes"].items())
    )
    return PAGE.format(
        facts=facts(result),
        codes=codes,
        rows=rows,
        resumed="; ".join(re.sub(r"-[0-9a-f]{12}", "", r) for r in killed["resumed"]) or "nothing",
        again=killed["submitted_by_second_call"],
        many=many,
        asked=asked,
        dry="passes" if asked["dry_run_code"] == 0 else "FAILS",
        kubernetes=result["kubernetes"],
    )


PAGE = """# The pipeline on a cluster

Written by `python bench/cluster.py`; every number below comes from `results/bench/cluster.json`.
The cluster is played by this machine: stand-ins for Slurm's commands queue the jobs and a script
runs them, {many[slots]} at a time, in sessions of their own. Snakefile, notebooks, profiles and
Snakemake's executors are the real ones. On a busy machine read the processor times.

{facts}

## Overhead of a job

{many[jobs]} jobs that do nothing (`--config conki=true`), {many[failed]} failed:

| per job | cluster-generic | one machine (`--cores 2`) |
|---|---:|---:|
| wall clock of the whole | {many[wall_per_job]:.2f} s | {many[local_wall_per_job]:.3f} s |
| processor time, scheduler | {many[scheduler_cpu]:.2f} s | {many[local_cpu]:.3f} s |
| processor time, job (median) | {many[job_cpu_seconds]:.2f} s | |
| wall clock, job (median) | {many[job_seconds]:.2f} s | |

A job on a cluster starts Snakemake once more and reads the Snakefile.

## A killed job

The tiny profile of `bench/faults.py`; all processes of the job of stage 2 were killed by SIGKILL
after its first checkpoint. Exit codes of what was submitted, rule by rule:

| rule | submitted | exit codes |
|---|---:|---|
{codes}

Runs that went on from a checkpoint: {resumed}. The second call submitted {again} jobs.

## What profiles/slurm asks for

Slurm's own plugin, {asked[jobs]} jobs, {asked[failed]} failed; the dry run {dry}. A job takes
{asked[job_cpu_seconds]:.1f} s of processor time before any work, as this plugin starts Snakemake
twice. Of profiles/kubernetes only the plan can be made without a cluster: it {kubernetes}.

| rule | GPU | minutes | memory, MB | CPUs | partition |
|---|---|---:|---:|---:|---|
{rows}
"""


def run(jobs: int) -> dict:
    """All three parts."""
    absent = [name for name in PLUGINS if not find_spec(f"snakemake_executor_plugin_{name}")]
    if absent:
        print(
            f"left out, as Snakemake's plugins {', '.join(absent)} are not installed: "
            "`pip install snakemake-executor-plugin-cluster-generic "
            "snakemake-executor-plugin-slurm`"
        )
        raise SystemExit(0)  # `make bench` goes on
    of_machine = machine()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        (place / "project").mkdir()
        folder = project(place / "project")
        result = {"slurm": slurm(folder, place), "killed": killed_job(folder, place)}
        result["kubernetes"] = kubernetes(folder)
        print(json.dumps(result, indent=1), flush=True)
        return {"machine": of_machine, "overhead": overhead(folder, place, jobs)} | result


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--page", action="store_true", help="the page from the results")
    given = parser.parse_args()
    result = published("cluster") if given.page else run(given.jobs)
    if given.jobs >= JOBS:
        publish("cluster", result, page(result))
    print(page(result))
    if found := problems(result):
        raise SystemExit("; ".join(found))


if __name__ == "__main__":
    main()
