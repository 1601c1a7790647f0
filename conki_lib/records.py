"""Run directories, provenance and the committed record of every run.

A run is identified by its settings, the fingerprints of its data and a hash of the code that
determines results. While it works it lives in ``runs/<profile>/<stage or variant>-s<seed>-<key>/``;
a finished one holds ``record.json``, written last. `merge` collects finished runs into
``results/<profile>/``, which is committed.
"""

import ast
import hashlib
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from filelock import FileLock

from conki_lib.config import ROOT, Precision, RunConfig
from conki_lib.disk import in_one_step, make_writable

# what determines results; how a store was made is covered by the fingerprint of the data
RESULT_MODULES = (
    "config", "pairs", "losses", "tiles", "metrics", "encoders", "adapters", "model", "baselines",
    "states", "fitting", "training", "data/store", "data/batch",
)  # fmt: skip
EQUAL_CODE = ROOT / "results" / "equal_code.json"  # hashes of code shown to do the same
PREDICTION_COLUMNS = ["fold", "variant", "seed", "split", "id", "y", "y_hat"]


@dataclass(frozen=True)
class Record:
    """What one finished run left; equal runs are equal, `provenance` and `folder` aside."""

    stage: int
    profile: str
    variant: str
    fold: str
    seed: int
    key: str
    config_key: str
    settings: dict[str, Any]
    data: dict[str, str]
    code: str
    metrics: dict[str, dict[str, float]]
    best_epoch: int
    history: list[dict]
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)
    folder: Path | None = field(default=None, compare=False)

    @property
    def config(self) -> RunConfig:
        """The run's configuration, checked against today's settings."""
        return RunConfig(**self.settings)

    @property
    def is_current(self) -> bool:
        """Was the run made by the code as it stands now, or by code shown to do the same?"""
        if self.code == code_hash():
            return True
        alone = self.provenance.get("processes", 1) == 1  # no more was compared
        return alone and self.code in equal_codes()

    def repeats(self, other: "Record") -> bool:
        """Did an equal configuration give the same again, be it by code shown to do the same?"""
        same = ("config_key", "metrics", "best_epoch", "history")
        return other.is_current and all(getattr(self, x) == getattr(other, x) for x in same)

    @property
    def rank(self) -> tuple[bool, bool, str]:
        """Which of several answers a configuration: today's code first, then local, then newest."""
        return self.is_current, self.folder is not None, self.provenance.get("finished", "")

    @property
    def model_path(self) -> Path | None:
        """The trained weights, where they are on this machine (they are never committed)."""
        path = self.folder / "model.safetensors" if self.folder else None
        return path if path and path.is_file() else None

    def to_json(self) -> str:
        """One line; not-a-number becomes null."""
        values = asdict(self) | {"folder": None}
        return json.dumps(_plain(values), sort_keys=True)

    @classmethod
    def from_json(cls, line: str, folder: Path | None = None) -> "Record":
        """Read `to_json`'s line back."""
        values = json.loads(line) | {"folder": folder}
        for split, metrics in values["metrics"].items():
            values["metrics"][split] = {k: math.nan if v is None else v for k, v in metrics.items()}
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- where things are ---------------------------------------------------------------------------


def runs_dir(profile: str) -> Path:
    """Working directory of a profile's runs: ``$CONKI_RUNS`` (default ``runs/``) / profile."""
    if Path(profile).name != profile:
        raise ValueError(f"profile {profile!r}: put its YAML into configs/ and give its bare name")
    return ROOT / (os.environ.get("CONKI_RUNS") or "runs") / profile


def results_dir(profile: str) -> Path:
    """Committed records, predictions and figure data of a profile."""
    return ROOT / "results" / profile


def slug(variant: str) -> str:
    """A variant's name on disk: ``"w/o N1"`` becomes ``"wo-N1"``."""
    return re.sub(r"[^\w.=+]+", "-", variant.replace("w/o", "wo")).strip("-")


# ---- identity -----------------------------------------------------------------------------------


def _essence(tree: Any) -> Any:
    """A syntax tree as nested lists, alike in every version of Python.

    Fields that are empty are left out, since versions add some; so are docstrings and the
    descriptions of settings.
    """
    if isinstance(tree, list):
        return [_essence(part) for part in tree if not _is_words(part)]
    if not isinstance(tree, ast.AST):
        return repr(tree)
    fields = ((name, value) for name, value in ast.iter_fields(tree) if value not in (None, []))
    return [type(tree).__name__, *([name, _essence(value)] for name, value in fields)]


def _is_words(part: Any) -> bool:
    """A string that stands alone, or a ``description=``."""
    if isinstance(part, ast.keyword):
        return part.arg == "description"
    return isinstance(part, ast.Expr) and isinstance(getattr(part.value, "value", None), str)


@cache
def code_hash() -> str:
    """Hash of the code that determines results; docstrings, comments and descriptions aside."""
    package = Path(__file__).parent
    paths = (package / f"{module}.py" for module in RESULT_MODULES)
    return _digest([[p.stem, _essence(ast.parse(p.read_text()))] for p in paths if p.is_file()])


def equal_codes() -> frozenset[str]:
    """Hashes of the code as it is and of code that gave the same results, to the bit.

    `EQUAL_CODE` says which: pairs of hashes, written by bench/equal_code.py after it ran both on
    one processor.
    """
    return _equal_to(code_hash(), EQUAL_CODE)


@cache
def _equal_to(code: str, path: Path) -> frozenset[str]:
    found, shown = {code}, json.loads(path.read_text()) if path.is_file() else []
    pairs = [{pair["earlier"], pair["code"]} for pair in shown]
    while more := [pair for pair in pairs if pair & found and not pair <= found]:
        found = found.union(*more)
    return frozenset(found)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def config_key(config: RunConfig, stage: int) -> str:
    """Hash of the settings that determine a stage's result; input widths follow from the data."""
    identity = config.identity(stage)
    identity["model"] = {k: v for k, v in identity["model"].items() if k != "widths"}
    return _digest({"stage": stage, **identity})


def answers(config: RunConfig) -> list[RunConfig]:
    """The configurations whose runs answer one: with ``precision: auto`` those of every precision.

    What automatic means differs by machine; the pipeline does not repeat a finished run for that.
    """
    if config.runtime.precision != "auto":
        return [config]
    return [config.replace(precision=name) for name in get_args(Precision)]


def run_key(config: RunConfig, stage: int, data: dict[str, str]) -> str:
    """Hash of settings, data fingerprints and code: equal keys, equal results."""
    return _digest([config_key(config, stage), data, code_hash()])


def run_folder(config: RunConfig, stage: int, data: dict[str, str]) -> Path:
    """The folder of one run; it need not exist."""
    name = "stage1" if stage == 1 else slug(config.variant)
    key = run_key(config, stage, data)
    found = sorted(runs_dir(config.profile).glob(f"*-{key}"))
    return found[0] if found else runs_dir(config.profile) / f"{name}-s{config.runtime.seed}-{key}"


def results_lock(name: str) -> FileLock:
    """One process at a time reads and writes what several folders of runs or profiles share."""
    make_writable("results", ROOT / "results", "free some space, or make it writable")
    return FileLock(ROOT / "results" / f".{name}.lock")


def run_lock(folder: Path) -> FileLock:
    """One process at a time works in a run's folder; others wait, then load what it made."""
    make_writable("a run", folder.parent, "free some space, or name another folder by CONKI_RUNS")
    return FileLock(folder.with_name(f"{folder.name}.lock"))  # lam=0.1 has a dot


# ---- reading and writing ------------------------------------------------------------------------


def write_text(path: Path, text: str) -> Path:
    """Write a text in one step."""
    with in_one_step(path) as partial:
        partial.write_text(text)
    return path


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a parquet file in one step."""
    with in_one_step(path) as partial:
        table.to_parquet(partial, index=False)
    return path


def _read(path: Path, folder: Path | None = None) -> list[Record]:
    """The records of a file, one a line; a file that is not there has none.

    Raises:
        ValueError: a line is no record; names file, line and way out.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), start=1):
        try:
            found.append(Record.from_json(line, folder))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            way_out = "remove the folder, to run it anew" if folder else "restore it by git"
            raise ValueError(
                f"{path}, line {number}, is no record ({type(error).__name__}: {error}): {way_out}"
            ) from None
    return found


def load_run(folder: Path) -> Record | None:
    """The record of a finished run's folder, or None."""
    return next(iter(_read(folder / "record.json", folder)), None)


def local_records(profile: str) -> list[Record]:
    """Finished runs in the working directory, with their weights."""
    found = [load_run(path.parent) for path in sorted(runs_dir(profile).glob("*/record.json"))]
    return [record for record in found if record]


def committed_records(profile: str, *, tuning: bool = False) -> list[Record]:
    """The records of ``results/<profile>/``, whatever code made them."""
    path = results_dir(profile) / ("tuning.jsonl" if tuning else "records.jsonl")
    if not path.is_file():
        return []
    found = path.stat()  # a file that is written in one step is another one
    return list(_committed(path, (found.st_ino, found.st_mtime_ns)))


@lru_cache(maxsize=4)
def _committed(path: Path, which: tuple[int, int]) -> list[Record]:
    """Hundreds of records are asked for again and again: read once, until the file changes."""
    return _read(path)


def load_records(profile: str) -> list[Record]:
    """Local and committed records, one per configuration: today's code first, then the newest."""
    return _best([*committed_records(profile), *local_records(profile)])


def find_record(config: RunConfig, stage: int = 2) -> Record | None:
    """The record that answers a configuration, of any code version; `Record.is_current` tells.

    ``precision: auto`` is answered by every precision; of several the first by `Record.rank`.
    """
    wanted = {config_key(answer, stage) for answer in answers(config)}
    matching = [r for r in load_records(config.profile) if r.config_key in wanted]
    return max(matching, key=lambda r: r.rank, default=None)


def _best(records: list[Record]) -> list[Record]:
    """One per configuration, see `Record.rank`; one that repeats another lends it its folder."""
    best: dict[str, Record] = {}
    for record in records:
        held = best.get(record.config_key)
        if held is None or record.rank >= held.rank:
            again = held is not None and record.folder and record.repeats(held)
            best[record.config_key] = replace(held, folder=record.folder) if again else record
    return sorted(best.values(), key=lambda r: (r.stage, r.variant, r.fold, r.seed, r.config_key))


def merge(profile: str) -> Path:
    """Collect finished local runs into ``results/<profile>/``; nothing committed is lost.

    A committed record stays, provenance included, where an equal run was made again. Tuning runs
    go to ``tuning.jsonl`` and never to the predictions.

    Returns:
        The path of ``records.jsonl``.
    """
    target = results_dir(profile)
    if not (target.is_dir() or runs_dir(profile).is_dir()):
        return target / "records.jsonl"
    with results_lock(profile):
        local = local_records(profile)
        tuning = [r for r in local if r.settings["tuning"]]
        final = [r for r in local if r.stage == 1 or not r.settings["tuning"]]
        if tuning:
            tuning = _best([*committed_records(profile, tuning=True), *tuning])
            _write_records(target / "tuning.jsonl", tuning)
        path = target / "records.jsonl"
        if final or path.is_file():
            kept = _best([*committed_records(profile), *final])
            tables = _predictions_of(profile, [r for r in kept if r.stage == 2])
            _write_records(path, kept)
            if tables:
                table = pd.concat(tables, ignore_index=True)[["key", *PREDICTION_COLUMNS]]
                write_table(target / "predictions.parquet", table)
    return path


def _write_records(path: Path, kept: list[Record]) -> None:
    write_text(path, "".join(record.to_json() + "\n" for record in kept))


def _predictions_of(profile: str, kept: list[Record]) -> list[pd.DataFrame]:
    """The predictions of some runs, from their folders or from what is committed."""
    old, parts = _committed_predictions(profile), []
    for record in kept:
        if record.folder:
            parts.append(_run_predictions(record))
        elif old is not None:
            parts.append(old[old["key"] == record.key])
    return parts


def _committed_predictions(profile: str) -> pd.DataFrame | None:
    path = results_dir(profile) / "predictions.parquet"
    return _read_table(path, "restore it by git") if path.is_file() else None


def _run_predictions(record: Record) -> pd.DataFrame:
    path = record.folder / "predictions.parquet"
    return _read_table(path, "remove its folder, to run it anew").assign(key=record.key)


def _read_table(path: Path, way_out: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {way_out}") from error


def predictions(profile: str) -> pd.DataFrame:
    """All predictions of a profile: key, fold, variant, seed, split, id, y, y_hat."""
    committed = _committed_predictions(profile)
    frames = [] if committed is None else [committed]
    for record in local_records(profile):
        if record.stage == 2 and not record.settings["tuning"]:
            if committed is None or record.key not in set(committed["key"]):
                frames.append(_run_predictions(record))
    if not frames:
        raise FileNotFoundError(
            f"no predictions for {profile!r}: run `make reproduce PROFILE={profile}`"
        )
    return pd.concat(frames, ignore_index=True)[["key", *PREDICTION_COLUMNS]]


# ---- provenance ---------------------------------------------------------------------------------


@cache
def _git() -> dict[str, Any]:
    def ask(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD") or None,
            "dirty": bool(ask("status", "--porcelain")),
        }
    except OSError:
        return {"commit": None, "dirty": None}


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def provenance() -> dict[str, Any]:
    """What may differ between equal runs: versions, machine, memory (MB), git."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform != "darwin" else 2**20
    )
    return {"versions": _versions(), "git": _git(), "peak_memory_mb": round(peak),
            "platform": f"{platform.system()} {platform.machine()}"}  # fmt: skip
