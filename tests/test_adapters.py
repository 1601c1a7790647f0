"""Adapter chains: where they plug in, what they compute, what they read."""

import pytest
import torch

from conki_lib.adapters import AdapterChain, AdapterModule, plugged_layers, spread_layers
from conki_lib.encoders import masked_mean


@pytest.mark.parametrize(
    "n_layers, expected",
    [(1, (0,)), (2, (0,)), (3, (0, 1)), (4, (0, 1, 2)), (6, (0, 2, 4)), (12, (0, 5, 10))],
)
def test_layers_are_spread_evenly(n_layers, expected):
    assert spread_layers(n_layers) == expected


def test_chosen_layers_must_exist(tiny_config):
    assert plugged_layers(tiny_config(), "t", 12) == (0, 5, 10)
    assert plugged_layers(tiny_config(), "v", 2) == (1,)
    assert plugged_layers(tiny_config(adapter_text_layers=(1, 3)), "t", 4) == (1, 3)
    with pytest.raises(ValueError, match=r"adapter_text_layers is \[1, 4\].*layers 0 to 3"):
        plugged_layers(tiny_config(adapter_text_layers=(1, 4)), "t", 4)
    with pytest.raises(ValueError, match="rising"):
        plugged_layers(tiny_config(adapter_text_layers=(2, 1)), "t", 4)
    with pytest.raises(ValueError, match="adapter_sequence_layers"):
        plugged_layers(tiny_config(), "a", 1)


def test_heads_must_divide_the_width(tiny_config):
    with pytest.raises(ValueError, match=r"adapter_heads \(3\) must divide adapter_width \(8\)"):
        AdapterModule(tiny_config(adapter_heads=3))


def test_module_starts_close_to_the_identity(tiny_config):
    torch.manual_seed(0)
    module = AdapterModule(tiny_config(adapter_init_std=0.0002, adapter_width=64, adapter_ff=8))
    for fc in (module.down, module.up):
        assert float(fc.weight.detach().std()) == pytest.approx(0.0002, rel=0.1)
        assert not fc.bias.any()
    x = torch.randn(2, 3, 16)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert (module(x, mask) - x).abs().max() < 0.01
    torch.nn.init.zeros_(module.up.weight)
    assert torch.equal(module(x, mask), x)


def test_chain_is_what_the_paper_says(tiny_config):
    torch.manual_seed(0)
    chain = AdapterChain(tiny_config(), "t", 6).eval()
    hidden = tuple(torch.randn(2, 4, 16) for _ in range(7))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])

    def module(i, x):
        block = chain.chain[i]
        inner = block.down(x)
        for layer in block.stack.layers:
            inner = layer(inner, src_key_padding_mask=~mask)
        return x + block.up(inner)

    x = module(0, hidden[0])
    x = module(1, hidden[2] + x)
    x = module(2, hidden[4] + x)
    expected = torch.stack([chain.norm(x)[0, :4].mean(0), chain.norm(x)[1, :2].mean(0)])
    torch.testing.assert_close(chain(hidden, mask), expected)


def test_only_the_plugged_in_states_are_read(tiny_config):
    chain = AdapterChain(tiny_config(), "t", 6).eval()
    hidden = tuple(torch.randn(2, 4, 16) for _ in range(7))
    mask = torch.ones(2, 4, dtype=torch.bool)
    kept = {i: hidden[i] for i in (0, 2, 4)}
    assert torch.equal(chain(hidden, mask), chain(kept, mask))


def test_text_pooler_reads_the_first_step(tiny_config):
    config = tiny_config(adapter_text_pooling="pooler")
    chain = AdapterChain(config, "t", 2).eval()
    hidden = tuple(torch.randn(2, 4, 16) for _ in range(3))
    mask = torch.ones(2, 4, dtype=torch.bool)
    last = chain.chain[0](hidden[0], mask)
    torch.testing.assert_close(chain(hidden, mask), torch.tanh(chain.pooler(last[:, 0])))
    assert AdapterChain(config, "v", 2).pooler is None


@pytest.mark.parametrize("padding", ["masked", "released"])
def test_padding(padding, tiny_config):
    torch.manual_seed(0)
    chain = AdapterChain(tiny_config(padding=padding, adapter_init_std=0.5), "v", 2).double().eval()
    hidden = {1: torch.randn(2, 4, 16, dtype=torch.float64)}
    mask = torch.ones(2, 4, dtype=torch.bool)
    extra = torch.randn(2, 3, 16, dtype=torch.float64)
    padded = chain({1: torch.cat([hidden[1], extra], 1)}, torch.cat([mask, ~mask[:, :3]], 1))
    deviation = (chain(hidden, mask) - padded).abs().max()
    assert deviation < 1e-13 if padding == "masked" else deviation > 1e-3


def test_released_mean_is_over_all_steps(tiny_config):
    chain = AdapterChain(tiny_config(padding="released"), "v", 2).eval()
    hidden = {1: torch.randn(2, 4, 16)}
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    last = chain.chain[0](hidden[1], None)
    torch.testing.assert_close(chain(hidden, mask), masked_mean(chain.norm(last), None))
