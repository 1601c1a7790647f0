"""What all models share, and earlier models as controls on the same backbones as ConKI.

The controls are small and from their papers; they answer with an `Output` whose `reps` has K = 0,
since there is nothing to contrast.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conki_lib.config import MODALITY_NAMES, ModelConfig
from conki_lib.data.batch import Batch
from conki_lib.encoders import Encoded, SequenceEncoder, TextEncoder, TransformerStack

# --- what every model shares --------------------------------------------------------------------


class Output(NamedTuple):
    """A model's answer; `names` says which representation stands where on the axis K of `reps`."""

    y_hat: Float[Tensor, " B"]
    reps: Float[Tensor, "B K d"]
    names: tuple[str, ...]


def mlp(d_in: int, d: int) -> nn.Sequential:
    """Build the regression head ``d_in -> d -> d/2 -> d/4 -> d/8 -> 1`` with GELU between.

    Source: released sizes 2304 -> 768 -> 384 -> 192 -> 96 -> 1 at three modalities and d = 768.
    """
    sizes = [d_in, d, *(max(d // k, 1) for k in (2, 4, 8))]
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))


def at_least_fp32(x: Tensor) -> Tensor:
    """Widen half-precision results, since losses are computed in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Model(nn.Module):
    """Base of ConKI and its controls: one backbone per modality, and the reading of a batch.

    Args:
        config: the model's settings.
        modalities: those that are built; the configuration's where None.
    """

    def __init__(self, config: ModelConfig, modalities: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.config = config
        self.modalities = tuple(modalities or config.modalities)
        self.encoders = nn.ModuleDict(
            {
                m: TextEncoder(config) if m == "t" else SequenceEncoder(config, m)
                for m in self.modalities
            }
        )

    @property
    def checkpoint_activations(self) -> bool:
        """Recompute activations in the backward pass: less memory, same result, more time."""
        return self._checkpoint

    _checkpoint = False

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        """Switch recomputation on or off."""
        self._checkpoint = on
        for module in self.modules():
            if isinstance(module, TransformerStack):
                module.recompute = on
            elif isinstance(module, TextEncoder):
                module.recompute(on)

    def encode(self, batch: Batch) -> dict[str, Encoded]:
        """Run each modality's backbone on a `conki_lib.data.Batch`.

        Raises:
            ValueError: the batch lacks a modality of this model.
        """
        missing = [m for m in self.modalities if m not in batch.inputs]
        if missing:
            names = ", ".join(MODALITY_NAMES[m] for m in missing)
            raise ValueError(
                f"the batch of {batch.corpus!r} holds no {names}, but modalities is "
                f"{''.join(self.modalities)}: leave {''.join(missing)} out"
            )
        return {m: self.encode_one(m, batch) for m in self.modalities}

    def encode_one(self, m: str, batch: Batch) -> Encoded:
        """Run one modality's backbone."""
        corpus = () if m == "t" else (batch.corpus,)
        return self.encoders[m](batch.inputs[m], batch.mask(m), *corpus)

    def forward(self, batch: Batch | Mapping[str, Encoded]) -> Output:
        """Predict a batch, or what `encode` returned for one (a cache can feed a wrapped model)."""
        return self.represent(batch if isinstance(batch, Mapping) else self.encode(batch))

    def represent(self, encoded: Mapping[str, Encoded]) -> Output:
        """Everything above the backbones; each model has its own."""
        raise NotImplementedError


# --- earlier models -----------------------------------------------------------------------------


class _Baseline(Model):
    """A control: backbones, and `heads` from the pan-knowledge O_m to y^."""

    heads: nn.Module

    def represent(self, encoded: Mapping[str, Encoded]) -> Output:
        """Predict from O_m alone; hidden states and masks are not read."""
        pan = {m: encoded[m].pan for m in self.modalities}
        y_hat = at_least_fp32(self.heads(pan))
        return Output(y_hat, y_hat.new_zeros(len(y_hat), 0, self.config.d), ())


class _Unimodal(nn.Module):
    """One MLP per modality; predictions are averaged, by learnt weights equal at first."""

    def __init__(self, config: ModelConfig, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.mlps = nn.ModuleDict({m: mlp(config.d, config.d) for m in modalities})
        self.weights = nn.Parameter(torch.zeros(len(modalities))) if len(modalities) > 1 else None

    def forward(self, pan: Mapping[str, Tensor]) -> Float[Tensor, " B"]:
        """Average the unimodal predictions."""
        y_hat = torch.cat([net(self.dropout(pan[m])) for m, net in self.mlps.items()], dim=1)
        return y_hat.squeeze(1) if self.weights is None else y_hat @ self.weights.softmax(0)


class TextOnly(_Baseline):
    """Text backbone and MLP; what the words alone give."""

    def __init__(self, config: ModelConfig) -> None:
        if "t" not in config.modalities:
            raise ValueError(
                f"kind is 'text-only', but modalities is {''.join(config.modalities)!r}: add t, "
                f"or choose another kind"
            )
        super().__init__(config, ("t",))
        self.heads = _Unimodal(config, self.modalities)


class LateFusion(_Baseline):
    """Each modality predicts alone; predictions are averaged with learnt weights (a softmax)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.heads = _Unimodal(config, self.modalities)


class _Narrow(nn.Module):
    """Sub-networks ``d -> fusion_width`` before a product, with a constant 1 appended."""

    def __init__(self, config: ModelConfig, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.nets = nn.ModuleDict({m: nn.Linear(config.d, config.fusion_width) for m in modalities})

    def forward(self, pan: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "B d_in"]]:
        """Map each modality to ``[1; z_m]``."""
        z = {m: torch.relu(net(self.dropout(pan[m]))) for m, net in self.nets.items()}
        return {m: torch.cat([x.new_ones(len(x), 1), x], dim=1) for m, x in z.items()}


class _TensorFusion(nn.Module):
    def __init__(self, config: ModelConfig, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.narrow = _Narrow(config, modalities)
        d_in = (config.fusion_width + 1) ** len(modalities)
        self.mlp = nn.Sequential(
            nn.Linear(d_in, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
        )

    def forward(self, pan: Mapping[str, Tensor]) -> Float[Tensor, " B"]:
        """Multiply every feature of one modality with every feature of the others."""
        product, *others = self.narrow(pan).values()
        for z in others:
            product = (product.unsqueeze(2) * z.unsqueeze(1)).flatten(1)
        return self.mlp(product).squeeze(1)


class TFN(_Baseline):
    """Tensor fusion: the outer product of all ``[1; z_m]``, with uni-, bi- and trimodal terms.

    Source: Zadeh et al., Tensor Fusion Network, EMNLP 2017 (post-fusion layers of 128).
    Differs: the same backbones as ConKI instead of an LSTM and averaged features; equal widths; the
    output is not squashed into the label range.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.heads = _TensorFusion(config, self.modalities)


class _LowRankFusion(nn.Module):
    def __init__(self, config: ModelConfig, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.narrow = _Narrow(config, modalities)
        width = config.fusion_width
        self.factors = nn.ParameterDict(
            {m: nn.Parameter(torch.empty(config.lmf_rank, width + 1, width)) for m in modalities}
        )
        for factor in self.factors.values():
            for matrix in factor:
                nn.init.xavier_normal_(matrix)
        self.out = nn.Linear(width, 1)

    def forward(self, pan: Mapping[str, Tensor]) -> Float[Tensor, " B"]:
        """Sum over ranks the product of the projections, without building the tensor."""
        product: Tensor | None = None
        for m, z in self.narrow(pan).items():
            x = torch.einsum("bi,rio->bro", z, self.factors[m])
            product = x if product is None else product * x
        return self.out(product.sum(1)).squeeze(1)


class LMF(_Baseline):
    """Low-rank fusion: TFN's weights as a sum of `lmf_rank` outer products of factors.

    Source: Liu et al., Efficient Low-rank Multimodal Fusion, ACL 2018.
    Differs: the same backbones as ConKI; one linear layer from the fused vector to y^; ranks weigh
    equally.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.heads = _LowRankFusion(config, self.modalities)


KINDS: dict[str, type[Model]] = {
    "text-only": TextOnly,
    "late-fusion": LateFusion,
    "tfn": TFN,
    "lmf": LMF,
}
