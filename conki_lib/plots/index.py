"""Which notebook drew which figure, as the figures' own files say; needs no drawing library."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from conki_lib.config import ROOT

# figures of corpora, formulas and toys
_NO_RUN = ("01_", "02_", "03_architecture", "07_forms", "07_padding")


def figure_producer(path: Path) -> str | None:
    """Read which notebook wrote a PNG figure; None if it does not say, or is none."""
    try:
        with Image.open(path) as image:
            return image.info.get("Source")
    except UnidentifiedImageError:
        return None


def figure_index(root: Path = ROOT) -> str:
    """The text of ``figures/README.md``: file <- notebook <- run records.

    Args:
        root: of the project; the figures are read, so that the list cannot be wrong.
    """
    said = (
        "Generated: each figure's file names the notebook that wrote it. Each is a PNG and an SVG."
    )
    lines = ["# Figures", "", said, "", "| figure | notebook | run records |", "|---|---|---|"]
    for path in sorted((root / "figures").glob("*/*.png")):
        notebook, profile = figure_producer(path) or "unknown", path.parent.name
        records = f"[results/{profile}/records.jsonl](../results/{profile}/records.jsonl)"
        none = "none: corpora, settings, formulas, toys"
        runs = none if path.stem.startswith(_NO_RUN) else records
        name = f"[{profile}/{path.stem}]({profile}/{path.name})"
        lines.append(f"| {name} | [{notebook}](../notebooks/{notebook}.ipynb) | {runs} |")
    return "\n".join(lines) + "\n"
