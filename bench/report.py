"""What every result names (machine, load, code, day), and where it and its page go."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from conki_lib.records import code_hash

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parents[1]


def machine() -> dict[str, str | int | float]:
    """Facts of this machine and code; call it before the work, since the load is part of them."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "load before the start": round(os.getloadavg()[0], 1),
        "code that determines results": code_hash(),
        "day": date.today().isoformat(),
    }


def processor() -> str:
    """Its name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def facts(result: dict) -> str:
    """The machine of a result, as lines of a page."""
    return "\n".join(f"- {name}: {value}" for name, value in result["machine"].items())


def publish(name: str, result: dict, page: str, figure: "Figure | None" = None) -> None:
    """Write ``results/bench/<name>.json``, and page and figure ``docs/benchmarks/<name>``."""
    for path, text in (
        (HERE / f"results/bench/{name}.json", json.dumps(result, indent=1)),
        (HERE / f"docs/benchmarks/{name}.md", page.rstrip()),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    if figure:
        from conki_lib.plots.style import save_figure

        script = name.removesuffix("_cuda").removesuffix("_fp32")
        save_figure(figure, name, "bench", producer=script, folder=HERE / "docs/benchmarks")


def published(name: str) -> dict:
    """The result as committed."""
    return json.loads((HERE / f"results/bench/{name}.json").read_text())
