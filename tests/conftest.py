"""Fixtures for all tests; shapes and types of the library are checked at run time."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
# must stand before the library's first import: wraps its functions with jaxtyping and beartype
install_import_hook("conki_lib", "beartype.beartype")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from layouts import save_bert  # noqa: E402

if TYPE_CHECKING:
    from conki_lib.config import ModelConfig, RunConfig
    from conki_lib.data import Batch

torch.set_num_threads(1)
PIECES = {
    "en": "it is dull fine great really not a film , . ##ly".split(),
    "zh": "我 很 不 喜 欢 这 部 电 影".split(),
}


@pytest.fixture(scope="session")
def shared_mirror() -> Path:
    """The mirror of the public files, or a skip: $CONKI_MIRROR, else ../shared/data/mirror."""
    given = os.environ.get("CONKI_MIRROR")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared/data/mirror"
    if not path.is_dir():
        pytest.skip(f"no mirror of the public files at {path}; CONKI_MIRROR may name another")
    return path


@pytest.fixture
def make_tiny_store(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small random store and returns its folder.

    ``make_tiny_store(name="toy", sizes=(8, 4, 4), widths={"v": 5, "a": 3}, longest=9, seed=0)``
    """
    from conki_lib.data.store import write_store

    def make(
        name: str = "toy",
        sizes: tuple[int, int, int] = (8, 4, 4),
        widths: dict[str, int] | None = None,
        longest: int = 9,
        seed: int = 0,
    ) -> Path:
        widths = {"v": 5, "a": 3} if widths is None else widths
        rng = np.random.default_rng(seed)
        splits = np.repeat(["train", "valid", "test"], sizes)
        n = len(splits)
        y = np.clip(rng.normal(0, 1.5, n), -3, 3).round(1)
        words = ["dull", "fine", "great"]
        utterances = pd.DataFrame(
            {
                "id": [f"v{i // 2}$_${i}" for i in range(n)],
                "video": [f"v{i // 2}" for i in range(n)],
                "clip": [str(i) for i in range(n)],
                "text": [
                    " ".join(["it is", words[int(np.sign(v)) + 1]] + ["really"] * int(k))
                    for v, k in zip(y, rng.integers(0, 5, n), strict=True)
                ],
                "y": y,
                "standard": splits,
            }
        )
        sequences = {
            m: [
                rng.normal(v / 3 + 1, 1.0, (int(rng.integers(1, longest + 1)), d)).astype("float32")
                for v in y
            ]
            for m, d in widths.items()
        }
        return write_store(
            tmp_path / name,
            utterances,
            sequences,
            name=name,
            language="en",
            label_range=(-3.0, 3.0),
        )

    return make


@pytest.fixture(scope="session")
def make_tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A function that saves a small randomly initialised BERT to a folder and returns its name.

    ``make_tiny_bert(layers=2, d=16, language="en", pooler=True, dropout=0.1)``; equal calls share
    one folder.
    """
    made: dict[tuple, str] = {}

    def make(
        layers: int = 2,
        d: int = 16,
        language: str = "en",
        pooler: bool = True,
        dropout: float = 0.1,
    ) -> str:
        key = (layers, d, language, pooler, dropout)
        if key not in made:
            sizes = dict(layers=layers, d=d, pooler=pooler, max_position_embeddings=32)
            sizes |= dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
            made[key] = save_bert(tmp_path_factory.mktemp("bert"), PIECES[language], **sizes)
        return made[key]

    return make


@pytest.fixture
def tiny_config(make_tiny_bert: Callable[..., str]) -> Callable[..., "ModelConfig"]:
    """A function that makes the settings of a tiny model without dropout; changes win."""
    from conki_lib.config import ModelConfig

    def make(**changes) -> ModelConfig:
        small = dict(
            d=16,
            widths={"toy": {"v": 5, "a": 3}},
            encoder_heads=2,
            encoder_ff=24,
            encoder_positions=32,
            encoder_dropout=0.0,
            adapter_width=8,
            adapter_heads=2,
            adapter_ff=12,
            adapter_dropout=0.0,
            fusion_dropout=0.0,
            fusion_width=4,
        )
        if "text_backbone" not in changes:
            small["text_backbone"] = make_tiny_bert(dropout=0.0)
        return ModelConfig(**{**small, **changes})

    return make


@pytest.fixture(scope="session")
def toy_batch() -> Callable[..., "Batch"]:
    """A function that makes a random batch of all modalities: ``toy_batch(4, seed=0, pad=0)``."""
    return _toy_batch


def _toy_batch(n: int = 4, *, seed: int = 0, pad: int = 0, corpus: str = "toy") -> "Batch":
    """`pad` adds steps of padding and changes nothing else."""
    from conki_lib.data import Batch

    rng = torch.Generator().manual_seed(seed)
    lengths = {m: torch.randint(2, 8, (n,), generator=rng) for m in "tva"}
    lengths["v"][0] = 1
    most = {m: int(x.max()) for m, x in lengths.items()}
    inputs = {"t": torch.randint(4, 16, (n, most["t"]), generator=rng)}
    inputs |= {m: torch.randn(n, most[m], d, generator=rng) for m, d in (("v", 5), ("a", 3))}
    for m, x in inputs.items():
        x[torch.arange(most[m]) >= lengths[m][:, None]] = 0
        inputs[m] = torch.cat([x, x.new_zeros(n, pad, *x.shape[2:])], dim=1)
    ids = tuple(f"u{i}" for i in range(n))
    y = torch.randn(n, generator=rng)
    return Batch(inputs, lengths, y, ids, torch.arange(n), corpus)


SMALL = dict(
    profile="tiny", target="toy", external="far", d=16, encoder_heads=2, encoder_ff=16,
    adapter_width=8, adapter_heads=2, adapter_ff=8, epochs=3, stage1_epochs=2, batch_size=4,
    stage1_batch_size=4, precision="fp32", device="cpu", adapter_text_layers=(0, 1), max_steps=64,
)  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch, make_tiny_store, make_tiny_bert) -> "RunConfig":
    """Two corpora of different widths, a backbone, and an empty place for runs."""
    from conki_lib import records
    from conki_lib.config import RunConfig

    monkeypatch.setenv("CONKI_DATA", str(tmp_path))
    monkeypatch.setenv("CONKI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(records, "ROOT", tmp_path)
    make_tiny_store("toy", sizes=(10, 4, 4), seed=1)
    make_tiny_store("far", sizes=(12, 4, 4), widths={"v": 7, "a": 2}, seed=2)
    return RunConfig(**SMALL, text_backbone=str(make_tiny_bert()))
