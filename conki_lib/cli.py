"""The `conki` command: thin wrappers around the library, no logic of their own."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

# libraries are imported inside the commands: `conki --help` answers at once


class _Commands(TyperGroup):
    """Errors that name their way out are printed without a traceback; CONKI_DEBUG=1 shows it.

    A reader that has seen enough, as in ``conki doctor | head -1``, is none: Typer ends quietly.
    """

    def invoke(self, ctx: Any) -> Any:
        for name in ("CONKI_DATA", "CONKI_MIRROR", "CONKI_RUNS"):
            if os.environ.get(name):  # notebooks and Snakemake work in another folder
                os.environ[name] = os.path.abspath(os.environ[name])
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, RuntimeError, ArithmeticError, yaml.YAMLError) as error:
            if os.environ.get("CONKI_DEBUG") or isinstance(error, typer.Exit | BrokenPipeError):
                raise
            typer.secho(f"Error: {_in_words(error)}", fg="red", err=True)
            raise typer.Exit(1) from None


Folds = Annotated[Path | None, typer.Option(help="of .csd: JSON, video ids per split")]
Roles = Annotated[list[str] | None, typer.Option(help="of .csd: v=FILE and so on, repeatable")]

app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="an open corpus; `conki doctor` lists them")],
    root: Annotated[Path | None, typer.Option(help="default: $CONKI_DATA, else data/")] = None,
) -> None:
    """Download or build a corpus, verify it, convert it; nothing is done twice."""
    from conki_lib.data import fetch

    typer.echo(fetch(name, root))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="MMSA pickle, or folder of .csd files")],
    destination: Annotated[Path, typer.Argument(help="folder of the new store")],
    name: Annotated[str | None, typer.Option(help="of the corpus; default: guessed")] = None,
    format: Annotated[str | None, typer.Option(help="default: recognised by content")] = None,
    language: Annotated[str | None, typer.Option(help="en, zh; default: guessed")] = None,
    label_range: Annotated[
        tuple[float, float] | None, typer.Option(help="lowest and highest label")
    ] = None,
    folds: Folds = None,
    role: Roles = None,
    number_duplicates: Annotated[
        bool, typer.Option("--number-duplicates", help="of one split; default: an error")
    ] = False,
) -> None:
    """Convert a published file to a store."""
    from conki_lib.data import convert

    options = {"name": name, "format": format, "language": language, "label_range": label_range}
    options |= _of_csd(folds, role) | {"number_duplicates": number_duplicates}
    typer.echo(convert(source, destination, **options))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="any data file, or a store")],
    folds: Folds = None,
    role: Roles = None,
) -> None:
    """Say what a file or folder holds, without unpickling anything that could do harm."""
    from conki_lib.data.formats import inspect_path

    _show(inspect_path(path, **_of_csd(folds, role)))


def _of_csd(folds: Path | None, role: list[str] | None) -> dict[str, Any]:
    return {"folds": folds, "roles": dict(r.partition("=")[::2] for r in role) if role else None}


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="path, or stem: 04_finetuning")],
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", help="name=value, as often as needed")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="configs/<profile>.yml")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="executed notebook")] = None,
) -> None:
    """Execute a notebook headlessly; unknown or ill-typed parameters are errors."""
    from conki_lib.notebook import run_notebook

    typer.echo(run_notebook(notebook, profile=profile, assignments=parameter or (), output=output))


@app.command()
def train(
    profile: Annotated[str, typer.Option(help="configs/<profile>.yml")] = "synthetic",
    variant: Annotated[str, typer.Option(help="row of the tables")] = "full",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    fold: Annotated[str | None, typer.Option(help="default: the profile's")] = None,
) -> None:
    """Run or load one row without a notebook; several processes: see the README."""
    from conki_lib.ablation import configure
    from conki_lib.fitting import is_main
    from conki_lib.training import fine_tune

    record = fine_tune(configure(profile, variant, seed, fold=fold))
    if is_main():
        _show([{"split": split, **found} for split, found in record.metrics.items()])


@app.command()
def merge(
    profile: Annotated[str, typer.Argument(help="configs/<profile>.yml")],
    state: Annotated[bool, typer.Option("--state", help="print a hash of what is there")] = False,
) -> None:
    """Collect finished runs into results/<profile>/."""
    from conki_lib import config, pipeline, records

    config.read_profile(profile)
    path = records.merge(profile)
    typer.echo(pipeline.state(profile) if state else path)


@app.command()
def index() -> None:
    """List all figures in figures/README.md."""
    from conki_lib.config import ROOT
    from conki_lib.plots.index import figure_index
    from conki_lib.records import results_lock, write_text

    with results_lock("index"):
        typer.echo(write_text(ROOT / "figures" / "README.md", figure_index()))


@app.command(context_settings={"ignore_unknown_options": True})
def pipeline(
    extra: Annotated[list[str] | None, typer.Argument(help="passed on to Snakemake")] = None,
    profile: Annotated[str, typer.Option(help="configs/<profile>.yml")] = "synthetic",
    rows: Annotated[str, typer.Option(help="'full,w/o N1', all or switches; default: a few")] = "",
    seeds: Annotated[str, typer.Option(help="3: the first three; 0,4,7: these; 2-5")] = "",
    folds: Annotated[str, typer.Option(help="'standard,other'; default: the profile's")] = "",
    cores: Annotated[int, typer.Option(min=1)] = 2,
    fresh: Annotated[bool, typer.Option(help="move earlier runs aside and begin anew")] = False,
) -> None:
    """Run the Snakefile under a lock; what is finished stays. Further arguments go to Snakemake."""
    from conki_lib.pipeline import start

    given = dict(rows=rows, seeds=seeds, folds=folds, cores=cores, fresh=fresh)
    start(profile, extra=extra or (), **given)


@app.command()
def results(profile: Annotated[str, typer.Argument(help="configs/<profile>.yml")]) -> None:
    """Print the runs of a profile and where its tables and figures are."""
    from conki_lib.pipeline import summary

    table, files = summary(profile)
    _show(table)
    typer.echo("\n" + "\n".join(files))


@app.command()
def doctor() -> None:
    """Say what is installed, which device and precision there is, and which corpora are here."""
    from conki_lib.config import ModelConfig
    from conki_lib.data.corpora import status
    from conki_lib.disk import data_root
    from conki_lib.encoders import resolve_backbone
    from conki_lib.pipeline import machine

    _show(machine() | {"corpora in": data_root()})
    typer.echo()
    rows = status()
    _show([{name: value for name, value in row.items() if name != "how"} for row in rows])
    typer.echo()
    _show({row["corpus"]: row["how"] for row in rows if row["how"]})
    typer.echo()
    backbone = ModelConfig().text_backbone
    try:
        _show({"text backbone": backbone, "found in": resolve_backbone(backbone)})
    except (OSError, ValueError) as error:
        _show({"text backbone": backbone, "not found": error})


def _in_words(error: Exception) -> str:
    """What an error says; of pydantic's page the settings, their values and what is wrong."""
    if isinstance(error, yaml.YAMLError):
        return f"the profile's YAML cannot be read: {error}"
    if not hasattr(error, "errors"):
        return str(error)
    found = [(".".join(map(str, e["loc"])), e) for e in error.errors()]
    return "; ".join(
        f"{at} cannot be {e['input']!r}: {e['msg']}" if at else e["msg"] for at, e in found
    )


def _show(found: Any) -> None:
    """Print a mapping as lines of 80 columns, rows as a table, anything else as it is."""
    from tabulate import tabulate

    if isinstance(found, Mapping):  # long words are paths, to be copied
        whole = {"break_long_words": False, "break_on_hyphens": False}
        typer.echo(tabulate(found.items(), tablefmt="plain", maxcolwidths=[None, 58], **whole))
    elif isinstance(found, Iterable) and not isinstance(found, str):
        typer.echo(tabulate(found, headers="keys", tablefmt="simple", showindex=False))
    else:
        typer.echo(found)


if __name__ == "__main__":
    app()
