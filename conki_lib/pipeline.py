"""What the Snakefile asks, and how it is started: one pipeline per profile, resumable after a kill.

The Snakefile is the definition of the pipeline. Its marker files in ``runs/<profile>/.jobs/`` only
mirror what is true: `is_finished` asks the records, `state` what tables and figures are made from.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pandas as pd

from conki_lib import anew
from conki_lib.config import ROOT, RunConfig, RuntimeConfig, read_profile
from conki_lib.disk import corpus_path, explained
from conki_lib.records import (
    EQUAL_CODE,
    answers,
    committed_records,
    config_key,
    load_records,
    local_records,
    provenance,
    results_dir,
    run_folder,
    runs_dir,
    write_text,
)

_MOST_SEEDS = 1000
_HOLDER = "CONKI_LOCK_HOLDER"  # the process that has locked the runs; `exec` keeps its number


def parse_seeds(text: str) -> list[int]:
    """Read seeds: ``"3"`` means the first three, ``"0,4,7"`` these, ``"2-5"`` two to five.

    Raises:
        ValueError: anything else, or more than a thousand.
    """
    seeds: Sequence[int] = []
    with contextlib.suppress(ValueError):
        if "," in text:
            seeds = [int(part) for part in text.split(",") if part.strip()]
        elif "-" in text:
            first, last = map(int, text.split("-"))
            seeds = range(first, min(last, first + _MOST_SEEDS) + 1)
        else:
            seeds = range(min(int(text), _MOST_SEEDS + 1))
    if len(seeds) > _MOST_SEEDS:
        raise ValueError(
            f"SEEDS={text!r}: more than {_MOST_SEEDS} seeds; one alone is written with a comma: 7,"
        )
    if not seeds or min(seeds) < 0:
        raise ValueError(
            f"SEEDS={text!r}: write a count (3), a list (0,4,7 or 7,) or a range (2-5)"
        )
    return list(seeds)


def parse_rows(text: str, profile: str) -> list[str]:
    """Read rows: ``"full,w/o N1"``; ``"all"``: each of the main table that the profile can run.

    ``"switches"`` are those of the audit in the same way; nothing means those that the profile
    trains by default.

    Raises:
        ValueError: an unknown row, with the near ones, or one that is not for this profile.
    """
    from conki_lib.ablation import SWITCHES, VARIANTS, configure, default_rows, why_not

    if text in ("all", "switches"):
        base, named = RunConfig.from_profile(profile), VARIANTS if text == "all" else SWITCHES
        possible = [name for name in named if why_not(base, name) is None]
        return [name for name in possible if configure(profile, name).variant == name]
    rows = [part.strip() for part in text.split(",") if part.strip()] or default_rows(profile)
    for row in rows:
        configure(profile, row)
    return rows


def parse_folds(text: str, profile: str) -> list[str]:
    """Read folds separated by commas; where none is given, the profile's.

    Raises:
        ValueError: the target corpus, where it is on this machine, has no such fold.
    """
    data = RunConfig.from_profile(profile).data
    folds = [part.strip() for part in text.split(",") if part.strip()] or [data.fold]
    if folds != [data.fold]:
        from conki_lib.data import open_store  # loads PyTorch

        path = corpus_path(data.target)
        for fold in folds if (path / "info.json").is_file() else ():
            open_store(path, fold)
    return folds


def is_fetched(name: str) -> bool:
    """Is a corpus here, as today's recipe makes it? Else `conki fetch` has work to do."""
    if not (corpus_path(name) / "info.json").is_file():
        return False  # PyTorch need not be loaded to see that
    from conki_lib.data.corpora import CORPORA, is_current

    corpus = CORPORA.get(name)
    return corpus is None or corpus.kind == "user" or is_current(corpus_path(name), corpus)


def is_finished(config: RunConfig, stage: int) -> bool:
    """Does the record of this run exist, for data, backbone and code as they are now?"""
    if not all(map(is_fetched, filter(None, (config.data.target, config.data.external)))):
        return False
    from conki_lib.training import fingerprints, resolve

    try:
        data = fingerprints(*resolve(config))
    except FileNotFoundError:
        return False  # no data yet, or no backbone
    folders = (run_folder(answer, stage, data) for answer in answers(config))
    return any((folder / "record.json").is_file() for folder in folders)


def is_committed(config: RunConfig, stage: int) -> bool:
    """Does ``results/`` hold a record of this run by the code as it is now?

    The data need not be here; those that `conki fetch` brings are pinned by checksums.
    """
    wanted = {config_key(answer, stage) for answer in answers(config)}
    committed = committed_records(config.profile)
    return any(r.config_key in wanted and r.is_current for r in committed)


def sources(profile: str) -> dict[str, str]:
    """Hashes of what draws a profile's pictures, records aside.

    Returns:
        Under ``"code"`` that of code, notebooks and settings; of each corpus that of its store,
        empty where there is none yet.
    """
    digest = hashlib.sha256()
    base = RunConfig.from_profile(profile)
    files = [p for p in (ROOT / "conki_lib").rglob("*") if p.suffix in (".py", ".html")]
    files += (ROOT / "results" / "reported").glob("*.csv")
    for path in (*sorted(files), ROOT / "docs" / "audit.yml", EQUAL_CODE):
        digest.update(path.read_bytes() if path.is_file() else b"")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        try:
            cells = [cell["source"] for cell in json.loads(path.read_text())["cells"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no notebook ({error}): restore it by git") from None
        digest.update(json.dumps(cells).encode())
    digest.update(json.dumps(base.flat(), sort_keys=True).encode())
    found = {"code": digest.hexdigest()}
    for name in filter(None, (base.data.target, base.data.external)):
        path = corpus_path(name) / "info.json"
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def state(profile: str) -> str:
    """Hash of what a profile's tables and figures are made from: `sources` and the records."""
    digest = hashlib.sha256(json.dumps(sources(profile)).encode())
    digest.update(" ".join(record.key for record in local_records(profile)).encode())
    merged = results_dir(profile) / "records.jsonl"
    digest.update(merged.read_bytes() if merged.is_file() else b"")
    return digest.hexdigest()


def agree(
    profile: str, jobs: Path, finished: Mapping[str, bool], *, drawing: Collection[str],
    of_data: Iterable[str], of_runs: Iterable[str],
) -> None:  # fmt: skip
    """Make a pipeline's markers say what is true.

    Args:
        profile: name of a profile.
        jobs: folder of the markers; ``merge`` and ``sources`` in it hold what was current when
            the records were merged, and when a pipeline began. A corpus that was not there then
            was fetched by that pipeline, before it drew anything.
        finished: marker of each corpus and run -> is it there, for today's code?
        drawing: those of them whose notebooks draw figures, too: a finished run is not enough.
        of_data: markers of the notebooks that read no run.
        of_runs: markers of the notebooks that read all records.
    """
    jobs.mkdir(parents=True, exist_ok=True)
    now = sources(profile)
    before: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):  # there is none, or another version wrote it
        before = dict(json.loads((jobs / "sources").read_text()))
    drawn = all(before.get(name) in (held, "") for name, held in now.items())
    for path, is_there in finished.items():
        if not is_there or (path in drawing and not drawn):
            Path(path).unlink(missing_ok=True)
        elif path not in drawing and not Path(path).exists():
            Path(path).touch()  # the time of an earlier one says what was made after it
    stale = [] if drawn else list(of_data)
    merged = jobs / "merge"
    if not (merged.is_file() and merged.read_text().strip() == state(profile)):
        stale += [str(merged), *of_runs]
    for path in stale:
        Path(path).unlink(missing_ok=True)
    write_text(jobs / "sources", json.dumps(now) + "\n")


def lock(profile: str) -> list[int]:
    """Lock a profile for this process; the kernel frees the locks when the process ends.

    Locked are the folder of runs, which two projects may share, and the project's results, which
    serve several folders of runs.

    Returns:
        The open files that hold the locks; they survive ``exec``.

    Raises:
        RuntimeError: another pipeline works on it; names its process.
        DiskError: a folder cannot be written.
    """
    held: list[int] = []
    places = {
        runs_dir(profile).parent: "free some space, or name another folder by CONKI_RUNS=...",
        results_dir(profile).parent: "free some space, or make it writable",
    }
    try:
        for folder, way_out in places.items():
            with explained("the lock of a pipeline", folder, way_out):
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f".{profile}.pipeline.lock"
                held.append(os.open(path, os.O_RDWR | os.O_CREAT))
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file, (folder, way_out) in zip(held, places.items(), strict=True):
            with explained("the lock of a pipeline", folder, way_out):
                os.truncate(file, 0)
                os.pwrite(file, str(os.getpid()).encode(), 0)
            os.set_inheritable(file, True)
    except BaseException as error:
        holder = os.read(held[-1], 20).decode() if held else ""
        release(held)
        if not isinstance(error, BlockingIOError):
            raise
        raise RuntimeError(
            f"another pipeline (process {holder or 'unknown'}) works on {profile!r} in {folder}: "
            "wait until it has ended, or work in a clone of your own"
        ) from None
    os.environ[_HOLDER] = str(os.getpid())
    return held


def release(held: Iterable[int]) -> None:
    """Give the locks of `lock` back before the process ends."""
    for file in held:
        os.close(file)


def hold(profile: str, *, needed: bool) -> bool:
    """Lock a profile, unless this very process holds it since before ``exec``.

    Args:
        profile: name of a profile.
        needed: raise where another pipeline works on it; else only say no.

    Returns:
        Whether this process holds the locks.

    Raises:
        RuntimeError, DiskError: see `lock`; only where `needed`.
    """
    if os.environ.get(_HOLDER) == str(os.getpid()):
        return True
    try:
        lock(profile)
    except (RuntimeError, OSError):
        if needed:
            raise
        return False
    return True


def only_plans(arguments: Sequence[str]) -> bool:
    """Do these arguments of Snakemake ask for a plan alone: ``-n``, ``-np``, ``--dry-run``?"""
    flags = "[npkfF]*"  # those of one letter that take no value
    return any(re.fullmatch(f"-{flags}n{flags}|--dry-?run", word) for word in arguments)


def command(
    profile: str, *, rows: str = "", seeds: str = "", folds: str = "", cores: int = 2,
    extra: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """The Snakemake call of one pipeline; empty rows, seeds and folds are left to the Snakefile."""
    given = {"profile": profile, "rows": rows, "seeds": seeds, "folds": folds}
    # jobs of half the threads, side by side, end sooner than one after the other with all
    given["threads"] = str(max(1, cores // 2))
    settings = [f"{name}={value!r}" for name, value in given.items() if value]
    start = [sys.executable, "-m", "snakemake", "--directory", str(ROOT)]
    start += ["--snakefile", str(ROOT / "Snakefile"), "--nolock", "--cores", str(cores)]
    return [*start, *extra, "--config", *settings]


def start(profile: str, *, fresh: bool = False, extra: Sequence[str] = (), **options) -> NoReturn:
    """Become the Snakemake process that runs a profile's pipeline.

    Args:
        profile: ``configs/<profile>.yml``.
        fresh: begin anew (see `conki_lib.anew`), once Snakemake could make its plan.
        extra: further arguments for Snakemake, such as targets or ``--dry-run``.
        **options: `rows`, `seeds`, `folds` and `cores` of `command`.

    Raises:
        FileNotFoundError: no such profile.
        RuntimeError: another process works on this profile.
        ValueError: no such row, no seeds, no folds, `extra` that Snakemake does not take, or
            ``--config`` in it, which would replace all other settings.
    """
    parse_rows(options.get("rows", ""), profile)
    parse_seeds(options.get("seeds") or "1")
    parse_folds(options.get("folds", ""), profile)
    if any(re.match("--config(=|$)|-C", word) for word in extra):
        raise ValueError("--config is taken: call `snakemake --cores 2 --config ...` itself")
    arguments = command(profile, extra=extra, **options)
    if only_plans(extra) and fresh:
        sys.exit(_anew(profile, arguments).returncode)
    if not only_plans(extra):
        lock(profile)
        if fresh:
            plan = command(profile, extra=[*extra, "--dry-run"], **options)
            _check(_anew(profile, plan, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        if fresh or anew.is_interrupted(profile):
            print(anew.begin(profile), flush=True)
    os.execv(arguments[0], arguments)


def _anew(profile: str, plan: Sequence[str], **streams: int) -> subprocess.CompletedProcess:
    """Let Snakemake make a plan where a profile was begun anew and nothing is finished yet."""
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / anew.mark(profile).name).touch()
        environment = os.environ | {"CONKI_RUNS": empty}
        return subprocess.run(plan, env=environment, text=True, check=False, **streams)


def _check(plan: subprocess.CompletedProcess) -> None:
    if plan.returncode:
        said = "\n".join(plan.stdout.strip().splitlines()[-5:])
        raise ValueError(f"nothing was moved, since Snakemake has no plan:\n{said}")


def summary(profile: str) -> tuple[pd.DataFrame, list[str]]:
    """The test row of every run that the tables count, and the files of tables and figures.

    Returns:
        One line per variant, fold and seed; paths relative to the project root.

    Raises:
        FileNotFoundError: no such profile, or it has no runs.
    """
    from conki_lib.ablation import runs_of

    read_profile(profile)
    rows = [
        {"variant": r.variant, "fold": r.fold, "seed": r.seed, "epoch": r.best_epoch}
        | {"precision": r.settings.get("precision", "")}
        | {name: round(value, 4) for name, value in r.metrics.get("test", {}).items()}
        | {"code": "current" if r.is_current else "older"}
        for fold in sorted({record.fold for record in load_records(profile)})
        for r in runs_of(profile, fold=fold)
    ]
    if not rows:
        raise FileNotFoundError(f"no runs of {profile!r} yet: `make reproduce PROFILE={profile}`")
    folders = (results_dir(profile), ROOT / "figures" / profile)
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return pd.DataFrame(rows), [str(path.relative_to(ROOT)) for path in files]


def machine() -> dict[str, str]:
    """What is installed, and which device and precision a run would have here."""
    import torch

    from conki_lib.fitting import chosen_precision

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
        device = f"cpu, {threads} threads, {capability}"
    auto = chosen_precision(RuntimeConfig(precision="auto"))
    bf16 = "bf16" if auto == "bf16" else "bf16 (slow: no instructions for it here)"
    return {
        **{name: str(value) for name, value in provenance()["versions"].items()},
        "device": device,
        "precision": f"fp32, fp32-fast, {bf16}; auto means {auto}",
        "project": str(ROOT),
    }
