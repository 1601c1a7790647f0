"""Both stages of ConKI, through one `fit`: seeded, resumable, the same on a CPU, a GPU or several.

Stage 1 (`inject_knowledge`) trains adapters on the external corpus with frozen backbones; stage 2
(`fine_tune`) trains the model on the target corpus with L = L_task + lambda L_con. Source: paper,
training.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conki_lib import records
from conki_lib.config import ContrastConfig, RunConfig, StageConfig
from conki_lib.data import FeatureStore, corpus_path, make_loader, open_store, tokenise
from conki_lib.data.packing import SPLITS
from conki_lib.encoders import backbone_fingerprint, load_tokenizer
from conki_lib.fitting import (
    Job,
    chosen_precision,
    device_name,
    fit,
    is_main,
    make_accelerator,
    measure,
    precision,
    remove_checkpoints,
)
from conki_lib.losses import contrastive_loss, task_loss
from conki_lib.model import (
    Output,
    build_model,
    freeze_for_fine_tuning,
    freeze_for_injection,
    injected_state,
    load_injected,
)
from conki_lib.records import Record
from conki_lib.states import StateReader, cached_states

# ---- the two stages -----------------------------------------------------------------------------


def inject_knowledge(config: RunConfig) -> Record:
    """Run stage 1 or load it: train adapters and their heads on the external corpus with L_task.

    Only modalities that both corpora hold take part. The record's weights carry everything that
    stage 2 starts from.

    Raises:
        ValueError: no external corpus is set, or it holds none of the modalities.
        FileNotFoundError: a corpus is missing; says how to get it.
        FloatingPointError: the loss is not finite; the last good checkpoint is kept.

    Source: paper, training, stage 1.
    """
    if config.data.external is None:
        raise ValueError("external is not set: this run has no stage 1; set external to a corpus")
    config, stores = resolve(config)
    return _run_or_load(config.for_stage1(), 1, stores, _stage1)


def fine_tune(config: RunConfig) -> Record:
    """Run stage 2 or load it: train on the target corpus with L = L_task + lambda L_con.

    Stage 1 runs first where an external corpus is set. The epoch is chosen by validation MAE;
    test metrics are computed once, for that epoch.

    Raises:
        FileNotFoundError: a corpus is missing; says how to get it.
        ValueError: the target corpus does not hold a wanted modality.
        FloatingPointError: the loss is not finite; the last good checkpoint is kept.

    Source: paper, training, stage 2.
    """
    config, stores = resolve(config)
    return _run_or_load(config, 2, stores, _stage2)


def load_model(record: Record) -> nn.Module:
    """Rebuild the model of a finished run, in eval mode.

    Raises:
        FileNotFoundError: the record is committed but its weights are not on this machine.
    """
    if record.model_path is None:
        raise FileNotFoundError(
            f"the weights of {record.variant!r}, seed {record.seed}, are not on this machine "
            "(weights are never committed): train them by "
            f"`make reproduce PROFILE={record.profile} FRESH=1`"
        )
    model = build_model(record.config.model)
    model.load_state_dict(load_file(record.model_path))
    return model.eval()


def resolve(config: RunConfig) -> tuple[RunConfig, dict[str, FeatureStore]]:
    """Open a run's corpora; fill in what follows from them, the input widths, and the precision.

    Raises:
        FileNotFoundError: a corpus is missing; says how to get it.
        ValueError: the target corpus does not hold a wanted modality, or a corpus a split; both
            have one name.
    """
    target = open_store(corpus_path(config.data.target), config.data.fold)
    stores = {config.data.target: target}
    if config.data.external in stores:
        raise ValueError(
            f"external: {config.data.external!r} is the target itself; choose another, or null"
        )
    absent = [m for m in config.model.modalities if m not in target.info.modalities]
    if absent:
        raise ValueError(
            f"modalities: {config.data.target!r} holds {''.join(target.info.modalities)!r}, not "
            f"{''.join(absent)!r}; leave them out of `modalities`"
        )
    if config.data.external is not None:
        stores[config.data.external] = open_store(corpus_path(config.data.external))
    for name, store in stores.items():
        needed = SPLITS if store is target and not config.runtime.tuning else SPLITS[:2]
        if lacking := [split for split in needed if split not in store.splits]:
            raise ValueError(
                f"{name!r}, fold {store.fold!r} of {', '.join(store.folds)}, holds no utterance "
                f"for {' and '.join(lacking)}: {', '.join(needed)} are needed"
            )
    widths = {store.info.name: dict(store.info.widths) for store in stores.values()}
    if len(widths) < len(stores):
        raise ValueError(
            f"target and external both hold a corpus that is called {target.info.name!r}, so their "
            "input widths cannot be told apart: convert one of them with --name"
        )
    return config.replace(widths=widths, precision=chosen_precision(config.runtime)), stores


def fingerprints(config: RunConfig, stores: Mapping[str, FeatureStore]) -> dict[str, str]:
    """What identifies the data of a run that `resolve` opened: its corpora and text backbone.

    Raises:
        FileNotFoundError: the text backbone is nowhere.
    """
    found = {name: store.fingerprint for name, store in stores.items()}
    if "t" in config.model.modalities:
        found[config.model.text_backbone] = backbone_fingerprint(config.model.text_backbone)
    return found


def shared_modalities(config: RunConfig, external: FeatureStore) -> tuple[str, ...]:
    """The modalities that external knowledge can reach."""
    return tuple(m for m in config.model.modalities if m in external.info.modalities)


def _run_or_load(config: RunConfig, stage: int, stores: dict, train: Callable) -> Record:
    accelerator = make_accelerator(config.runtime)
    data = fingerprints(config, stores)
    if len(set(gather_object([records.run_key(config, stage, data)]))) > 1:
        raise ValueError(
            "data, code or precision differ between processes: give all nodes the same corpora and "
            "code, and name the precision"
        )
    folder = records.run_folder(config, stage, data)
    with records.run_lock(folder) if is_main() else contextlib.nullcontext():
        accelerator.wait_for_everyone()  # the others go on once the main process holds the lock
        record = records.load_run(folder)
        if record is None:
            folder.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            with precision(config.runtime.precision, accelerator.device):
                record = train(config, stores, folder, data)
            record.provenance["seconds"] = round(time.perf_counter() - started, 1)
            if is_main():
                records.write_text(folder / "record.json", record.to_json() + "\n")
                remove_checkpoints(folder)
    return record


def _stage1(config: RunConfig, stores: dict, folder: Path, data: dict[str, str]) -> Record:
    external = stores[config.data.external]
    shared = shared_modalities(config, external)
    if not shared:
        raise ValueError(
            f"external: {config.data.external!r} holds {''.join(external.info.modalities)!r}, "
            f"none of {''.join(config.model.modalities)!r}; choose another corpus, or null"
        )
    pan = config.model.pan and (config.stage1.pan or config.stage1.train == "all")
    used = config.replace(modalities=shared, pan=pan)
    set_seed(config.runtime.seed)
    model = build_model(used.model).to(make_accelerator(config.runtime).device)
    freeze_for_injection(model, train=config.stage1.train)
    loaders = make_loaders(used, external, used.stage1, splits=("train", "valid"))
    readers = {}
    if config.stage1.train == "adapters":
        readers = state_readers(model, used, external, loaders)
    job = Job(
        "stage 1", model, loaders, used.stage1, used.runtime, task_only,
        external.info.label_range, folder, readers,
    )  # fmt: skip
    best, history = fit(job)
    metrics = {"valid": job.score("valid")}
    return _record(config, used, 1, folder, data, metrics, best, history)


def _stage2(config: RunConfig, stores: dict, folder: Path, data: dict[str, str]) -> Record:
    injected: tuple[str, ...] = ()
    state = None
    if config.data.external is not None:
        first = inject_knowledge(config)
        injected = shared_modalities(config, stores[config.data.external])
        state = injected_state(load_model(first))
    set_seed(config.runtime.seed)
    model = build_model(config.model)
    if state is not None:
        load_injected(model, state)
    model.adapter_gradient = config.stage2.adapter_gradient
    adapters = injected if config.stage1.train == "adapters" else ()
    freeze_for_fine_tuning(model, injected=adapters, freeze_adapters=config.stage2.freeze_adapters)
    splits = ("train", "valid") if config.runtime.tuning else ("train", "valid", "test")
    loaders = make_loaders(config, stores[config.data.target], config.stage2, splits=splits)
    label_range = stores[config.data.target].info.label_range
    job = Job(
        "stage 2", model, loaders, config.stage2, config.runtime, Objective(config.contrast),
        label_range, folder,
    )  # fmt: skip
    best, history = fit(job)
    tables = [job.predict(split).assign(split=split) for split in splits[1:]]
    table = pd.concat(tables).assign(
        fold=config.data.fold, variant=config.variant, seed=config.runtime.seed
    )
    if is_main():
        records.write_table(folder / "predictions.parquet", table[records.PREDICTION_COLUMNS])
    metrics = {t["split"].iloc[0]: measure(t, label_range) for t in tables}
    return _record(config, config, 2, folder, data, metrics, best, history)


def state_readers(
    model: nn.Module, config: RunConfig, store: FeatureStore, loaders: dict[str, DataLoader]
) -> dict[str, StateReader]:
    """Open the cache of a model's hidden states, computing first what is missing.

    Args:
        model: as stage 1 starts, backbones frozen; is put in eval mode.
        config: resolved, with the model's own modalities.
        store: the corpus.
        loaders: of its splits.

    Returns:
        A reader per split; none where `stage1_cache` is off or states cannot be cached, which is
        printed.

    Raises:
        DiskError: the folder of runs is full or read-only.
    """
    if not config.stage1.cache:
        return {}
    if config.model.padding != "masked":
        print("padding: released: states depend on their batch's padding; recomputing")
        return {}
    model.eval()
    device, readers = next(model.parameters()).device, {}
    dumped = config.model.model_dump(mode="json", exclude={"modalities", "widths", "text_init"})
    for split, loader in loaders.items():
        found = {}
        for m in config.model.modalities:
            unread = ("adapter_", "fusion", "gate") + ("encoder",) * (m == "t")
            key = {
                "data": config.data.model_dump(mode="json", exclude={"target", "fold"}),
                "store": store.fingerprint,
                "split": split,
                "model": {k: v for k, v in dumped.items() if not k.startswith(unread)},
                "tokens": backbone_fingerprint(config.model.text_backbone) if m == "t" else None,
                "precision": config.runtime.precision,
                "device": device_name(device),
            }
            with precision(config.runtime.precision, device):
                found[m] = cached_states(model, loader, key=key, modality=m)
        if any(states is None for states in found.values()):
            return {}
        readers[split] = StateReader(found)
    return readers


def _record(config, used, stage, folder, data, metrics, best, history) -> Record:
    accelerator = make_accelerator(config.runtime)
    extra = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "device": device_name(accelerator.device),
        "processes": max([accelerator.num_processes, *(h.pop("processes") for h in history)]),
        "threads": torch.get_num_threads(),
        "precision": config.runtime.precision,
        "epoch_seconds": [round(h.pop("seconds"), 2) for h in history],
    }
    return Record(
        stage=stage, profile=config.profile, variant=config.variant if stage == 2 else "stage 1",
        fold=config.data.fold, seed=config.runtime.seed, key=records.run_key(config, stage, data),
        config_key=records.config_key(config, stage), settings=used.flat(), data=data,
        code=records.code_hash(), metrics=metrics, best_epoch=best, history=history,
        provenance=records.provenance() | extra, folder=folder,
    )  # fmt: skip


# ---- data and objectives ------------------------------------------------------------------------


def make_loaders(
    config: RunConfig, store: FeatureStore, stage: StageConfig, *, splits: tuple[str, ...]
) -> dict[str, DataLoader]:
    """Loaders of some splits of a store; text is tokenised once, here; only ``train`` is
    shuffled."""
    tokenizer = (
        load_tokenizer(config.model.text_backbone) if "t" in config.model.modalities else None
    )
    loaders = {}
    for name in splits:
        split, tokens = store[name], None
        if tokenizer is not None:
            tokens = tokenise(
                split.table["text"].tolist(), tokenizer, lower_case=config.data.lower_case,
                max_tokens=config.data.max_tokens,
            )  # fmt: skip
        loaders[name] = make_loader(
            split, modalities=config.model.modalities, batch_size=stage.batch_size, tokens=tokens,
            shuffle=name == "train", seed=config.runtime.seed, standardise=config.data.standardise,
            max_steps=config.data.max_steps,
        )  # fmt: skip
    return loaders


def task_only(output: Output, y: Tensor, share: float = 1.0) -> dict[str, Tensor]:
    """L_task alone: the objective of stage 1; `share` as in `Objective`."""
    loss = share * task_loss(output.y_hat, y)
    return {"loss": loss, "loss_task": loss}


@dataclass
class Objective:
    """L = L_task + lambda L_con, of a model's output and the truth. Source: paper, losses."""

    contrast: ContrastConfig

    def __call__(self, output: Output, y: Tensor, share: float = 1.0) -> dict[str, Tensor]:
        """The whole loss and both its terms; with lambda 0, L_con is measured but not minimised.

        `share` weighs the mean over this process's utterances; L_con is that of all processes.
        """
        losses = task_only(output, y, share)
        if output.names:
            c = self.contrast
            with torch.set_grad_enabled(torch.is_grad_enabled() and c.lam > 0):
                losses["loss_con"] = contrastive_loss(
                    output.reps, y, output.names, tau=c.tau, form=c.form, n1=c.n1, without=c.without
                )
            if c.lam > 0:
                losses["loss"] = losses["loss_task"] + c.lam * losses["loss_con"]
        return losses
