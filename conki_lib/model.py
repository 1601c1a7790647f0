"""ConKI: six representations, fused within and across modalities; freezing plans of both stages."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conki_lib.adapters import AdapterChain
from conki_lib.baselines import KINDS, Model, Output, at_least_fp32, mlp
from conki_lib.config import MODALITIES, ModelConfig
from conki_lib.encoders import Encoded

GROUPS = ("text", "sequence", "adapters", "heads")


class Gate(nn.Module):
    """Squeeze-and-excitation: each feature is weighted by what all features say.

    Source: the paper's "fusion network", a gate in the released code (Hu et al. 2018, reduction 8).
    """

    def __init__(self, d_in: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(d_in, max(d_in // reduction, 1))
        self.excite = nn.Linear(self.squeeze.out_features, d_in)

    def forward(self, x: Float[Tensor, "B d_in"]) -> Float[Tensor, "B d_in"]:
        """Weigh features by values between 0 and 1."""
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x))))


class Fusion(nn.Module):
    """From representations to y^: a fully connected layer per modality, a gate across them, an MLP.

    Source: paper, intra-modal fusion and fusion network. `fusion: concat` leaves the gate out.
    """

    def __init__(self, config: ModelConfig, modalities: tuple[str, ...]) -> None:
        super().__init__()
        d, width = config.d, len(modalities) * config.d
        kinds = config.pan + config.specific
        self.intra = nn.ModuleDict({m: nn.Linear(kinds * d, d) for m in modalities})
        gated = config.fusion == "gate"
        self.cross = Gate(width, config.gate_reduction) if gated else nn.Identity()
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.mlp = mlp(width, d)

    def forward(
        self, pan: Mapping[str, Tensor], specific: Mapping[str, Tensor]
    ) -> Float[Tensor, " B"]:
        """Fuse ``[A_m; O_m]``, each (B, d), into one value per sample."""
        fused = [
            fc(torch.cat([kind[m] for kind in (specific, pan) if kind], dim=1))
            for m, fc in self.intra.items()
        ]
        return self.mlp(self.dropout(self.cross(torch.cat(fused, dim=1)))).squeeze(1)


class ConKI(Model):
    """Backbones, adapters outside them, fusion; answers y^ and up to six representations.

    Source: paper, the overall structure.
    Differs: padding is masked; any subset of modalities; `pan` or `specific` may be absent.

    Attributes:
        adapter_gradient: False cuts the gradient from adapters into backbones (set by training).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.adapter_gradient = True
        chains = {
            m: AdapterChain(config, m, encoder.n_layers) for m, encoder in self.encoders.items()
        }
        self.adapters = nn.ModuleDict(chains if config.specific else {})
        self.heads = Fusion(config, self.modalities)

    def plugged(self, m: str) -> tuple[int, ...]:
        """Indices of the hidden states that modality m's adapter reads; none without adapters."""
        return self.adapters[m].layers if m in self.adapters else ()

    def represent(self, encoded: Mapping[str, Encoded]) -> Output:
        """Adapters, fusion and MLP on what the backbones said.

        Reads per modality only `pan` (where `config.pan`), ``hidden[i] for i in plugged(m)`` and
        `mask` (vision and audio: with the CLS step). A cache needs to store no more, and feeds it
        back as ``Encoded(pan, {i: hidden_i for i in model.plugged(m)}, mask)``, padded by anything
        finite: padded steps do not matter while `config.padding` is "masked". With "released" they
        do; nothing can be cached per utterance then.
        """
        pan = {m: encoded[m].pan for m in self.modalities} if self.config.pan else {}
        specific = {m: self._specific(m, encoded[m]) for m in self.adapters}
        rows = {f"O_{m}": x for m, x in pan.items()} | {f"A_{m}": x for m, x in specific.items()}
        reps = torch.stack(list(rows.values()), dim=1)
        y_hat = self.heads(pan, specific)
        return Output(at_least_fp32(y_hat), at_least_fp32(reps), tuple(rows))

    def _specific(self, m: str, encoded: Encoded) -> Float[Tensor, "B d"]:
        hidden = {i: encoded.hidden[i] for i in self.plugged(m)}
        if not self.adapter_gradient:
            hidden = {i: h.detach() for i, h in hidden.items()}
        return self.adapters[m](hidden, encoded.mask)


def build_model(config: ModelConfig) -> Model:
    """Build ConKI or the earlier model that `kind` names."""
    return ConKI(config) if config.kind == "conki" else KINDS[config.kind](config)


# --- parameter groups and freezing plans --------------------------------------------------------


def _place(name: str) -> tuple[str, str]:
    """Group and modality of a parameter or buffer, by its name in the state."""
    part, _, rest = name.partition(".")
    m = rest.partition(".")[0]
    if part == "encoders":
        return ("text" if m == "t" else "sequence"), m
    return ("adapters", m) if part == "adapters" else ("heads", "")


def parameter_groups(model: Model) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Sort all parameters, trained or not, into "text", "sequence", "adapters" and "heads"."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        groups[_place(name)[0]].append((name, parameter))
    return groups


def parameter_table(model: Model) -> list[dict[str, Any]]:
    """Rows (group, modality, parameters, trained): counts of all and of the trained ones."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        group, m = _place(name)
        new = {"group": group, "modality": m, "parameters": 0, "trained": 0}
        row = rows.setdefault((group, m), new)
        row["parameters"] += parameter.numel()
        row["trained"] += parameter.numel() * parameter.requires_grad
    return list(rows.values())


def _thaw(model: Model) -> None:
    for part in (*model.encoders.values(), *_adapters(model).values()):
        part.freeze(False)
    model.requires_grad_(True)


def _adapters(model: Model) -> nn.ModuleDict | dict:
    return getattr(model, "adapters", {})


def freeze_for_injection(
    model: Model, *, train: Literal["adapters", "all"] = "adapters"
) -> list[dict[str, Any]]:
    """Stage 1: freeze all backbones, train adapters and the heads that read them.

    What is frozen also stays in evaluation mode. ``train="all"`` freezes nothing: for the controls
    that merely see the external data.

    Source: paper, training.

    Returns:
        The table of `parameter_table`.

    Raises:
        ValueError: the model has no adapters to train.
    """
    _thaw(model)
    if train == "adapters":
        if not _adapters(model):
            raise ValueError(
                f"stage 1 trains adapters, but this model (kind {model.config.kind!r}, specific "
                f"{model.config.specific}) has none: set stage1_train: all, or external: null"
            )
        for encoder in model.encoders.values():
            encoder.freeze()
    return parameter_table(model)


def freeze_for_fine_tuning(
    model: Model, *, injected: tuple[str, ...] = (), freeze_adapters: bool = True
) -> list[dict[str, Any]]:
    """Stage 2: freeze the adapters that stage 1 trained; train everything else that is read.

    Without `pan` nothing reads a backbone above the last plugged-in layer: it is frozen there too.

    Source: paper, training; frozen adapters as released (`freeze_adapters: false`: the other way).

    Args:
        model: with stage 1's state loaded.
        injected: modalities whose adapters the external data reached (see `load_injected`).
        freeze_adapters: the setting.

    Returns:
        The table of `parameter_table`.
    """
    _thaw(model)
    for m, chain in _adapters(model).items():
        chain.freeze(freeze_adapters and m in injected)
        if not model.config.pan:
            for parameter in model.encoders[m].above(chain.layers[-1]):
                parameter.requires_grad_(False)
    return parameter_table(model)


# --- what stage 2 takes over from stage 1 -------------------------------------------------------


def injected_state(model: Model) -> dict[str, Tensor]:
    """All that stage 2 starts from: backbones, the random ones included, and adapters; no heads."""
    return {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if _place(name)[0] != "heads"
    }


def load_injected(model: Model, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Load stage 1's state; heads stay new, and so does what stage 1 never had.

    A modality that the external corpus lacks keeps its new backbone and adapter; a projection that
    either side lacks (of another corpus) is left alone. Anything else must fit.

    Returns:
        The modalities whose adapters were in the state.

    Raises:
        ValueError: a width or layer differs; both sides are named.
    """
    own = {k: v for k, v in model.state_dict().items() if _place(k)[0] != "heads"}
    common = {_place(k) for k in state} & {_place(k) for k in own}
    for name in sorted(own.keys() | state.keys()):
        if _place(name) not in common:
            continue
        if (name in own) != (name in state):
            if _is_projection(name):
                continue
            side = "stage 1's state" if name in state else "this model"
            raise ValueError(
                f"{name} is only in {side}: stage 1 was run with other model settings (layers, "
                f"pooling, adapters); run it again with these"
            )
        if own[name].shape != state[name].shape:
            raise ValueError(
                f"{name} is {tuple(state[name].shape)} in stage 1's state, but "
                f"{tuple(own[name].shape)} in this model: give both stages the same widths "
                f"(d, adapter_width, widths of the corpus), or run stage 1 again"
            )
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    return tuple(m for m in MODALITIES if ("adapters", m) in common)


def _is_projection(name: str) -> bool:
    return _place(name)[0] == "sequence" and name.split(".")[2] == "project"
