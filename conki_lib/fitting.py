"""One `fit` for both stages: seeded, resumable, the same on a CPU, a GPU or several processes."""

import contextlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    set_seed,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from conki_lib.config import Precision, RuntimeConfig, StageConfig, headless
from conki_lib.data import Batch
from conki_lib.disk import explained
from conki_lib.metrics import metrics_for
from conki_lib.model import Output, parameter_groups
from conki_lib.states import StateReader

_GO_ON = (
    "free some space, or move the runs and name their folder by CONKI_RUNS, and start again: the "
    "run goes on from its last complete checkpoint"
)
# processes wait so long for one of them, which may wait for another run's stage 1
_WAITING = timedelta(days=1)
# of an output, the truth and the share (see `_share`)
Criterion = Callable[[Output, Tensor, float], dict[str, Tensor]]


@dataclass
class Job:
    """What `fit` works on: a model, its data, how it is optimised, and the folder that
    remembers."""

    title: str
    model: nn.Module
    loaders: dict[str, DataLoader]
    plan: StageConfig
    runtime: RuntimeConfig
    criterion: Criterion
    label_range: tuple[float, float]
    folder: Path
    readers: dict[str, StateReader] = field(default_factory=dict)

    def predict(self, split: str) -> pd.DataFrame:
        """Predict a split: id, y, y_hat, in the split's order."""
        return predict(self.model, self.loaders[split], self.readers.get(split))

    def score(self, split: str) -> dict[str, float]:
        """The field's metrics on a split."""
        return measure(self.predict(split), self.label_range)


def measure(table: pd.DataFrame, label_range: tuple[float, float]) -> dict[str, float]:
    """The field's metrics of a table of predictions, see `metrics_for`."""
    return metrics_for(label_range)(y_hat=table["y_hat"].to_numpy(), y=table["y"].to_numpy())


@torch.no_grad()
def predict(
    model: nn.Module, loader: DataLoader, reader: StateReader | None = None
) -> pd.DataFrame:
    """Predict every utterance of a loader's split once, in eval mode.

    Args:
        model: any model of this library.
        loader: one split.
        reader: cached states to use in place of the backbones.

    Returns:
        Columns id, y, y_hat, in the split's order.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    read = reader or _itself
    count = len(loader.dataset)
    y_hat, y = np.zeros(count, np.float32), np.zeros(count, np.float32)
    ids = np.empty(count, object)
    for batch in loader:
        rows = batch.index.numpy()
        y[rows], ids[rows] = batch.y.numpy(), batch.ids
        y_hat[rows] = model(read(batch.to(device))).y_hat.float().cpu().numpy()
    model.train(was_training)
    return pd.DataFrame({"id": ids, "y": y, "y_hat": y_hat})


def _itself(batch: Batch) -> Batch:
    return batch


def fit(job: Job) -> tuple[int, list[dict]]:
    """Train a job's model; resume where an earlier attempt stopped; leave the best epoch's
    weights in it.

    The best epoch is the one of lowest validation MAE. After every epoch a checkpoint is written
    aside and renamed, so that a killed run goes on as if it had never stopped.

    Returns:
        The best epoch (counted from 1) and one row of history per epoch.

    Raises:
        FloatingPointError: a loss or the gradient is not finite; names epoch and step.
        DiskError: a checkpoint cannot be written; what was complete is kept.
    """
    plan, runtime = job.plan, job.runtime
    accelerator = make_accelerator(runtime)
    set_seed(runtime.seed, device_specific=True)
    job.model.checkpoint_activations = runtime.checkpoint_activations
    optimizer = make_optimizer(job.model, plan)
    loader = job.loaders["train"]
    loader.dataset.share = (accelerator.process_index, accelerator.num_processes)
    factor = learning_rate_factor(plan, steps=len(loader))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    forward, optimizer = accelerator.prepare(_InParts(job.model).to(accelerator.device), optimizer)
    accelerator.register_for_checkpointing(schedule)
    history = _resume(job, accelerator)
    for epoch in range(len(history) + 1, plan.epochs + 1):
        if plan.patience and len(history) - _best_epoch(history) >= plan.patience:
            break
        started = time.perf_counter()
        row = {
            "epoch": epoch,
            **_train_epoch(job, accelerator, forward, optimizer, schedule, epoch),
        }
        row |= {f"valid_{k}": v for k, v in job.score("valid").items()}
        row |= {"seconds": time.perf_counter() - started, "processes": accelerator.num_processes}
        history += broadcast_object_list([row])  # else processes could choose other epochs
        with explained("the checkpoint", job.folder, _GO_ON):
            if _best_epoch(history) == epoch:
                _save_weights(job)
            _checkpoint(job, accelerator, history)
        _report(job, history)
    if not history:  # zero epochs: the model as it starts
        with explained("the weights", job.folder, _GO_ON):
            _save_weights(job)
    accelerator.wait_for_everyone()
    job.model.load_state_dict(load_file(job.folder / "model.safetensors"))
    return _best_epoch(history), history


def make_accelerator(runtime: RuntimeConfig) -> Accelerator:
    """What knows the device and the other processes; the same for everything that a run does.

    Precision and accumulation are the run's own settings: a file of `accelerate config`, or the
    environment, must not change what a record does not tell.

    Raises:
        ValueError: a GPU is asked for, and there is none.
    """
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch finds no GPU: set device to auto or cpu")
    handlers = [
        DistributedDataParallelKwargs(find_unused_parameters=True),
        InitProcessGroupKwargs(timeout=_WAITING),
    ]
    return Accelerator(
        cpu=runtime.device == "cpu", mixed_precision="no", dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=handlers,
    )  # fmt: skip


def device_name(device: torch.device) -> str:
    """A device as records name it: ``"cpu"``, or the GPU's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _best_epoch(history: list[dict]) -> int:
    maes = [math.inf if math.isnan(h["valid_mae"]) else h["valid_mae"] for h in history]
    return int(np.argmin(maes)) + 1 if maes else 0


def make_optimizer(model: nn.Module, plan: StageConfig) -> torch.optim.AdamW:
    """AdamW with one learning rate per parameter group; no decay on biases and norms; rate 0
    freezes."""
    groups = []
    for name, parameters in parameter_groups(model).items():
        lr = getattr(plan, f"lr_{name}")
        trained = [p for _, p in parameters if p.requires_grad]
        if lr == 0:
            for p in trained:
                p.requires_grad_(False)
            continue
        for decay in (True, False):
            chosen = [p for p in trained if (p.ndim > 1) == decay]
            weight_decay = plan.weight_decay if decay else 0.0
            groups.append({"params": chosen, "lr": lr, "weight_decay": weight_decay, "name": name})
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise ValueError("nothing is trained: every learning rate is 0 or its group is frozen")
    return torch.optim.AdamW(groups, fused=True)


def learning_rate_factor(plan: StageConfig, steps: int) -> Callable[[int], float]:
    """Warm-up from 0, then linear or cosine decay to 0, or none, as a factor by step."""
    warmup, total = round(plan.warmup_epochs * steps), max(1, plan.epochs * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total - warmup)
        if plan.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return max(0.0, 1.0 - done) if plan.schedule == "linear" else 1.0

    return factor


def _train_epoch(job, accelerator, forward, optimizer, schedule, epoch) -> dict[str, float]:
    loader, read = job.loaders["train"], job.readers.get("train", _itself)
    loader.batch_sampler.set_epoch(epoch)
    forward.train()
    trained = [p for p in forward.parameters() if p.requires_grad]
    sums: dict[str, float] = {}
    seen = 0
    for step, batch in enumerate(_bar(loader, f"{job.title} epoch {epoch}"), start=1):
        n, share = _share(accelerator, batch)
        there = batch.to(accelerator.device, non_blocking=True)
        output = forward([read(part) for part in there.parts(job.runtime.accumulate)])
        losses = job.criterion(output, batch.y, share)  # labels not there: see `contrastive_loss`
        optimizer.zero_grad()
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(trained, job.plan.clip or math.inf)
        values = _over_processes(accelerator, {**losses, "gradient_norm": norm})
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(
                f"not finite: {values} in epoch {epoch}, step {step}: lower the learning rates or "
                f"raise tau; the last good checkpoint is kept in {job.folder}"
            )
        optimizer.step()
        schedule.step()
        for k, v in values.items():
            sums[k] = sums.get(k, 0.0) + v * n
        seen += n
    return {k: v / seen for k, v in sums.items()}


class _InParts(nn.Module):
    """Run a model on the parts of a batch; backward recomputes them one by one.

    No more than one part's activations are held, and since the losses see all outputs at once,
    L_con still contrasts the whole batch (cached gradients, Gao et al. 2021). Dropout is drawn
    again as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, parts: list) -> Output:
        """Join the outputs of all parts."""
        if len(parts) == 1:
            return self.model(parts[0])
        outputs = [checkpoint(self.model, part, use_reentrant=False) for part in parts]
        y_hat, reps = (torch.cat([getattr(o, x) for o in outputs]) for x in ("y_hat", "reps"))
        return Output(y_hat, reps, outputs[0].names)


def _share(accelerator: Accelerator, batch: Batch) -> tuple[int, float]:
    """Utterances in all processes' batches; this one's part of them times the number of processes.

    A mean over the own utterances times this share, averaged over processes as DDP does, is the
    mean over all utterances.
    """
    world = accelerator.num_processes
    if world == 1:
        return len(batch), 1.0
    n = int(accelerator.reduce(torch.tensor(len(batch), device=accelerator.device), "sum"))
    return n, len(batch) * world / n


def _over_processes(accelerator: Accelerator, losses: dict[str, Tensor]) -> dict[str, float]:
    values = torch.stack([v.detach() for v in losses.values()])
    return dict(zip(losses, accelerator.reduce(values, "mean").tolist(), strict=True))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"))


def _resume(job: Job, accelerator: Accelerator) -> list[dict]:
    found = _checkpoints(job.folder)
    if not found:
        return []
    accelerator.load_state(str(found[-1]))
    history = json.loads((found[-1] / "history.json").read_text())
    if is_main():
        before = history[-1]["processes"]
        others = "" if before == accelerator.num_processes else f" (processes so far: {before})"
        tqdm.write(f"resuming {job.folder.name} after epoch {len(history)}{others}")
    return history


def _checkpoint(job: Job, accelerator: Accelerator, history: list) -> None:
    """Write all that is needed to go on; the earlier checkpoint stays until the new one is
    whole."""
    aside, earlier = job.folder / ".checkpoint.new", _checkpoints(job.folder)
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (aside / "history.json").write_text(json.dumps(history))
        aside.rename(job.folder / f"checkpoint-{len(history):04d}")
        remove_checkpoints(earlier)
    accelerator.wait_for_everyone()


def remove_checkpoints(paths: list[Path] | Path) -> None:
    """Delete some checkpoints, or all of a finished run's folder."""
    for path in _checkpoints(paths) if isinstance(paths, Path) else paths:
        shutil.rmtree(path, ignore_errors=True)


def _save_weights(job: Job) -> None:
    """Write the model's weights, in one process alone."""
    if is_main():
        aside, state = job.folder / ".model.safetensors.new", job.model.state_dict()
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, aside)
        aside.replace(job.folder / "model.safetensors")


def is_main() -> bool:
    """Is this the process that writes and reports?"""
    return int(os.environ.get("RANK", 0)) == 0


# ---- precision and progress ---------------------------------------------------------------------


def chosen_precision(runtime: RuntimeConfig) -> Precision:
    """What ``precision: auto`` means here: bf16 where the device has instructions for it.

    A processor that has none computes bf16 many times more slowly than fp32.
    """
    if runtime.precision != "auto":
        return runtime.precision
    if runtime.device != "cpu" and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32-fast"
    if platform.machine().lower() in ("x86_64", "amd64"):
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if has else "fp32"


@contextlib.contextmanager
def precision(name: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Set how matrix products are computed on a device, and put it back after.

    fp32: full single precision. fp32-fast: oneDNN on a CPU (checked: still single precision),
    TF32 on a GPU. bf16: autocast to bfloat16; losses and norms stay in fp32. On a CPU attention is
    then the plain one: the fused one is far slower on its way back through short sequences.
    """
    before = torch.get_float32_matmul_precision()
    gpu = torch.device(device).type == "cuda"
    torch.set_float32_matmul_precision({"fp32": "highest"}.get(name, "high" if gpu else "medium"))
    if name == "fp32-fast" and not gpu and _product_error() > 1e-5:
        torch.set_float32_matmul_precision("highest")  # this CPU would really round to bfloat16
    try:
        with contextlib.ExitStack() as stack:
            if name == "bf16":
                # a cache of cast weights would last as long as this context: they would stay as
                # they were before the first step
                autocast = torch.autocast("cuda" if gpu else "cpu", torch.bfloat16, True, False)
                stack.enter_context(autocast)
                if not gpu:
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product_error() -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=generator)
    exact = x.double() @ x.double()
    return float(((x @ x) - exact).norm() / exact.norm())


def _bar(loader: DataLoader, title: str) -> Iterable[Batch]:
    return tqdm(loader, title, leave=False, disable=headless() or not is_main(), mininterval=0.5)


def _report(job: Job, history: list[dict]) -> None:
    row = history[-1]
    terms = " ".join(f"{k}={row[k]:.3f}" for k in ("loss_task", "loss_con") if k in row)
    best = "  best so far" if _best_epoch(history) == row["epoch"] else ""
    if is_main():
        tqdm.write(
            f"{job.title} epoch {row['epoch']}/{job.plan.epochs} {terms} "
            f"valid_mae={row['valid_mae']:.3f} valid_corr={row['valid_corr']:.3f} "
            f"{row['seconds']:.1f}s{best}"
        )
