"""One fine-tuning step at the released shapes: a plain implementation against this library's.

    python bench/training_step.py            # 40 minutes and 20 GB on two cores; 2 minutes on a GPU
    python bench/training_step.py --quick    # tiny sizes, nothing written
    python bench/training_step.py --page     # pages and figures from the committed results
    python bench/training_step.py --skip     # compiled variants too, which take long to compile

The plain step is written below from what is known of the released code (`PlainConKI`): everything
padded to its maximum, masks ignored in adapters and means, attention written out, default fp32, a
Python loop over the pair matrix, text tokenised in the step. From there to the library's step one
measure is switched on at a time; all take turns in one process. Peak memory is that of a process
of its own. Uses a GPU where there is one; then the results' names end in `_cuda`, only the clock
counts, and memory is that of PyTorch's allocator. A processor without instructions for bf16 leaves
the variants in bf16 out; then the names end in `_fp32`.
"""

import argparse
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from contrastive_loss import (
    DEVICE,
    GPU,
    committed,
    device_of,
    forget_peak,
    machine_of,
    mask_of_entries,
    median_ratio,
    name_of,
    on_gpu,
    peak,
    released,
    synchronise,
)
from layouts import SPECIAL, save_bert
from matplotlib.patches import Patch
from report import publish, published
from torch import Tensor, nn
from torch.nn import functional as F

from conki_lib.config import MODALITIES, ModelConfig, RunConfig, RuntimeConfig
from conki_lib.data import Batch, make_loader, open_store, tokenise
from conki_lib.data.store import write_store
from conki_lib.encoders import TransformerStack, load_tokenizer
from conki_lib.fitting import _InParts, chosen_precision, make_optimizer, precision
from conki_lib.losses import contrastive_loss, task_loss
from conki_lib.model import build_model, freeze_for_fine_tuning
from conki_lib.plots.style import MUTED, PAIR_COLORS, use_style
from conki_lib.training import Objective

CORPUS = "shapes"  # of the generated corpus
ASKED = 5  # times faster than plain
PARTS = 4  # of a batch, where it is taken in parts
MEAN, DEVIATION = 0.35, 0.65 / 3  # duration over the maximum: mean + 3 deviations is the maximum


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the released shapes."""

    B: int = 32
    d: int = 768
    layers: int = 12  # of the text backbone
    heads: int = 12
    ff: int = 3072
    vocabulary: int = 30522
    steps: tuple[int, int] = (500, 375)  # vision, audio
    widths: tuple[int, int] = (20, 5)
    tokens: int = 50
    utterances: int = 512  # 16 batches, one pool of the bucketing
    rounds: int = 5 if GPU else 2
    batches: int = 3 if GPU else 1  # timed a turn, evenly spread over the pool's lengths


TINY = Sizes(
    B=4, d=24, layers=3, heads=2, ff=32, vocabulary=200, steps=(30, 20), tokens=12, utterances=64,
    rounds=2, batches=2,
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A way to take the step; differs by one measure from `base`."""

    label: str
    base: str = ""
    library: bool = False
    batches: str = (
        "padded"  # "random": padded to the batch's longest; "bucketed": of similar length
    )
    attention: str = "eager"
    loss: str = "loop"
    tokenised: bool = False
    fused: bool = False
    precision: str = "fp32"
    option: str = ""  # of the library; see `_ladder`


def _ladder() -> dict[str, Variant]:
    """All variants: rungs from plain to ours, then options on top."""
    rungs = {
        "trimmed": ("sequences padded to the batch's longest only", {"batches": "random"}),
        "bucketed": ("batches of similar length", {"batches": "bucketed"}),
        "attention": ("scaled-dot-product attention kernel", {"attention": "sdpa"}),
        "loss": ("closed-form contrastive loss", {"loss": "closed"}),
        "tokens": ("text tokenised once, before", {"tokenised": True}),
        "optimiser": ("fused AdamW", {"fused": True}),
        "library": ("its own model: masks, frozen parts without dropout", {"library": True}),
        "ours": ("fp32-fast products", {"precision": "fp32-fast"}),
        "ours bf16": ("bf16 autocast", {"precision": "bf16"}),
    }
    variants = {"plain": Variant("plain")}
    before = "plain"
    for name, (label, change) in rungs.items():
        variants[name] = replace(variants[before], label=label, base=before, **change)
        before = name
    options = {
        "detached": ("ours bf16", "no gradient through adapters (adapter_gradient: false)"),
        "compiled": ("ours bf16", "torch.compile of all Transformer stacks"),
        "compiled fp32": ("library", "torch.compile of all Transformer stacks"),
        "recomputed": ("ours", "activations, in backward (checkpoint_activations: true)"),
        "in parts": ("ours", f"{PARTS} of them, recomputed one by one (accumulate: {PARTS})"),
    }
    for name, (base, label) in options.items():
        variants[name] = replace(variants[base], label=label, base=base, option=name)
    return variants


VARIANTS = _ladder()
ROLES = {
    "plain": PAIR_COLORS["P1"],
    "on the way: one measure more than the bar above": PAIR_COLORS["N2"],
    "ours, likewise one more": PAIR_COLORS["N1"],
    "options, each alone on top of one of the others": MUTED,
}
OPTIONS = tuple(name for name, variant in VARIANTS.items() if variant.option)
COMPILED = [name for name in OPTIONS if name.startswith("compiled")]


# --- the plain implementation -------------------------------------------------------------------


class PlainLayer(nn.TransformerEncoderLayer):
    """A Transformer layer, norms after, with its attention written out."""

    kernel = "eager"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend, then feed forward; the mask is True at real steps."""
        x = self.norm1(x + self.dropout1(self.attend(x, mask)))
        inner = self.dropout(F.gelu(self.linear1(x)))
        return self.norm2(x + self.dropout2(self.linear2(inner)))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Multi-head self-attention, eager or by PyTorch's kernel."""
        part = self.self_attn
        qkv = F.linear(x, part.in_proj_weight, part.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, part.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = part.dropout if self.training else 0.0
        bias = None
        if mask is not None:
            bias = x.new_zeros(mask.shape).masked_fill(~mask, -math.inf)[:, None, None]
        if self.kernel == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            scores = scores if bias is None else scores + bias
            out = F.dropout(scores.softmax(-1), dropout) @ v
        return part.out_proj(out.transpose(1, 2).flatten(2))


def plain_layers(n: int, d: int, heads: int, ff: int, dropout: float) -> nn.ModuleList:
    """Some layers in a row."""
    return nn.ModuleList(PlainLayer(d, heads, ff, dropout, batch_first=True) for _ in range(n))


class PlainEncoder(nn.Module):
    """Vision or audio: projection, CLS step, learned positions, layers; mean over all steps."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        d, dropout = config.d, config.encoder_dropout
        self.project = nn.Linear(width, d)
        self.cls = nn.Parameter(torch.zeros(d))
        self.positions = nn.Parameter(torch.zeros(config.encoder_positions + 1, d))
        self.dropout = nn.Dropout(dropout)
        sizes = (config.encoder_layers, d, config.encoder_heads, config.encoder_ff)
        self.layers = plain_layers(*sizes, dropout)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """O_m and all hidden states."""
        x = torch.cat([self.cls.expand(len(x), 1, -1), self.project(x)], dim=1)
        mask = F.pad(mask, (1, 0), value=True)
        hidden = [self.dropout(x + self.positions[: x.shape[1]])]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], mask))
        return self.norm(hidden[-1]).mean(1), hidden


class PlainModule(nn.Module):
    """One module of an adapter: down, two layers that attend to all steps, up, residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.adapter_width
        sizes = (2, width, config.adapter_heads, config.adapter_ff)
        self.down, self.up = nn.Linear(config.d, width), nn.Linear(width, config.d)
        self.layers = plain_layers(*sizes, config.adapter_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the input."""
        inner = self.down(x)
        for layer in self.layers:
            inner = layer(inner)
        return x + self.up(inner)


class PlainAdapter(nn.Module):
    """A chain of modules, pooled by first step, dense, tanh (text) or norm and mean."""

    def __init__(self, config: ModelConfig, plugged: tuple[int, ...], text: bool) -> None:
        super().__init__()
        self.plugged = plugged
        self.chain = nn.ModuleList(PlainModule(config) for _ in plugged)
        if text:
            self.pooler = nn.Linear(config.d, config.d)
        else:
            self.norm = nn.LayerNorm(config.d)

    def forward(self, hidden: list[Tensor]) -> Tensor:
        """A_m."""
        x = torch.zeros_like(hidden[0])
        for layer, module in zip(self.plugged, self.chain, strict=True):
            x = module(hidden[layer] + x)
        if hasattr(self, "pooler"):
            return torch.tanh(self.pooler(x[:, 0]))
        return self.norm(x).mean(1)


class PlainConKI(nn.Module):
    """The whole model, from the facts listed in the audit; parts are named as in the library."""

    def __init__(self, config: ModelConfig, plugged: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        bert = BertConfig.from_pretrained(config.text_backbone, attn_implementation="eager")
        d, widths = config.d, config.widths[CORPUS]
        encoders = {m: PlainEncoder(config, width) for m, width in widths.items()}
        self.encoders = nn.ModuleDict({"t": BertModel(bert), **encoders})
        self.adapters = nn.ModuleDict(
            {m: PlainAdapter(config, layers, m == "t") for m, layers in plugged.items()}
        )
        sizes = [3 * d, d, d // 2, d // 4, d // 8]
        mlp = [
            part
            for a, b in zip(sizes, sizes[1:], strict=False)
            for part in (nn.Linear(a, b), nn.GELU())
        ]
        reduced = 3 * d // config.gate_reduction
        self.intra = nn.ModuleDict({m: nn.Linear(2 * d, d) for m in MODALITIES})
        self.squeeze, self.excite = nn.Linear(3 * d, reduced), nn.Linear(reduced, 3 * d)
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.mlp = nn.Sequential(*mlp, nn.Linear(sizes[-1], 1))
        self.adapters.requires_grad_(False)

    def forward(self, inputs: dict[str, Tensor], masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Predictions (B,) and the six representations (B, 6, d)."""
        out = self.encoders["t"](inputs["t"], masks["t"], output_hidden_states=True)
        encoded = {"t": (out.pooler_output, out.hidden_states)}
        encoded |= {m: self.encoders[m](inputs[m], masks[m]) for m in ("v", "a")}
        pan = {m: encoded[m][0] for m in MODALITIES}
        specific = {m: self.adapters[m](encoded[m][1]) for m in MODALITIES}
        fused = [self.intra[m](torch.cat([specific[m], pan[m]], 1)) for m in MODALITIES]
        x = torch.cat(fused, 1)
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x))))
        y_hat = self.mlp(self.dropout(x)).squeeze(1)
        return y_hat, torch.stack([*pan.values(), *specific.values()], 1)

    def set_kernel(self, name: str) -> None:
        """Choose the attention of all layers."""
        self.encoders["t"].set_attn_implementation(name)
        for part in self.modules():
            if isinstance(part, PlainLayer):
                part.kernel = name


def plain_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The library's weights under the names of `PlainConKI`."""
    names = (r"^encoders\.t\.backbone", "encoders.t"), (r"\.stack\.", "."), (r"^heads\.", "")
    names += (r"^cross\.", ""), (r"project\.of-\w+", "project")
    renamed = {}
    for name, value in state.items():
        for old, new in names:
            name = re.sub(old, new, name)
        renamed[name] = value
    return renamed


def plain_loss(reps: Tensor, y: Tensor, tau: float) -> Tensor:
    """The contrastive loss per row, its positives found by two Python loops over the pairs."""
    rows = [(k < 3, round(value)) for value in y.tolist() for k in range(6)]
    return released(reps.flatten(0, 1), mask_of_entries(rows).to(y.device), tau)


# --- data and models ----------------------------------------------------------------------------


def make_corpus(folder: Path, sizes: Sizes) -> Path:
    """Write a corpus with the released shapes: durations are log-normal, cut at the maximum."""
    rng, n = np.random.default_rng(0), sizes.utterances
    spread = math.sqrt(math.log(1 + (DEVIATION / MEAN) ** 2))
    share = rng.lognormal(math.log(MEAN) - spread**2 / 2, spread, n).clip(0.03, 1)
    words = vocabulary(sizes)
    counts = np.clip(share * sizes.tokens * rng.uniform(0.7, 1.3, n), 3, sizes.tokens) - 2
    table = pd.DataFrame({"id": [str(i) for i in range(n)], "clip": "0"})
    table["video"], table["standard"] = table["id"], "train"
    table["text"] = [" ".join(rng.choice(words, max(1, int(k)))) for k in counts]
    table["y"] = rng.uniform(-3, 3, n).round(1)
    sequences = {
        m: [rng.normal(size=(max(1, int(s * steps)), width)).astype("float32") for s in share]
        for m, steps, width in zip(("v", "a"), sizes.steps, sizes.widths, strict=True)
    }
    return write_store(
        folder / CORPUS, table, sequences, name=CORPUS, language="en", label_range=(-3.0, 3.0)
    )


def vocabulary(sizes: Sizes) -> list[str]:
    """Words of letters; with BERT's special tokens as many as there shall be."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = (a + b + c + d for a in letters for b in letters for c in letters for d in letters)
    return [next(words) for _ in range(sizes.vocabulary - len(SPECIAL))]


def settings(backbone: str, sizes: Sizes, **changes: object) -> RunConfig:
    """The preset `released` with these sizes, masks everywhere."""
    chosen = dict(
        preset="released",
        padding="masked",
        text_backbone=backbone,
        text_init="random",
        d=sizes.d,
        widths={CORPUS: dict(zip(("v", "a"), sizes.widths, strict=True))},
        adapter_width=sizes.d,
        adapter_heads=sizes.heads,
        adapter_ff=sizes.ff,
        max_tokens=sizes.tokens,
    )
    return RunConfig(**{**chosen, **changes})


class Bench:
    """Corpus, both models with equal weights, and how each variant takes its step."""

    def __init__(
        self, folder: Path, sizes: Sizes, which: tuple[str, ...], **changes: object
    ) -> None:
        self.sizes = sizes
        shape = dict(d=sizes.d, layers=sizes.layers, heads=sizes.heads, ff=sizes.ff)
        backbone = save_bert(folder / "bert", vocabulary(sizes), weights=False, **shape)
        self.config = settings(backbone, sizes, **changes)
        self.tokenizer = load_tokenizer(backbone)
        self.batches = self._batches(make_corpus(folder, sizes))
        torch.manual_seed(0)
        self.ours = build_model(self.config.model)
        plugged = {m: self.ours.plugged(m) for m in MODALITIES}
        freeze_for_fine_tuning(self.ours, injected=MODALITIES)
        self.objective = Objective(self.config.contrast)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.compiled: dict[nn.Module, Callable] = {}
        if any(not VARIANTS[name].library for name in which):
            self.plain = PlainConKI(self.config.model, plugged)
            self.plain.load_state_dict(plain_state(self.ours.state_dict()))
            self.optimizers["plain"] = plain_optimizer(self.plain.to(DEVICE).train(), self.config)
        if any(VARIANTS[name].library for name in which):
            self.optimizers["ours"] = make_optimizer(
                self.ours.to(DEVICE).train(), self.config.stage2
            )
        self.trained = [p for p in self.ours.parameters() if p.requires_grad]

    def _batches(self, corpus: Path) -> dict[str, list[Batch]]:
        """Batches of each kind, ascending by size; the corpus is one split of one pool."""
        split, sizes = open_store(corpus)["train"], self.sizes
        self.texts = dict(zip(split.table["id"], split.table["text"], strict=True))
        tokens = tokenise(split.table["text"], self.tokenizer, max_tokens=sizes.tokens)
        self.longest = dict(zip(MODALITIES, (sizes.tokens, *sizes.steps), strict=True))

        def loader(pad_to: int | dict) -> torch.utils.data.DataLoader:
            return make_loader(
                split, modalities=MODALITIES, batch_size=sizes.B, tokens=tokens, shuffle=True,
                pad_to=pad_to,
            )  # fmt: skip

        order = np.random.default_rng(1).permutation(len(split)).reshape(-1, sizes.B).tolist()
        kinds = {
            "padded": [loader(self.longest).dataset.__getitems__(order[0])],
            "random": [loader(0).dataset.__getitems__(rows) for rows in order],
            "bucketed": list(loader(0)),
        }
        self.valid = float(np.mean([real_share(batch, self.longest) for batch in kinds["random"]]))
        return {  # labels stay on the CPU, as in `fit`
            kind: [replace(b.to(DEVICE), y=b.y) for b in sorted(found, key=area)]
            for kind, found in kinds.items()
        }

    def chosen(self, kind: str) -> list[Batch]:
        """Some batches of a kind: their order by size in equal parts, of each the most average."""
        found = self.batches[kind]
        parts = np.array_split(np.arange(len(found)), min(self.sizes.batches, len(found)))
        means = [np.mean([area(found[i]) for i in part]) for part in parts]
        return [
            min((found[i] for i in part), key=lambda batch, mean=mean: abs(area(batch) - mean))
            for part, mean in zip(parts, means, strict=True)
        ]

    @contextmanager
    def prepared(self, variant: Variant) -> Iterator[None]:
        """Set the precision and whatever else the variant asks for, and put it back."""
        self._switch(variant, True)
        try:
            with precision(variant.precision, DEVICE):
                yield
        finally:
            self._switch(variant, False)

    def _switch(self, variant: Variant, on: bool) -> None:
        if not variant.library:
            self.plain.set_kernel(variant.attention)
            set_fused(self.optimizers["plain"], variant.fused)
        elif variant.option == "detached":
            self.ours.adapter_gradient = not on
        elif variant.option == "recomputed":
            self.ours.checkpoint_activations = on
        elif variant.option.startswith("compiled"):
            for part in (self.ours.encoders["t"].backbone.encoder, *stacks(self.ours)):
                part._compiled_call_impl = self._compiled(part) if on else None

    def _compiled(self, part: nn.Module) -> Callable:
        """The compiled form of a part; kept, so that only the first use compiles."""
        if part not in self.compiled:
            torch._dynamo.config.recompile_limit = 64  # counted over all parts
            self.compiled[part] = torch.compile(part._call_impl, dynamic=True)
        return self.compiled[part]

    def step(self, variant: Variant, batch: Batch) -> float:
        """Take one step; return the loss."""
        optimizer = self.optimizers["ours" if variant.library else "plain"]
        loss = self.loss(variant, batch)
        loss.backward()
        if variant.library:
            nn.utils.clip_grad_norm_(self.trained, self.config.stage2.clip)
        optimizer.step()
        optimizer.zero_grad()  # the other model may need the memory
        return loss.item()

    def loss(self, variant: Variant, batch: Batch) -> Tensor:
        """The whole loss of a batch."""
        if variant.library:
            parts = batch.parts(PARTS if variant.option == "in parts" else 1)
            return self.objective(_InParts(self.ours)(parts), batch.y)["loss"]
        inputs, masks = dict(batch.inputs), {m: batch.mask(m) for m in MODALITIES}
        if not variant.tokenised:
            inputs["t"] = self.tokenised(batch)
        y_hat, reps = self.plain(inputs, masks)
        c = self.config.contrast
        if variant.loss == "loop":
            return task_loss(y_hat, batch.y) + c.lam * plain_loss(reps, batch.y.to(DEVICE), c.tau)
        return task_loss(y_hat, batch.y) + c.lam * contrastive_loss(reps, batch.y, tau=c.tau)

    def tokenised(self, batch: Batch) -> Tensor:
        """The batch's token ids, made anew from its texts and padded as the batch is."""
        texts = [self.texts[i] for i in batch.ids]
        rows = tokenise(texts, self.tokenizer, max_tokens=self.sizes.tokens)
        tokens = torch.zeros(batch.inputs["t"].shape, dtype=torch.int64)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(row)] = torch.from_numpy(row)
        return tokens.to(DEVICE)


def plain_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW as released: one rate for the encoders, one for the rest, adapters left out."""
    encoders = list(model.encoders.parameters())
    seen = {id(p) for p in encoders}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in seen]
    groups = [{"params": encoders, "lr": config.stage2.lr_text}]
    groups += [{"params": rest, "lr": config.stage2.lr_heads}]
    return torch.optim.AdamW(groups, weight_decay=config.stage2.weight_decay)


def set_fused(optimizer: torch.optim.AdamW, fused: bool) -> None:
    """Choose AdamW's fused kernel or PyTorch's default one; they want step counts elsewhere."""
    for group in optimizer.param_groups:
        group["fused"] = fused or None
    for state in optimizer.state.values():
        state["step"] = state["step"].to(DEVICE if fused else "cpu")


def stacks(model: nn.Module) -> list[nn.Module]:
    """All stacks of Transformer layers."""
    return [part for part in model.modules() if isinstance(part, TransformerStack)]


def area(batch: Batch) -> int:
    """Padded vision and audio steps of a batch, a measure of its cost."""
    return sum(batch.inputs[m].shape[:2].numel() for m in ("v", "a"))


def real_share(batch: Batch, longest: dict[str, int]) -> float:
    """Share of real vision and audio steps, were the batch padded to the maximum."""
    steps = sum(int(batch.lengths[m].sum()) for m in ("v", "a"))
    return steps / (len(batch) * (longest["v"] + longest["a"]))


# --- measuring ----------------------------------------------------------------------------------


def parity() -> dict:
    """Plain and library agree at equal weights, where padding is let in: a tiny model, fp32."""
    quiet = dict(padding="released", encoder_dropout=0.0, adapter_init_std=0.02)
    with tempfile.TemporaryDirectory() as name, precision("fp32", DEVICE):
        bench = Bench(Path(name), TINY, ("plain", "library"), **quiet)
        bench.plain.eval(), bench.ours.eval()
        found = []
        for variant in ("plain", "attention", "library"):
            bench.plain.set_kernel(VARIANTS[variant].attention)
            model = bench.ours if VARIANTS[variant].library else bench.plain
            model.zero_grad()
            loss = bench.loss(VARIANTS[variant], bench.batches["padded"][0])
            loss.backward()
            named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            named = plain_state(named) if model is bench.ours else named
            found.append((loss.item(), named))
    (loss, gradient), others = found[0], found[1:]
    result = {
        "loss, relative": max(abs(x / loss - 1) for x, _ in others),
        "gradient, relative": max(distance(gradient, g) for _, g in others),
    }
    assert max(result.values()) < 1e-4, result
    return result


def distance(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over the norm of the first."""
    assert x.keys() == y.keys(), x.keys() ^ y.keys()
    difference = sum((x[name] - y[name]).square().sum() for name in x)
    return float((difference / sum(g.square().sum() for g in x.values())).sqrt())


def seconds_of(bench: Bench, variant: Variant, batches: list[Batch]) -> tuple[float, float]:
    """Mean seconds of a step over some batches, by the clock and of the processor."""
    synchronise()
    start, busy = time.perf_counter(), time.process_time()
    for batch in batches:
        loss = bench.step(variant, batch)
        assert math.isfinite(loss), variant
    synchronise()
    n = len(batches)
    return (time.perf_counter() - start) / n, (time.process_time() - busy) / n


def take_turns(bench: Bench, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Time all variants round by round; each is warmed up before, on a CPU with few batches."""
    spent: dict[str, dict[str, list[float]]] = {name: {"clock": [], "cpu": []} for name in names}
    for turn in range(bench.sizes.rounds + 1):
        for name in names:
            variant = VARIANTS[name]
            batches = bench.chosen(variant.batches)
            if not turn and variant.batches == "random" and not GPU:
                batches = batches[:1]
            if not turn and variant.batches == "padded" and not GPU:
                batches = bench.batches["bucketed"][:1]  # else as long as all others together
            with bench.prepared(variant):
                if name in COMPILED:  # it compiles again after any other variant's switch
                    seconds_of(bench, variant, batches)
                clock, cpu = seconds_of(bench, variant, batches)
            print(f"round {turn}  {name:<12} {clock:8.3f} s", flush=True)
            if turn:
                spent[name]["clock"].append(clock)
                spent[name]["cpu"].append(cpu)
    return spent


def timed(bench: Bench, names: list[str]) -> list[dict]:
    """A row per variant: medians, and ratios to its base and to plain, of the same rounds."""
    spent = take_turns(bench, names)
    rows = []
    for name in names:
        own, base = spent[name], spent[VARIANTS[name].base or name]
        row = {"variant": name, **asdict(VARIANTS[name])}
        for how in ("clock", "cpu"):
            row |= {
                f"{how}_seconds": statistics.median(own[how]),
                f"{how}_factor": median_ratio(base[how], own[how]),
                f"{how}_plain_over": median_ratio(spent["plain"][how], own[how]),
            }
        rows.append(row)
    return rows


def measure(name: str, quick: bool, threads: int) -> dict:
    """Peak memory of a variant, in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--threads", str(threads)]
    done = subprocess.run(command + ["--quick"] * quick, stdout=subprocess.PIPE, text=True)
    result = {"variant": name, "peak_bytes": None}  # as when it was killed for lack of memory
    if not done.returncode:
        result = json.loads(done.stdout.splitlines()[-1])
    print(result, flush=True)
    return result


def one(name: str, sizes: Sizes) -> dict:
    """Peak memory of a variant, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return peak_of(Bench(Path(folder), sizes, (name,)), name)


def peak_of(bench: Bench, name: str) -> dict:
    """Peak of one step on the variant's largest batch; a small one before fills the optimiser."""
    variant = VARIANTS[name]
    with bench.prepared(variant):
        bench.step(variant, bench.batches["bucketed"][0])
        base = forget_peak()
        bench.step(variant, bench.batches[variant.batches][-1])
        return {"variant": name, "peak_bytes": peak(), "before_bytes": base}


def measure_here(names: list[str], sizes: Sizes) -> list[dict]:
    """Peak memory of variants on a GPU, whose allocator counts exactly: one model at a time."""
    rows = []
    for library in (False, True):
        chosen = tuple(name for name in names if VARIANTS[name].library == library)
        gc.collect()
        print(f"{torch.cuda.memory_allocated() / 1e6:.0f} MB held before", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), sizes, chosen)
            rows += [peak_of(bench, name) for name in chosen]
            del bench
    print(pd.DataFrame(rows).to_string(), flush=True)
    return rows


def run(sizes: Sizes, names: list[str], quick: bool, keep_memory: bool = False) -> dict:
    """All measurements."""
    facts = machine_of(torch.get_float32_matmul_precision())
    del facts["product precision"]  # each variant has its own
    result = {"machine": facts, "sizes": asdict(sizes), "parity": parity()}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), sizes, tuple(names))
        result["real_share"] = bench.valid
        result["areas"] = {k: [area(b) for b in bench.chosen(k)] for k in bench.batches}
        result["mean_areas"] = {k: np.mean([*map(area, v)]) for k, v in bench.batches.items()}
        result["timed"] = timed(bench, names)
        del bench
    if GPU:
        result["memory"] = measure_here(names, sizes)
    elif keep_memory:
        earlier = published("training_step")
        result["memory"] = earlier["memory"]
        result["memory_machine"] = earlier.get("memory_machine", earlier["machine"])
    else:
        alone = ["plain", "ours"] if quick else names
        result["memory"] = [measure(name, quick, torch.get_num_threads()) for name in alone]
    return result


# --- page and figure ----------------------------------------------------------------------------


def stem(result: dict) -> str:
    """The name of the results' files: that of a CPU with bf16 is the script's own."""
    name, measured = name_of(result, "training_step"), {row["variant"] for row in result["timed"]}
    return name if "ours bf16" in measured else f"{name}_fp32"


def table_of(result: dict) -> pd.DataFrame:
    """Times and memory of all variants, described as today."""
    rows = pd.DataFrame(result["timed"]).set_index("variant")
    memory = pd.DataFrame(result["memory"]).set_index("variant")
    labels = [VARIANTS[name].label for name in rows.index]
    return rows.assign(gb=memory["peak_bytes"] / 1e9, label=labels)


def draw(result: dict) -> plt.Figure:
    """Seconds and memory of every variant, from plain to ours, options below."""
    use_style()
    rows = table_of(result)[::-1]
    roles = [role_of(name) for name in rows.index]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True)
    labels = [f"{n}: {x}" if VARIANTS[n].base else n for n, x in rows["label"].items()]
    for ax, column, form in ((left, "clock_seconds", "{:.3g}"), (right, "gb", "{:.1f}")):
        bars = ax.barh(labels, rows[column].fillna(0), color=[ROLES[role] for role in roles])
        texts = ["not measured" if math.isnan(x) else form.format(x) for x in rows[column]]
        ax.bar_label(bars, texts, padding=3, fontsize=9)
        ax.margins(x=0.12)
        ax.grid(axis="y", visible=False)
    left.set(title="Seconds a step", xlabel="by the clock, medians")
    whose = "PyTorch on the GPU in the" if on_gpu(result) else "a process that takes its"
    right.set(title="Peak memory", xlabel=f"GB of {whose} largest step")
    patches = [Patch(color=color, label=role) for role, color in ROLES.items()]
    fig.legend(
        handles=patches,
        title=device_of(result),
        title_fontsize=10,
        ncols=2,
        loc="outside lower center",
    )
    return fig


def role_of(name: str) -> str:
    """What a variant's bar is, as the legend says it."""
    plain, rung, ours, option = ROLES
    if VARIANTS[name].option:
        return option
    return plain if name == "plain" else ours if name in ("ours", "ours bf16") else rung


def page(result: dict) -> str:
    """The page of the benchmark; every number in it comes from the result."""
    rows = table_of(result)
    sizes = result["sizes"]
    facts = {**result["machine"], "parity of both models, at most": max(result["parity"].values())}
    if before := result.get("memory_machine"):
        facts["peak memory was measured before"] = ", ".join(map(str, before.values()))
    gpu = on_gpu(result)
    return PAGE.format(
        name=stem(result),
        facts="\n".join(f"- {key}: {short(value)}" for key, value in facts.items()),
        verdicts=gpu_verdicts(rows) if gpu else verdicts(rows),
        ladder=lines(rows[rows["option"] == ""], "variant | measure", gpu),
        options=lines(rows[rows["option"] != ""], "option |", gpu),
        share=f"{result['real_share']:.0%}",
        representative=representative(result),
        compiled="Compiling is in no time above."
        if set(COMPILED) & set(rows.index)
        else "What torch.compile would contribute was not measured here.",
        vision=sizes["steps"][0],
        audio=sizes["steps"][1],
        **{k: sizes[k] for k in ("B", "d", "layers", "tokens", "rounds", "batches", "utterances")},
        **(GPU_TEXTS if gpu else CPU_TEXTS),
    )


def representative(result: dict) -> str:
    """Which batches were timed, and how large they are against all of their kind."""
    if not (means := result.get("mean_areas")):  # measured by an earlier version of this script
        return "evenly spread over the lengths that occur, so one is the middle one"
    sizes = ", ".join(f"{k} {np.mean(v) / means[k]:.2f}" for k, v in result["areas"].items())
    return (
        "of as many equal parts of their order by size the most average ones; their padded vision "
        f"and audio steps over the mean of all: {sizes}"
    )


def verdicts(rows: pd.DataFrame) -> str:
    """What was asked for beside what was found."""
    less = (rows["gb"]["plain"] / rows["gb"]).map("{:.1f}".format).replace("nan", "")
    found = [
        f"| plain / {name} | at least 5 | {judged(rows['clock_plain_over'][name])} "
        f"| {rows['cpu_plain_over'][name]:.1f} | {less[name]} |"
        for name in ("library", "ours", "ours bf16", "compiled fp32")
        if name in rows.index
    ]
    head = "| | asked | by the clock | by processor time | peak memory, plain over this |"
    return "\n".join([head, "|---|---:|---:|---:|---:|", *found])


def judged(ratio: float) -> str:
    """A ratio, and whether it is what was asked for."""
    return f"{ratio:.1f}, {'met' if ratio >= ASKED else '**missed**'}"


def gpu_verdicts(rows: pd.DataFrame) -> str:
    """Memory against the paper's card, an RTX 2080 Ti, and time and memory against plain."""
    found = []
    for name, kind in (
        ("plain", "plain, fp32"),
        ("library", "the library, fp32"),
        ("ours", "ours, fp32-fast"),
        ("ours bf16", "ours, bf16"),
    ):
        row, asked = rows.loc[name], "at most 11" if name in ("library", "ours") else ""
        ratio = row["clock_plain_over"]
        found.append(
            f"| {kind} | {asked} | {row['gb']:.2f} | {rows['gb']['plain'] / row['gb']:.1f} "
            f"| {row['clock_seconds'] * 1000:.3g} "
            f"| {f'{ratio:.1f}' if name == 'plain' else judged(ratio)} |"
        )
    head = "| a step | asked, peak GB | found | plain over this | ms "
    head += f"| plain over this, asked {ASKED} |"
    return "\n".join([head, "|---|---:|---:|---:|---:|---:|", *found])


def lines(rows: pd.DataFrame, first: str, gpu: bool) -> str:
    """A table with a line per variant; on a GPU without the processor's time."""
    head = [first, "on top of", "seconds", "processor seconds", "factor", "over plain", "peak GB"]
    numbers = 5
    if gpu:
        head.remove("processor seconds")
        numbers -= 1
    cells = [cells_of(name, row, gpu) for name, row in rows.iterrows()]
    rule = "|---|---|---|" + numbers * "---:|"
    return "\n".join([_line(head), rule, *map(_line, cells)])


def cells_of(name: str, row: pd.Series, gpu: bool) -> list[str]:
    """A variant's cells in the table of `lines`."""
    return [
        name,
        row["label"] if row["base"] else "",
        row["base"],
        f"{row['clock_seconds']:.3g}",
        *([] if gpu else [f"{row['cpu_seconds']:.3g}"]),
        f"{row['clock_factor']:.2f}" if row["base"] else "",
        f"{row['clock_plain_over']:.1f}",
        "" if math.isnan(row["gb"]) else f"{row['gb']:.1f}",
    ]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def short(value: object) -> str:
    """A number in few digits."""
    return f"{value:.2g}" if isinstance(value, float) else str(value)


PAGE = """# One fine-tuning step: a plain implementation and ours{where}

Written by `python bench/training_step.py`; every number below comes from
`results/bench/{name}.json`.

Stage 2 at the released shapes (in the library with `padding: masked`): batches of {B}, {vision}
vision and {audio} audio steps, {tokens} tokens, a text backbone of {layers} layers, width {d},
adapters of two layers as wide, frozen. A step is forward, loss, backward and AdamW; reading the
batch from disk is not in it. Lengths of the {utterances} generated utterances vary as in a corpus
whose maximum is mean + 3 deviations: {share} of the vision and audio steps are real. Weights are
random, which changes no time.

*Plain* is written for this benchmark from the facts that the audit lists: no trimming, masks
ignored in adapters and means, attention written out, default fp32, a Python loop over the pair
matrix, text tokenised in the step. At equal weights, with padding let in, the library gives the
same loss and gradient (checked at each start, see below).

{facts}

![seconds and memory of every variant]({name}.png)

## Asked and found

{verdicts}
{asked}
## What each measure contributes

Each line adds one measure to the line before. Factor: how many times faster than that line; the
last column but one: than plain. Medians of {rounds} rounds in which all take turns; a step is the
mean over batches of the variant's kind, {batches} in number (one where all are alike):
{representative}.

{ladder}

A factor belongs to its place: behind another measure the same one may contribute more or less.
{kernels}

## Options

Each alone on top of one of the above.

{options}

Cutting the gradient between frozen adapters and the backbones changes what is trained, not only
how fast; it is a setting, and not the default. {compiled}
"""
CPU_TEXTS = {
    "where": "",
    "asked": "",
    "kernels": """\
PyTorch's fused attention on a CPU takes no dropout: layers with dropout, all of the plain model's,
fall back to the same matrix products. Only the library's frozen adapters, in evaluation mode, use
it, and in bf16 not even these, since the kernel's way back is slow there. A GPU's kernels take
dropout. Peak memory is that of the whole process on the largest batch of the variant's kind,
weights and optimiser included; an empty cell was not measured.""",
}
GPU_TEXTS = {
    "where": " on a GPU",
    "asked": """
The paper's card, an RTX 2080 Ti, has 11 GB. Milliseconds are by the clock, the GPU waited for.
Plain's batches are padded to the maximum, the others to their longest; the largest of them, whose
memory is asked about, is as long as the maximum.
""",
    "kernels": """\
`fp32` is full single precision, `fp32-fast` is TF32. Fused AdamW takes the place of PyTorch's
default on a GPU, which works on many tensors at once. Peak memory is the most that PyTorch's
allocator held in a step on the largest batch of the variant's kind, weights and optimiser included,
with only its own model on the GPU; CUDA's own context, some hundred MB, is not in it.""",
}


def write(result: dict) -> None:
    """Write the record, the figure and the page."""
    publish(stem(result), result, page(result), draw(result))


def main() -> None:
    """Measure and write; or one variant for the parent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    parser.add_argument("--page", action="store_true", help="redraw from the committed results")
    parser.add_argument("--rounds", type=int, help="how often all variants take their turn")
    parser.add_argument("--batches", type=int, help="steps per variant and turn")
    parser.add_argument(
        "--skip", nargs="*", default=COMPILED, choices=OPTIONS, help="options left out"
    )
    parser.add_argument(
        "--keep-memory", action="store_true", help="a CPU's peaks as committed: half of the time"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", message=".*(enable_nested_tensor|Online softmax).*")
    sizes = TINY if given.quick else Sizes()
    chosen = {k: v for k in ("rounds", "batches") if (v := getattr(given, k))}
    if given.one:
        print(json.dumps(one(given.one, sizes)))
        return
    if given.page:
        for result in committed("training_step"):
            write(result)
        return
    has_bf16 = chosen_precision(RuntimeConfig(precision="auto")) == "bf16"
    names = [
        name
        for name, variant in VARIANTS.items()
        if name not in given.skip and (has_bf16 or variant.precision != "bf16")
    ]
    result = run(replace(sizes, **chosen), names, given.quick, given.keep_memory)
    if given.quick:
        draw(result)
        print(page(result))
    else:
        write(result)


if __name__ == "__main__":
    main()
