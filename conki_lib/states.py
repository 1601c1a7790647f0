"""Hidden states of frozen backbones, computed once and read memory-mapped ever after.

Stage 1 trains adapters on frozen backbones, so what an adapter reads never changes between
epochs. A cache holds, for one modality of one split, the pan representation and the plugged-in
hidden states of every utterance, valid steps only. It is keyed by everything that determines it,
the backbone's weights included, and shared by all runs that agree.
"""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conki_lib.data import Batch
from conki_lib.disk import RESERVED, explained, make_room, remove_at_once
from conki_lib.encoders import Encoded
from conki_lib.model import ConKI
from conki_lib.records import code_hash, runs_dir

LARGEST = 32 * 10**9  # bytes of all states together
KEPT = 24 * 3600.0  # seconds: states that were opened since may be in use, and make no room
_GO_ON = "free some space, or set stage1_cache to false, which computes them anew in every epoch"


class States:
    """One modality's states of one split, opened from a folder that `cached_states` made."""

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / "states.json").read_text())
        self.layers: tuple[int, ...] = tuple(facts["layers"])
        self.pan = np.load(folder / "pan.npy", mmap_mode="r")
        self.spans = np.load(folder / "spans.npy")
        shape = (int(self.spans[:, 1].sum()), self.pan.shape[1])
        self.hidden = {
            layer: np.memmap(folder / f"hidden{layer}.bin", np.float32, mode="r", shape=shape)
            for layer in self.layers
        }

    def read(self, index: Int[Tensor, " B"]) -> Encoded:
        """The states of some rows of the split, padded to the longest of them, as `ConKI.encode`
        gives them.

        Args:
            index: rows of the split.

        Returns:
            `pan`, `hidden` (a dict from plugged-in layer to states) and `mask`.
        """
        rows = index.cpu().numpy()
        starts, lengths = self.spans[rows].T
        mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
        hidden = {}
        for layer, values in self.hidden.items():
            padded = np.zeros((*mask.shape, values.shape[1]), np.float32)
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                padded[row, :length] = values[start : start + length]
            hidden[layer] = torch.from_numpy(padded)
        return Encoded(torch.from_numpy(np.array(self.pan[rows])), hidden, mask)


class StateReader:
    """All modalities' states of one split: what `ConKI.represent` needs in place of
    `ConKI.encode`."""

    def __init__(self, states: dict[str, States]) -> None:
        self.states = states

    def __call__(self, batch: Batch) -> dict[str, Encoded]:
        """The cached states of a batch, on the batch's device."""
        device = batch.y.device
        return {m: _to(states.read(batch.index), device) for m, states in self.states.items()}


def _to(encoded: Encoded, device: torch.device) -> Encoded:
    hidden = {layer: h.to(device) for layer, h in encoded.hidden.items()}
    return Encoded(encoded.pan.to(device), hidden, encoded.mask.to(device))


def cached_states(model: ConKI, loader: DataLoader, *, key: dict, modality: str) -> States | None:
    """Open a split's states of one modality, computing them first where they are missing.

    Args:
        model: frozen and in eval mode.
        loader: the split in any order; `Batch.index` says which row is which.
        key: all that determines the states, beside the backbone and its weights: data, split,
            settings, precision.
        modality: one of t, v, a.

    Returns:
        The states, or None where all together would be larger than `LARGEST`, or these than the
        free space, even if those that nobody opened for a day (`KEPT`) are removed.

    Raises:
        DiskError: the folder of runs is full or read-only.
    """
    known = [key, code_hash(), modality, model.plugged(modality), _digest(model.encoders[modality])]
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    folder = runs_dir("cache") / f"{modality}-{name}"
    with explained("the cache of hidden states", folder.parent, _GO_ON):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError):  # none, or damaged
                states = States(folder)
                (folder / "states.json").touch()
                return states
            steps = sum(int(batch.lengths[modality].sum()) + len(batch) for batch in loader)
            size = 4 * model.config.d * steps * len(model.plugged(modality))
            aside = make_room(folder.parent, size, largest=LARGEST, kept=KEPT)
            if aside is None:
                print(
                    f"states of {modality}: {size / 1e9:.1f} GB are too many to cache; recomputing"
                )
                return None
            print(f"caching the states of modality {modality}: about {size / 1e6:.0f} MB")
            _write(model, loader, modality, aside, folder)
            return States(folder)


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _write(model: ConKI, loader: DataLoader, modality: str, aside: Path, folder: Path) -> None:
    layers = model.plugged(modality)
    device = next(model.parameters()).device
    count = len(loader.dataset)
    pan, spans = np.zeros((count, model.config.d), np.float32), np.zeros((count, 2), np.int64)
    written = 0
    try:
        with contextlib.ExitStack() as stack:
            files = {
                layer: stack.enter_context(open(aside / f"hidden{layer}.bin", "wb"))
                for layer in layers
            }
            for batch in loader:
                encoded = model.encode_one(modality, batch.to(device))
                pan[batch.index] = encoded.pan.float().cpu().numpy()
                lengths = encoded.mask.sum(1).cpu().numpy()
                starts = written + np.concatenate([[0], np.cumsum(lengths)[:-1]])
                spans[batch.index] = np.stack([starts, lengths], axis=1)
                written += int(lengths.sum())
                for layer, file in files.items():
                    file.write(encoded.hidden[layer][encoded.mask].float().cpu().numpy().tobytes())
        np.save(aside / "pan.npy", pan)
        np.save(aside / "spans.npy", spans)
        (aside / "states.json").write_text(json.dumps({"layers": list(layers)}))
        (aside / RESERVED).unlink()
        remove_at_once(folder)  # damaged, if there is one
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
