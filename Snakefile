"""The one definition of the pipeline: fetch -> stage 1 -> variants x seeds -> tables -> figures.

    conki pipeline --profile mosi-open --cores 2            # what `make reproduce` calls
    conki pipeline --rows all --seeds 5                     # what `make ablation` calls
    snakemake --workflow-profile profiles/slurm --config profile=mosi     # the same on a cluster
    snakemake --cores 2 --config conki=true      # every job, but none does anything: a rehearsal

Every job executes a notebook. What is finished is decided by the records (and, for tables and
figures, by what they are made from): when this file is read, the markers in runs/<profile>/.jobs/
are put in agreement with that. Delete them whenever you like. After a kill only what had not ended
is done again. A rehearsal has markers of its own.
"""

import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from conki_lib import ablation, anew, pipeline
from conki_lib.config import ROOT, RunConfig
from conki_lib.records import runs_dir, slug

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of `conki`
PROFILE = str(config.get("profile", RunConfig().profile))
CONKI = str(config.get("conki", "conki"))  # what every job calls; `true` does nothing, at once
BASE = RunConfig.from_profile(PROFILE)
FOLDS = pipeline.parse_folds(str(config.get("folds", "")), PROFILE)
SEEDS = pipeline.parse_seeds(str(config.get("seeds", 1)))
ROWS = pipeline.parse_rows(str(config.get("rows", "")), PROFILE)
# the default profile and one begun anew train; others show committed records by today's code
IS_DEFAULT = PROFILE == RunConfig().profile
TRAINS = IS_DEFAULT or anew.is_begun(PROFILE)
VARIANTS = {slug(row): row for row in ROWS}

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
STAGE_1 = next((stem for stem in NOTEBOOKS if stem.startswith("03_")), "03_adapter_pretraining")
STAGE_2 = next((stem for stem in NOTEBOOKS if stem.startswith("04_")), "04_finetuning")
# they read no run: 01, and 02, which needs no corpus: its pictures are the default profile's
OF_DATA = [stem for stem in NOTEBOOKS
           if stem < STAGE_1 and (IS_DEFAULT or not stem.startswith("02_"))]  # fmt: skip
OF_RUNS = [stem for stem in NOTEBOOKS if stem > STAGE_2]
LONGEST = [stem for stem in OF_RUNS if stem.startswith(("05_", "06_"))]  # begin first
THREADS = int(config.get("threads", 4))  # of a job that trains

RUNS = Path(os.path.relpath(runs_dir(PROFILE).parent))
JOBS = RUNS / PROFILE / (".jobs" if CONKI == "conki" else ".rehearsal")
EXECUTED = RUNS / "notebooks" / PROFILE
CORPORA = [name for name in (BASE.data.target, BASE.data.external) if name]
CONFIGS = {
    (name, seed, fold): ablation.configure(PROFILE, row, seed, fold=fold)
    for name, row in VARIANTS.items() for seed in SEEDS for fold in FOLDS
}  # fmt: skip
STORES = [str(JOBS / f"data-{name}") for name in CORPORA]
STAGE_1_SEEDS = SEEDS if BASE.data.external else []


def marker(*parts):
    return str(JOBS / "-".join(map(str, parts)))


def any_of(words):
    return "|".join(map(re.escape, words)) or "none"


def is_committed(chosen, stage):
    return not TRAINS and pipeline.is_committed(chosen, stage)


def is_done(chosen, stage):
    return pipeline.is_finished(chosen, stage) or is_committed(chosen, stage)


def training(chosen, stage):
    """What a notebook is told where only a committed record answers: show it."""
    shown = is_committed(chosen, stage) and not pipeline.is_finished(chosen, stage)
    return "-p train=false" if shown else ""


def shares_stage_1(name, seed, fold):
    full = ablation.configure(PROFILE, "full", seed, fold=fold)
    chosen = CONFIGS[name, seed, fold]
    return chosen.data.external is not None and chosen.identity(1) == full.identity(1)


def needs(wildcards):
    """Stage 1, where it is shared, and the rows that `full` shows beside itself.

    On one machine, a row that trains does not wait for stage 1, nor `full` for w/o C4: who comes
    first trains them, too, and the others wait for that. Notebook 03 follows when a core is free.
    A row that is only shown needs no stage 1.
    """
    name, seed, fold = wildcards.name, int(wildcards.seed), wildcards.fold
    found = []
    trains = not training(CONFIGS[name, seed, fold], 2)
    if trains and not workflow.local_exec and shares_stage_1(name, seed, fold):
        found += [ancient(marker("stage1", f"s{seed}"))]
    if name == "full":
        side_by_side = trains and workflow.local_exec
        beside = ("text-only",) if side_by_side else ("text-only", "wo-C4")
        found += [marker(other, f"s{seed}", fold) for other in beside if other in VARIANTS]
    return found


def agree():
    """Make the markers say what is true; see `pipeline.agree`."""
    truth = {marker("data", name): pipeline.is_fetched(name) for name in CORPORA}
    truth |= {marker("stage1", f"s{seed}"): is_done(
        ablation.configure(PROFILE, "full", seed), 1) for seed in STAGE_1_SEEDS}  # fmt: skip
    truth |= {
        marker(name, f"s{seed}", fold): is_done(chosen, 2)
        for (name, seed, fold), chosen in CONFIGS.items()
    }
    usual = f"s{BASE.runtime.seed}"  # notebooks 03 and 04 draw for this seed and fold alone
    drawing = {marker("stage1", usual), marker("full", usual, BASE.data.fold)}
    of_data, of_runs = map(marker, OF_DATA), map(marker, OF_RUNS)
    pipeline.agree(PROFILE, JOBS, truth, drawing=drawing, of_data=of_data, of_runs=of_runs)


STAGES_1 = {seed: marker("stage1", f"s{seed}") for seed in STAGE_1_SEEDS}
STAGES_2 = [marker(name, f"s{seed}", fold) for name, seed, fold in CONFIGS]
TRAINED = [*STAGES_1.values(), *STAGES_2]


def comes_along(seed):
    """Is a stage 1 there once all runs of stage 2 have ended, before notebook 03 has shown it?"""
    return is_done(ablation.configure(PROFILE, "full", seed), 1) or any(
        s == seed and shares_stage_1(name, s, fold) and not is_done(chosen, 2)
        for (name, s, fold), chosen in CONFIGS.items()
    )


def recorded(wildcards):
    """What `merge` needs; found out for its own job alone, since that takes time per seed."""
    return STAGES_2 + [path for seed, path in STAGES_1.items() if not comes_along(seed)]


def end_anew():
    """What FRESH=1 began has ended when all runs are trained, whatever this call was asked for."""
    if CONKI == "conki" and all(Path(path).exists() for path in TRAINED):
        anew.end(PROFILE)


if workflow.is_main_process:
    works = not pipeline.only_plans(sys.argv)
    try:  # also where Snakemake was called directly; a plan made beside a pipeline changes nothing
        if pipeline.hold(PROFILE, needed=works):
            agree()
            if works:
                end_anew()  # as when it was killed after its last job
    except (RuntimeError, OSError, ValueError) as error:
        raise WorkflowError(str(error)) from None


onsuccess:
    end_anew()


localrules: all, train, merge, index


rule all:
    input:
        TRAINED,
        marker("index"),


rule train:  # named one by one: a merge that is up to date would hide runs that it never held
    input:
        TRAINED,
        marker("merge"),


rule fetch:
    output:
        touch(marker("data", "{corpus}")),
    wildcard_constraints:
        corpus=any_of(CORPORA),
    resources:
        mem_mb=4000, runtime=60,
    shell:
        "{CONKI} fetch {wildcards.corpus}"


rule stage_1:
    input:
        ancient(STORES),
    output:
        touch(marker("stage1", "s{seed}")),
    wildcard_constraints:
        seed=r"\d+",
    params:
        train=lambda w: training(ablation.configure(PROFILE, "full", int(w.seed)), 1),
        out=str(EXECUTED / f"{STAGE_1}-s{{seed}}.ipynb"),
    threads: THREADS
    resources:
        mem_mb=8000, runtime=240,
    shell:
        "{CONKI} run {STAGE_1} --profile {PROFILE} -p seed={wildcards.seed}"
        " {params.train} -o {params.out:q}"


rule variant:  # the notebooks on the data come before it: it would wait for stage 1, they do not
    input:
        needs,
        stores=ancient(STORES),
    output:
        touch(marker("{name}", "s{seed}", "{fold}")),
    wildcard_constraints:
        name=any_of(name for name in VARIANTS if name != "full"), seed=r"\d+", fold=r"[\w.-]+",
    params:
        train=lambda w: training(CONFIGS[w.name, int(w.seed), w.fold], 2),
        variant=lambda w: shlex.quote(f"variant={VARIANTS[w.name]}"),
        out=str(EXECUTED / f"{STAGE_2}-{{name}}-s{{seed}}-{{fold}}.ipynb"),
    threads: THREADS
    priority: 1
    resources:
        mem_mb=8000, runtime=480,
    shell:
        "{CONKI} run {STAGE_2} --profile {PROFILE} -p {params.variant} -p seed={wildcards.seed}"
        " -p fold={wildcards.fold} {params.train} -o {params.out:q}"


use rule variant as full with:  # begins first, or after text-only: others share its stage 1
    wildcard_constraints:
        name=any_of(name for name in VARIANTS if name == "full"), seed=r"\d+", fold=r"[\w.-]+",
    priority: 3


rule merge:
    input:
        recorded,
    output:
        marker("merge"),  # says what the reports are made from
    priority: 3
    shell:
        "{CONKI} merge {PROFILE} --state > {output:q}"


rule report:
    input:
        lambda w: ancient(STORES) if w.stem in OF_DATA else marker("merge"),
    output:
        touch(marker("{stem}")),
    wildcard_constraints:
        stem=any_of(stem for stem in OF_DATA + OF_RUNS if stem not in LONGEST),
    params:
        out=str(EXECUTED / "{stem}.ipynb"),
    priority: 2
    resources:
        mem_mb=4000, runtime=60,
    shell:
        "{CONKI} run {wildcards.stem} --profile {PROFILE} -o {params.out:q}"


use rule report as longest_report with:
    wildcard_constraints:
        stem=any_of(LONGEST),
    priority: 3


rule index:  # notebooks draw side by side: the list of figures is written when all have ended
    input:
        TRAINED,
        [marker(stem) for stem in OF_DATA + OF_RUNS],
    output:
        touch(marker("index")),
    shell:
        "{CONKI} index"
