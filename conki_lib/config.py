"""Strict run configuration: every setting has one flat name, a type, a default and a reason.

``RunConfig(lam=0.1, seed=3)`` takes flat names and groups them (``config.contrast.lam``,
``config.runtime.seed``); an unknown or ill-typed name is an error that lists the near names.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MODALITIES = ("t", "v", "a")
MODALITY_NAMES = {"t": "text", "v": "vision", "a": "audio"}
ROOT = Path(os.environ.get("CONKI_HOME", Path(__file__).resolve().parents[1]))
HEADLESS = "CONKI_HEADLESS"

Modality = Literal["t", "v", "a"]
PairSet = Literal["P1", "P2", "N1", "N2"]
Kind = Literal["conki", "text-only", "late-fusion", "tfn", "lmf"]
Precision = Literal["auto", "fp32", "fp32-fast", "bf16"]


def _as_tuple(value: Any) -> Any:
    """Accept what YAML and papermill can write for a tuple: a list, or a string ``"N1,N2"``."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _as_modalities(value: Any) -> Any:
    """Accept ``"tv"`` or a sequence; any order, kept in the order of `MODALITIES`."""
    if isinstance(value, str | list | tuple):
        unknown = [m for m in value if m not in MODALITIES]
        if unknown or not value or len(set(value)) != len(value):
            raise ValueError(f"modalities: a non-empty subset of 'tva' is needed, not {value!r}")
        return tuple(m for m in MODALITIES if m in value)
    return value


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(_Group):
    """Which corpora are read, and how."""

    target: str = Field("synthetic", description="corpus of stage 2")
    external: str | None = Field(
        "synthetic-external", description="corpus of stage 1; null: no stage 1"
    )
    fold: str = Field("standard", description="fold of the target corpus")
    standardise: bool = Field(
        True, description="vision, audio: subtract train mean, divide by train deviation"
    )
    lower_case: bool = Field(
        True, description="MOSI transcripts are upper case, the backbones are uncased"
    )
    max_tokens: int = Field(
        64, ge=4, description="word pieces per utterance, special ones included"
    )
    max_steps: int = Field(
        512, ge=1, description="vision and audio steps per utterance; longer ones are cut"
    )


class ModelConfig(_Group):
    """What is built. Text sizes follow from the backbone; all representations share the width d."""

    kind: Kind = Field("conki", description="ConKI, or an earlier model as control")
    modalities: Annotated[tuple[Modality, ...], BeforeValidator(_as_modalities)] = MODALITIES
    widths: dict[str, dict[Modality, int]] = Field(
        {}, description="corpus -> modality -> d_in; filled from the stores"
    )
    d: int = Field(
        384, ge=8, description="width of all representations; the text backbone's, if text is used"
    )
    text_backbone: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", description="hub name or folder"
    )
    text_init: Literal["pretrained", "random"] = Field("pretrained", description="random: w/o C3")
    text_pooling: Literal["pooler", "mean"] = Field(
        "mean", description="O_t: BERT's pooler, or masked mean"
    )
    encoder_layers: int = Field(
        2, ge=1, description="Transformer layers of the vision and audio encoders"
    )
    encoder_heads: int = Field(8, ge=1)
    encoder_ff: int = Field(768, ge=1, description="feed-forward width; 768 as released")
    encoder_dropout: float = Field(0.1, ge=0, lt=1, description="0.5 as released")
    encoder_positions: int = Field(
        512,
        ge=1,
        description="learned positions of the vision and audio encoders; max_steps at least",
    )
    adapter_text_layers: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = Field(
        (),
        description="plugged in before these; empty: (0, 2, 4) of 6, (0, 5, 10) of 12 layers",
    )
    adapter_sequence_layers: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = (1,)
    adapter_width: int = Field(128, ge=1, description="width inside a module; 768 as released")
    adapter_heads: int = Field(4, ge=1, description="12 as released")
    adapter_ff: int = Field(256, ge=1, description="3072 as released")
    adapter_dropout: float = Field(0.1, ge=0, lt=1)
    adapter_init_std: float = Field(
        0.02, gt=0, description="of the two FC layers; 0.0002 as released"
    )
    adapter_text_pooling: Literal["pooler", "mean"] = Field(
        "mean", description="A_t; pooler as released"
    )
    pan: bool = Field(True, description="O_m take part; false: w/o C3 pan")
    specific: bool = Field(True, description="A_m take part; false: w/o C2")
    padding: Literal["masked", "released"] = Field(
        "masked", description="released: means include padded steps, adapters attend to them"
    )
    fusion: Literal["gate", "concat"] = Field("gate", description="cross-modal fusion network")
    gate_reduction: int = Field(8, ge=1)
    fusion_dropout: float = Field(0.1, ge=0, lt=1)
    fusion_width: int = Field(
        32, ge=1, description="TFN, LMF: width of each modality before the product"
    )
    lmf_rank: int = Field(4, ge=1, description="LMF: outer products that stand for the tensor")

    @model_validator(mode="after")
    def _something_to_represent(self) -> "ModelConfig":
        if not (self.pan or self.specific):
            raise ValueError(
                "pan and specific are both false: no representation is left; set one of them"
            )
        return self


class ContrastConfig(_Group):
    """The hierarchical contrastive loss, and its readings."""

    lam: float = Field(0.01, ge=0, description="lambda, weight of L_con; 0: w/o C4")
    tau: float = Field(0.07, ge=0.005, description="temperature")
    form: Literal["released", "paper"] = Field(
        "released", description="denominators per row, or per sample"
    )
    n1: Literal["symmetric", "literal"] = Field(
        "symmetric", description="do A rows have N1 pairs too"
    )
    without: Annotated[tuple[PairSet, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="pair sets left out of positives and denominator"
    )


class StageConfig(_Group):
    """How one stage is optimised: AdamW, warm-up, decay, one learning rate per parameter group."""

    epochs: int = Field(8, ge=0)
    batch_size: int = Field(32, ge=1)
    lr_text: float = Field(3e-5, ge=0, description="text backbone; 0 freezes")
    lr_sequence: float = Field(3e-4, ge=0, description="vision and audio encoders; 0 freezes")
    lr_adapters: float = Field(3e-4, ge=0, description="adapters that are trained in this stage")
    lr_heads: float = Field(3e-4, ge=0, description="fusion, gate, MLP")
    weight_decay: float = Field(1e-3, ge=0)
    warmup_epochs: float = Field(0.5, ge=0, description="learning rates rise linearly from 0")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    patience: int = Field(
        0, ge=0, description="epochs without a lower validation MAE before stopping; 0: never"
    )
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")


class Stage1Config(StageConfig):
    """Knowledge injection. Flat names carry the prefix ``stage1_``."""

    epochs: int = Field(3, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    train: Literal["adapters", "all"] = Field(
        "adapters",
        description="adapters: ConKI; all: the whole model, for controls with the external data",
    )
    pan: bool = Field(True, description="the stage-1 heads read O_m beside A_m; false: A_m alone")
    cache: bool = Field(True, description="compute the frozen backbones' hidden states once")


class Stage2Config(StageConfig):
    """Fine-tuning on the target corpus."""

    freeze_adapters: bool = Field(True, description="freeze adapters that stage 1 trained")
    adapter_gradient: bool = Field(
        True, description="gradients pass through adapters into the backbone"
    )


class RuntimeConfig(_Group):
    """What may change rounding, never meaning."""

    seed: int = Field(0, ge=0, lt=2**32)
    precision: Precision = Field(
        "fp32-fast",
        description="losses are always fp32; auto: bf16 where the device has instructions for it",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    accumulate: int = Field(
        1, ge=1, description="micro-batches per step; L_con still sees the whole batch"
    )
    tuning: bool = Field(False, description="validation only, the test split is not looked at")
    checkpoint_activations: bool = Field(
        False, description="recompute activations in backward: less memory"
    )


_GROUPS: dict[str, tuple[type[_Group], str]] = {
    "data": (DataConfig, ""),
    "model": (ModelConfig, ""),
    "contrast": (ContrastConfig, ""),
    "stage1": (Stage1Config, "stage1_"),
    "stage2": (Stage2Config, ""),
    "runtime": (RuntimeConfig, ""),
}
_FLAT = {
    prefix + field: (group, field)
    for group, (cls, prefix) in _GROUPS.items()
    for field in cls.model_fields
}
_LABELS = ("profile", "variant", "preset")

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # what is known of the released code, as far as settings can say it; text_pooling (from the
    # paper) and max_tokens (from the published files) are inferred
    "released": dict(
        text_backbone="bert-base-uncased",
        d=768,
        text_pooling="pooler",
        encoder_dropout=0.5,
        adapter_width=768,
        adapter_heads=12,
        adapter_ff=3072,
        adapter_init_std=0.0002,
        adapter_text_pooling="pooler",
        padding="released",
        lam=0.01,
        tau=0.07,
        form="released",
        stage1_epochs=10,
        stage1_batch_size=32,
        stage1_warmup_epochs=1.0,
        stage1_weight_decay=0.0,
        stage1_lr_adapters=5e-5,
        stage1_lr_heads=5e-5,
        epochs=200,
        batch_size=32,
        warmup_epochs=10.0,
        lr_text=5e-6,
        lr_sequence=5e-6,
        lr_adapters=1e-6,
        lr_heads=1e-6,
        weight_decay=1e-3,
        max_tokens=50,
    ),
}


def headless() -> bool:
    """Is a notebook executed with nobody to watch: one line per epoch, and nothing to click?"""
    return os.environ.get(HEADLESS, "0") not in ("", "0")


def near_names(name: str, known: Any) -> str:
    """Say which known names are close: ``"; did you mean 'lam'?"``, or nothing."""
    near = difflib.get_close_matches(name, list(known), cutoff=0.5)
    return f"; did you mean {' or '.join(repr(x) for x in near)}?" if near else ""


class RunConfig(_Group):
    """Everything that determines one run.

    Labels (`profile`, `variant`, `preset`) name the run for tables; the groups below identify it.

    Raises:
        pydantic.ValidationError: a `ValueError` naming each unknown or ill-typed setting and the
            near names.
    """

    profile: str = Field("synthetic", description="configs/<profile>.yml and results/<profile>/")
    variant: str = Field("full", description="row of the tables")
    preset: str = Field("default", description="named set of values under the given ones")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    contrast: ContrastConfig = ContrastConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, parameters: Any) -> Any:
        if not isinstance(parameters, dict):
            return parameters
        preset = parameters.get("preset", "default")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: known are {', '.join(PRESETS)}")
        grouped: dict[str, Any] = {}
        for name, value in {**PRESETS[preset], **parameters}.items():
            if name in _LABELS:
                grouped[name] = value
            elif name in _FLAT:
                group, field = _FLAT[name]
                grouped.setdefault(group, {})[field] = value
            elif name in _GROUPS and isinstance(value, BaseModel | dict):
                given = value.model_dump() if isinstance(value, BaseModel) else value
                grouped[name] = {**given, **grouped.get(name, {})}
            else:
                raise ValueError(f"unknown setting {name!r}{near_names(name, setting_names())}")
        return grouped

    @model_validator(mode="after")
    def _every_step_has_a_position(self) -> "RunConfig":
        if self.data.max_steps > self.model.encoder_positions:
            raise ValueError(
                f"max_steps is {self.data.max_steps}, but encoder_positions only "
                f"{self.model.encoder_positions}: lower the one or raise the other"
            )
        return self

    @classmethod
    def from_profile(cls, profile: str, **overrides: Any) -> "RunConfig":
        """Read ``configs/<profile>.yml``; overrides that are not None win over it.

        Raises:
            FileNotFoundError: no such profile; names those there are.
            ValueError: a key or value that is no setting.
        """
        return cls(
            **{**read_profile(profile), **{k: v for k, v in overrides.items() if v is not None}}
        )

    def flat(self) -> dict[str, Any]:
        """All settings under their flat names, ready for ``RunConfig(**flat)`` or JSON."""
        values = {label: getattr(self, label) for label in _LABELS}
        dumped = self.model_dump(mode="json")
        return values | {name: dumped[group][field] for name, (group, field) in _FLAT.items()}

    def replace(self, **changes: Any) -> "RunConfig":
        """A copy with some settings changed, checked like a new one."""
        return RunConfig(**{**self.flat(), **changes})

    def for_stage1(self) -> "RunConfig":
        """The same stage 1, with defaults for all that it does not depend on.

        Every row and fold that shares a stage 1 asks for it alike, and its record is the same.
        """
        other = {name for name, (group, _) in _FLAT.items() if group in ("contrast", "stage2")}
        other |= {"variant", "fold", "tuning"}
        return RunConfig(**{k: v for k, v in self.flat().items() if k not in other})

    def identity(self, stage: int) -> dict[str, Any]:
        """The settings that determine a stage's result: no labels; for stage 1 nothing of stage 2.

        Runs whose stage 1 is the same load the same record.
        """
        dumped = self.model_dump(mode="json")
        runtime = {k: dumped["runtime"][k] for k in ("seed", "precision")}
        if stage == 1:
            data = {k: v for k, v in dumped["data"].items() if k not in ("target", "fold")}
            return {
                "data": data,
                "model": dumped["model"],
                "stage1": dumped["stage1"],
                "runtime": runtime,
            }
        if self.data.external is None:
            dumped["stage1"] = None
        runtime["tuning"] = self.runtime.tuning
        groups = ("data", "model", "contrast", "stage1", "stage2")
        return {k: dumped[k] for k in groups} | {"runtime": runtime}


def setting_names() -> tuple[str, ...]:
    """All flat names that `RunConfig` takes, labels first."""
    return _LABELS + tuple(_FLAT)


def read_profile(profile: str) -> dict[str, Any]:
    """Read ``configs/<profile>.yml`` as a flat dictionary, with its own name in it.

    Raises:
        FileNotFoundError: no such profile; lists the known ones and the near ones.
        ValueError: the file is no YAML, no flat mapping, or holds a key that is no setting.
    """
    folder = ROOT / "configs"
    path = folder / f"{profile}.yml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yml"))
        raise FileNotFoundError(
            f"no profile {profile!r} in {folder}{near_names(profile, known)}: "
            f"known are {', '.join(known) or 'none'}"
        )
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: a flat mapping of settings is needed, not a {type(values).__name__}"
        )
    for key in values:
        if key not in setting_names():
            raise ValueError(
                f"{path}: unknown setting {key!r}{near_names(str(key), setting_names())}"
            )
    if values.setdefault("profile", profile) != profile:
        raise ValueError(f"{path}: profile is the file's own name, {profile!r}: leave it out")
    return values
