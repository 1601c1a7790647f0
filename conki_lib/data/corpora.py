"""The corpora this project knows: where each comes from, how to get it, where it lies."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests
from filelock import FileLock
from tqdm.auto import tqdm

from conki_lib.config import near_names
from conki_lib.data import open_corpora, synthetic
from conki_lib.data.damage import refuse_damaged
from conki_lib.data.mmsa import RELEASES, Release
from conki_lib.data.open_corpora import BC_LSTM, MFN, Fetched
from conki_lib.data.packing import SPLITS, Contents, Range
from conki_lib.data.store import open_store, source_of, write_store
from conki_lib.disk import corpus_path, explained

HOST = "https://raw.githubusercontent.com/"
REGISTRY = Path(__file__).resolve().parents[2] / "data" / "registry.txt"

Reader = Callable[[Fetched], Contents]


@dataclass(frozen=True)
class Corpus:
    """One corpus: what it is and how to get it."""

    name: str
    title: str
    kind: str  # "embedded": built here; "open": fetched; "user": converted from the user's files
    modalities: tuple[str, ...]
    counts: tuple[int, int, int]  # train, valid, test of the fold standard
    language: str = "en"
    label_range: Range = (-3.0, 3.0)
    files: tuple[str, ...] = ()  # below HOST
    read: Reader | None = None
    recipe: int = 1  # raised when reading or generating changes: older stores are built anew
    how: str = ""


def _mmsa(title: str, release: Release, language: str = "en") -> Corpus:
    """A corpus of the MMSA framework, which only the user can bring."""
    return Corpus(
        release.name, f"{title}, MMSA features", "user", ("t", "v", "a"), release.counts,
        language, release.label_range,
        how=f"get {release.file} from the page of the MMSA framework "
        f"(https://github.com/thuiar/MMSA), then run `conki convert {Path(release.file).name} "
        f"DATA/{release.name}`",
    )  # fmt: skip


def _embedded(title: str, domain: synthetic.Domain) -> Corpus:
    """A corpus that is generated here."""
    return Corpus(
        domain.name, title, "embedded", ("t", "v", "a"), domain.sizes,
        read=lambda _: synthetic.generate(domain), recipe=synthetic.RECIPE,
    )  # fmt: skip


def _reviews(name: str, title: str, counts: tuple[int, int, int], read: Reader) -> Corpus:
    """Film reviews as MFN's authors published them."""
    kinds = ("audio", "video", "y")
    return Corpus(
        f"{name}-open", f"{title} film reviews, vision and audio per word", "open", ("v", "a"),
        counts, read=read,
        files=tuple(f"{MFN}/new_data/{name}/{kind}_{s}.h5" for kind in kinds for s in SPLITS),
    )  # fmt: skip


_UNALIGNED = {r.name: r for r in RELEASES.values() if "/unaligned" in r.file}
_BC = f"{BC_LSTM}/bc-LSTM/data"
CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        _embedded("generated target domain", synthetic.TARGET),
        _embedded("generated external domain", synthetic.EXTERNAL),
        Corpus(
            "mosi-open",
            "CMU-MOSI from public repositories, one vector per utterance",
            "open",
            ("t", "v", "a"),
            (1284, 229, 686),
            files=(
                f"{_BC}/transcripts.csv",
                *(f"{_BC}/text_{part}.csv" for part in ("train", "test")),
                *(f"{_BC}/{k}/{k}_{p}0.csv" for k in ("audio", "video") for p in ("train", "test")),
                *(f"{MFN}/data/y_{split}.h5" for split in SPLITS),
            ),
            read=open_corpora.read_mosi_open,
        ),
        Corpus(
            "meld-text",
            "MELD's utterances with three sentiments, text only",
            "open",
            ("t",),
            (9989, 1109, 2610),
            files=tuple(
                f"{BC_LSTM}/MELD/data/MELD/{p}_sent_emo.csv" for p in ("train", "dev", "test")
            ),
            read=open_corpora.read_meld_text,
        ),
        _reviews("mmmo", "ICT-MMMO", (220, 40, 80), open_corpora.read_mmmo_open),
        _reviews("pom", "POM", (600, 100, 203), open_corpora.read_pom_open),
        _mmsa("CMU-MOSI", _UNALIGNED["mosi"]),
        _mmsa("CMU-MOSEI", _UNALIGNED["mosei"]),
        _mmsa("CH-SIMS", _UNALIGNED["sims"], "zh"),
    )
}  # fmt: skip


def how_to_get(name: str, root: Path | str | None = None) -> str:
    """Say in one line what to run to have a corpus."""
    how = CORPORA[name].how.replace(f"DATA/{name}", str(corpus_path(name, root)))
    return how or f"run `conki fetch {name}`"


def fetch(name: str, root: Path | str | None = None) -> Path:
    """Download or build a corpus, verify it, pack it; do nothing if it is there already.

    Public files come from pinned commits on raw.githubusercontent.com, or from the folder
    $CONKI_MIRROR with the same paths; in both cases their SHA-256 is checked.

    Args:
        name: a key of `CORPORA`.
        root: folder of all stores; default `data_root()`.

    Returns:
        The store's folder.

    Raises:
        ValueError: no such corpus; or a file whose checksum is wrong, or that is an HTML page.
        FileNotFoundError: a corpus that only the user can bring; or a file the mirror lacks.
        ConnectionError: the files could not be downloaded.
        DiskError: the folder is full or cannot be written; nothing half done is kept.
    """
    if name not in CORPORA:
        raise ValueError(
            f"unknown corpus {name!r}{near_names(name, CORPORA)}: known are {', '.join(CORPORA)}"
        )
    corpus, path = CORPORA[name], corpus_path(name, root)
    if corpus.kind == "user":
        if path.exists():
            return open_store(path).path
        raise FileNotFoundError(
            f"{name} ({corpus.title}) is not at {path} and cannot be fetched: "
            f"{how_to_get(name, root)}"
        )
    if is_current(path, corpus):  # without a lock: the folder may be read-only
        return path
    way_out = "free some space, or name another folder by CONKI_DATA; then fetch again"
    with explained(f"corpus {name!r}", path.parent, way_out):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{name}.lock"):
            if not is_current(path, corpus):
                _build(corpus, path)
    return path


def is_current(path: Path, corpus: Corpus) -> bool:
    """Does a store stand there that today's recipe made?

    Raises:
        FileExistsError: it is another's, which would be lost.
    """
    if not (path / "info.json").is_file():
        return False
    recipe = open_store(path).info.notes.get("recipe")
    if recipe is None:
        raise FileExistsError(f"{path} is a store that `conki fetch` did not make: move it first")
    return recipe == str(corpus.recipe)


def _build(corpus: Corpus, path: Path) -> None:
    files = _get_files(corpus, path.parent / "downloads") if corpus.files else {}
    contents = corpus.read(files)
    found = tuple(int((contents.utterances["standard"] == split).sum()) for split in SPLITS)
    if found != corpus.counts:
        raise ValueError(f"{corpus.name}: {found} utterances found, {corpus.counts} expected")
    write_store(
        path,
        contents.utterances,
        contents.sequences,
        name=corpus.name,
        language=corpus.language,
        label_range=corpus.label_range,
        sources=[source_of(files[file], file) for file in corpus.files],
        cleaned=contents.cleaned,
        notes=contents.notes | {"recipe": str(corpus.recipe)},
        overwrite=True,
    )


def _get_files(corpus: Corpus, folder: Path) -> dict[str, Path]:
    mirror = os.environ.get("CONKI_MIRROR")
    registry = pooch.create(folder, HOST, retry_if_failed=0 if mirror else 2)
    registry.load_registry(REGISTRY)
    pooch.get_logger().setLevel("WARNING")
    files = {}
    for file in tqdm(corpus.files, desc=f"fetch {corpus.name}", unit="file", disable=None):
        try:
            files[file] = Path(registry.fetch(file, downloader=_transfer))
        except ValueError as error:
            if "the known hash" not in str(error):  # pooch's words
                raise
            raise ValueError(
                f"{corpus.name}: {file} from {mirror or HOST} has not the pinned checksum "
                f"{registry.registry[file]}: it is damaged or another version. Nothing was kept; "
                "try again, or bring the right file in a folder that CONKI_MIRROR names"
            ) from error
        except requests.exceptions.RequestException as error:
            raise ConnectionError(
                f"{corpus.name}: cannot download {HOST}{file} ({error}). Try again with a network, "
                "or copy the files on another machine into a folder with the same paths "
                f"({file}) and set CONKI_MIRROR to it"
            ) from error
    return files


def _transfer(url: str, output: Any, registry: pooch.Pooch) -> None:
    """Download a file or copy it from the mirror; a page in its place is named as such."""
    mirror, origin = os.environ.get("CONKI_MIRROR"), url
    if mirror:
        origin = Path(mirror) / url.removeprefix(HOST)
        if not origin.is_file():
            raise FileNotFoundError(
                f"CONKI_MIRROR has no {origin}: put the file of {url} there, or unset "
                "CONKI_MIRROR to download"
            )
        shutil.copyfile(origin, output)
    else:
        pooch.HTTPDownloader()(url, output, registry)
    refuse_damaged(Path(output), origin)  # before its checksum is called wrong


def status(root: Path | str | None = None) -> list[dict[str, Any]]:
    """One row per corpus for `conki doctor`: present or not, what is in it, and what to do."""
    rows = []
    for name, corpus in CORPORA.items():
        path = corpus_path(name, root)
        row = {"corpus": name, "state": "missing", "modalities": "".join(corpus.modalities)}
        row |= {"counts": corpus.counts, "how": how_to_get(name, root)}
        if path.exists():
            try:
                n = open_store(path).info.counts.get("standard", {})
                row |= {"state": "present", "counts": tuple(n.get(s, 0) for s in SPLITS), "how": ""}
            except (OSError, ValueError) as error:
                row |= {"state": "damaged", "how": f"{error}; {row['how']}"}
        rows.append(row)
    return rows
