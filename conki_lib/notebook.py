"""What notebooks need from their surroundings, and the strict runner that executes them."""

import ast
import inspect
import logging
import os
import re
import sys
import textwrap
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NamedTuple

from IPython.display import Code
from pydantic import TypeAdapter, ValidationError
from traitlets.config import Config

from conki_lib.config import HEADLESS, ROOT, RunConfig, near_names, read_profile, setting_names
from conki_lib.config import headless as headless  # for notebooks
from conki_lib.disk import DiskError, explained, in_one_step, make_writable

# nbformat and papermill are imported where they are used: every kernel loads this module too

NOTEBOOKS = ROOT / "notebooks"
# glibc keeps freed memory: a training step touches the same pages again instead of asking for new
# ones; other allocators ignore it
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
_GO_ON = "free some space, or name another place by -o or CONKI_RUNS"
_SETTINGS = set(setting_names()) - {"profile"}
_SCALARS = {"int": int, "float": float, "str": str, "bool": bool}


class NotebookError(RuntimeError):
    """A notebook stopped; the message names the cell and where its evidence lies."""


class Parameter(NamedTuple):
    """What one line of a parameters cell declares: ``name: type = default  # meaning``."""

    type: Any
    default: Any  # None, too, where it is computed


# ---- inside a notebook --------------------------------------------------------------------------


def show_source(obj: Any) -> Code:
    """Show the source of a function or class as the output of a cell, so that it stays in the file.

    Args:
        obj: a function, method or class of the library.

    Returns:
        The displayed source, dedented.
    """
    source = inspect.getsource(inspect.unwrap(obj))
    return Code(data=textwrap.dedent(source), language="python")


# ---- parameters ---------------------------------------------------------------------------------


def find_notebook(notebook: str | Path) -> Path:
    """Find a notebook by its path, or by its stem in ``notebooks/``: ``"04_finetuning"``.

    Raises:
        FileNotFoundError: no such notebook; lists the known and the near ones.
    """
    for path in (Path(notebook), NOTEBOOKS / f"{notebook}.ipynb"):
        if path.suffix == ".ipynb" and path.is_file():
            return path.resolve()
    known = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    raise FileNotFoundError(
        f"no notebook {str(notebook)!r}{near_names(Path(notebook).stem, known)}: "
        f"known are {', '.join(known) or 'none'} in {NOTEBOOKS}, or give a path"
    )


def notebook_parameters(notebook: str | Path) -> dict[str, Parameter]:
    """Read the parameters that a notebook declares; a default of None allows None.

    Raises:
        ValueError: a declaration without a plain type, which papermill would lose or leave untyped.
    """
    import nbformat

    path = find_notebook(notebook)
    try:
        cells = nbformat.read(path, as_version=4).cells
    except (ValueError, AttributeError, TypeError, nbformat.ValidationError) as error:
        raise ValueError(f"{path} is no notebook: {error}") from None
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    try:
        lines = ast.parse(tagged[0]).body if tagged else []
    except SyntaxError as error:
        raise ValueError(
            f"{path.name}: the parameters cell is no plain Python ({error}); magic and shell lines "
            "belong in other cells"
        ) from None
    declared = {}
    for line in lines:
        match line:
            case ast.AnnAssign(ast.Name(name), ast.Name(kind), ast.expr() as value) if (
                kind in _SCALARS
            ):
                plain = isinstance(value, ast.Constant)
                default = value.value if plain else None
                optional = _SCALARS[kind] | None if plain and default is None else _SCALARS[kind]
                declared[name] = Parameter(optional, default)
            case ast.AnnAssign() | ast.Assign():
                raise ValueError(
                    f"{path.name}: parameter {ast.unparse(line)!r}: write `name: type = default` "
                    f"and annotate it with one of {', '.join(_SCALARS)}"
                )
    return declared


def check_parameters(
    notebook: str | Path, given: Mapping[str, Any], assignments: Iterable[str] = ()
) -> dict[str, Any]:
    """Check names and types of values against what a notebook declares.

    Args:
        notebook: path or stem.
        given: values of the declared types; an int passes for a float, nothing else is converted.
        assignments: texts ``"name=value"`` as typed in a shell, converted to the declared type.

    Returns:
        All values by name.

    Raises:
        ValueError: a name that the notebook does not declare, with the near ones; a value of
            another type; an assignment without ``=``.
    """
    declared, values = notebook_parameters(notebook), {}
    for name, value in given.items():
        values[name] = _checked(Path(notebook).stem, declared, name, value)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"-p {assignment!r}: write -p name=value")
        values[name] = _checked(Path(notebook).stem, declared, name, text, from_shell=True)
    return values


def _checked(
    stem: str, declared: Mapping[str, Parameter], name: str, value: Any, *, from_shell: bool = False
) -> Any:
    """A value of the type that a notebook declares; a text `from_shell` is converted."""
    if name not in declared:
        raise ValueError(
            f"{stem} declares no parameter {name!r}{near_names(name, declared)}: "
            f"it declares {', '.join(declared) or 'none'}"
        )
    kind = TypeAdapter(declared[name].type, config={"strict": True, "allow_inf_nan": False})
    try:
        if not from_shell:
            return kind.validate_python(value)
        if value.lower() in ("none", "null"):
            return kind.validate_python(None)
        return kind.validate_strings(value, strict=False)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ValueError(f"{stem}: parameter {name!r} cannot be {value!r}: {message}") from None


def profile_parameters(notebook: str | Path, profile: str) -> dict[str, Any]:
    """The keys of ``configs/<profile>.yml`` that a notebook declares, the profile's name included.

    The settings that it does not declare reach it through ``RunConfig.from_profile(profile)``.

    Raises:
        FileNotFoundError: no such profile.
        ValueError: a key that is no setting.
    """
    declared = notebook_parameters(notebook)
    return {name: value for name, value in read_profile(profile).items() if name in declared}


def check_meaning(profile: str, values: Mapping[str, Any]) -> None:
    """Check settings, rows and folds among a notebook's values, as its first cells would.

    Raises:
        ValueError: a value that no setting can have, an unknown row, an unknown fold.
    """
    from conki_lib.ablation import configure
    from conki_lib.pipeline import parse_folds

    RunConfig.from_profile(profile, **{k: values[k] for k in values.keys() & _SETTINGS})
    for name in ("variant", "base"):
        if isinstance(values.get(name), str):
            configure(profile, values[name])
    if isinstance(values.get("fold"), str):
        parse_folds(values["fold"], profile)


# ---- the runner ---------------------------------------------------------------------------------


def run_notebook(
    notebook: str | Path,
    *,
    profile: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    output: str | Path | None = None,
) -> Path:
    """Execute a notebook with papermill; unlike papermill, refuse what it does not declare.

    The kernel works in the project's root and finds ``CONKI_HEADLESS=1``. The result is written
    aside and renamed. A notebook that fails is kept in ``runs/notebooks/failed/``.

    Args:
        notebook: path, or stem of a file in ``notebooks/``.
        profile: its YAML feeds the keys that the notebook declares.
        parameters: typed values; they win over the profile's.
        assignments: texts ``"name=value"``; they win over both.
        output: where the executed notebook goes; default ``runs/notebooks/[<profile>/]``.

    Returns:
        The path of the executed notebook.

    Raises:
        ValueError: a parameter that is not declared, of another type or without meaning, or an
            output that is a folder; nothing was executed.
        DiskError: the executed notebook could not be written; where that was known before,
            nothing was executed.
        NotebookError: a cell failed, or the kernel died.
    """
    path = find_notebook(notebook)
    values = check_parameters(path, parameters or {}, assignments)
    profile = values.get("profile", profile)
    if profile is not None:
        values = check_parameters(path, profile_parameters(path, profile) | values)
    declared = notebook_parameters(path)
    if profile is None and "profile" in declared:
        profile = declared["profile"].default
    if profile:
        check_meaning(profile, values)
    from conki_lib.records import runs_dir  # kernels need no pandas for this

    folder = runs_dir("notebooks")
    target = Path(output) if output else folder / (profile or "") / path.name
    if target.exists() and not target.is_file():
        raise ValueError(f"output: {target} is a folder or a device; name a file")
    target = target.resolve() if target.is_symlink() else target
    for place in (target.parent, folder / "failed"):
        make_writable("the executed notebook", place, _GO_ON)
    return _execute(path, values, target, folder / "failed")


def _execute(path: Path, values: dict[str, Any], target: Path, failed: Path) -> Path:
    import papermill

    logging.getLogger("papermill").setLevel("ERROR")  # what is declared is known here
    short = "/tmp" if len(gettempdir()) > 60 else None  # the name of a socket has 107 bytes at most
    aside = failed / f"{path.stem}-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}.ipynb"
    try:
        with (
            TemporaryDirectory(prefix="conki-", dir=short) as sockets,
            _environment(**{HEADLESS: "1"}, **ALLOCATOR),
            explained(path.name, failed, "free some space, or name another place by CONKI_RUNS"),
        ):
            # sockets of its own: runs side by side cannot meet on a port
            own = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            papermill.execute_notebook(
                str(path), str(aside), parameters=values, cwd=str(ROOT), progress_bar=False,
                kernel_name="python3", language="python", start_timeout=180,
                stdout_file=sys.stdout, stderr_file=sys.stderr, coalesce_streams=True,
                store_widget_state=False, config=Config(KernelManager=own),
            )  # fmt: skip
    except DiskError:
        raise
    except papermill.PapermillExecutionError as error:
        raise NotebookError(
            f"{path.name}, cell {error.cell_index} (In [{error.exec_count}]): "
            f"{error.ename}: {error.evalue}\nThe notebook as far as it came: {aside}"
        ) from error
    except Exception as error:
        raise NotebookError(
            f"{path.name} stopped: {type(error).__name__}: {error}\n"
            f"The notebook as far as it came: {aside}"
        ) from error
    try:
        _publish(aside, target)
    except DiskError as error:
        raise DiskError(error.errno, f"{error.strerror}; it is kept as {aside}") from error
    return target


def _publish(aside: Path, target: Path) -> None:
    """Move an executed notebook to its place in one step, without traces of this machine."""
    import nbformat

    notebook = nbformat.read(aside, as_version=4)
    for holder in (notebook, *notebook.cells):
        holder.metadata.pop("papermill", None)
        holder.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    for i, cell in enumerate(notebook.cells):
        for k, output in enumerate(cell.get("outputs", ())):
            data = output.get("data", {})
            for kind in data.keys() & {"text/plain", "text/html"}:
                data[kind] = _without_chance(data[kind], f"{i}_{k}")
    with in_one_step(target) as near:
        nbformat.write(notebook, near)
    aside.unlink()


def _without_chance(text: str, place: str) -> str:
    """An output without addresses, and with ids of pandas' styled tables that every run gives."""
    text = re.sub(r" at 0x[0-9a-f]+>", ">", text)
    for k, name in enumerate(dict.fromkeys(re.findall(r'id="(T_[0-9a-f]+)"', text))):
        text = text.replace(name, f"T_{place}_{k}")
    return text


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)
