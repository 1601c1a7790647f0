"""Adapters: chains of small modules that stand outside a backbone and read its hidden states."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from conki_lib.config import MODALITY_NAMES, ModelConfig
from conki_lib.encoders import Freezable, TransformerStack, masked_mean


def spread_layers(n_layers: int, n: int = 3) -> tuple[int, ...]:
    """Choose up to n evenly spread layers to plug in before: (0, 2, 4) of 6, (0, 5, 10) of 12.

    Source: 0, 5, 10 of BERT-base in the released code; the paper says "chosen layers".
    """
    last = max(n_layers - 2, 0)
    return tuple(sorted({round(i * last / max(n - 1, 1)) for i in range(n)}))


def plugged_layers(config: ModelConfig, m: str, n_layers: int) -> tuple[int, ...]:
    """Say before which layers of modality m's backbone the adapter's modules are plugged in.

    Raises:
        ValueError: a layer that the backbone does not have, or not in rising order.
    """
    setting = "adapter_text_layers" if m == "t" else "adapter_sequence_layers"
    layers = getattr(config, setting) or spread_layers(n_layers)
    if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < n_layers:
        raise ValueError(
            f"{setting} is {list(layers)}, but the {MODALITY_NAMES[m]} backbone has layers 0 to "
            f"{n_layers - 1}: name rising ones of these, or leave it empty to spread them evenly"
        )
    return tuple(layers)


class AdapterModule(nn.Module):
    """One module: down-projection, two Transformer layers, up-projection, residual around all.

    FC weights start from N(0, adapter_init_std) and biases from 0: a new module passes its input
    on, plus noise of the size adapter_init_std * sqrt(adapter_width), as the stack ends in a norm.

    Source: paper, Encoding with Knowledge Injection, after K-Adapter (Wang et al. 2021).
    Differs: nothing; sizes are settings (released: width 768, 12 heads, feed-forward 3072,
    deviation 0.0002).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.adapter_width % config.adapter_heads:
            raise ValueError(
                f"adapter_heads ({config.adapter_heads}) must divide adapter_width "
                f"({config.adapter_width})"
            )
        self.down = nn.Linear(config.d, config.adapter_width)
        self.stack = TransformerStack(
            2, config.adapter_width, config.adapter_heads, config.adapter_ff, config.adapter_dropout
        )
        self.up = nn.Linear(config.adapter_width, config.d)
        for fc in (self.down, self.up):
            nn.init.normal_(fc.weight, std=config.adapter_init_std)
            nn.init.zeros_(fc.bias)

    def forward(
        self, x: Float[Tensor, "B l d"], mask: Bool[Tensor, "B l"] | None
    ) -> Float[Tensor, "B l d"]:
        """Add what the module knows to its input."""
        return x + self.up(self.stack(self.down(x), mask)[-1])


class AdapterChain(Freezable):
    """The adapter of one modality: ``A_m = Adapter_m(H_m)``.

    A module reads the hidden state before its layer plus the previous module's output. The last
    output is pooled: LayerNorm and mean over real steps, or (text, `adapter_text_pooling: pooler`)
    first step, dense, tanh.

    Source: paper, Encoding with Knowledge Injection; pooling as released.
    Differs: padded steps are left out of attention and mean (`padding: released` lets them in).

    Args:
        config: sizes, layers, pooling.
        m: the modality.
        n_layers: layers of its backbone.
    """

    def __init__(self, config: ModelConfig, m: str, n_layers: int) -> None:
        super().__init__()
        self.layers = plugged_layers(config, m, n_layers)
        self.masked = config.padding == "masked"
        self.chain = nn.ModuleList(AdapterModule(config) for _ in self.layers)
        if m == "t" and config.adapter_text_pooling == "pooler":
            self.pooler, self.norm = nn.Linear(config.d, config.d), None
        else:
            self.pooler, self.norm = None, nn.LayerNorm(config.d)

    def forward(
        self,
        hidden: Sequence[Float[Tensor, "B l d"]] | Mapping[int, Float[Tensor, "B l d"]],
        mask: Bool[Tensor, "B l"],
    ) -> Float[Tensor, "B d"]:
        """Read the plugged-in hidden states, by layer index, and nothing else."""
        seen = mask if self.masked else None
        x: Tensor | None = None
        for layer, module in zip(self.layers, self.chain, strict=True):
            x = module(hidden[layer] if x is None else hidden[layer] + x, seen)
        if self.pooler is not None:
            return torch.tanh(self.pooler(x[:, 0]))
        return masked_mean(self.norm(x), seen)
