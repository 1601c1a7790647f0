"""The earlier models: their products by hand, subsets of modalities, the path through stage 1."""

import itertools

import pytest
import torch

from conki_lib.baselines import KINDS
from conki_lib.model import (
    build_model,
    freeze_for_fine_tuning,
    freeze_for_injection,
    injected_state,
    load_injected,
)

SUBSETS = [c for k in (1, 2, 3) for c in itertools.combinations("tva", k)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modalities", SUBSETS)
def test_every_subset_runs(kind, modalities, tiny_config, toy_batch):
    config = tiny_config(kind=kind, modalities=modalities)
    if kind == "text-only" and "t" not in modalities:
        with pytest.raises(ValueError, match="kind is 'text-only', but modalities"):
            build_model(config)
        return
    y_hat, reps, names = build_model(config)(toy_batch())
    assert y_hat.shape == (4,)
    assert reps.shape == (4, 0, 16)
    assert names == ()


def test_text_only_builds_and_reads_text_only(tiny_config, toy_batch):
    model = build_model(tiny_config(kind="text-only")).eval()
    assert list(model.encoders) == ["t"]
    batch, other = toy_batch(), toy_batch()
    other.inputs["v"] += 1
    assert torch.equal(model(batch).y_hat, model(other).y_hat)


def test_late_fusion_starts_as_the_plain_average(tiny_config, toy_batch):
    torch.manual_seed(0)
    model = build_model(tiny_config(kind="late-fusion")).eval()
    encoded = model.encode(toy_batch())
    alone = [model.heads.mlps[m](encoded[m].pan).squeeze(1) for m in "tva"]
    torch.testing.assert_close(model.represent(encoded).y_hat, sum(alone) / 3)
    with torch.no_grad():
        model.heads.weights[1] = 50.0
    torch.testing.assert_close(model.represent(encoded).y_hat, alone[1])


def narrow(model, pan, m, i):
    """``[1; z_m]`` of sample i, by hand."""
    z = torch.relu(model.heads.narrow.nets[m](pan[m][i]))
    return [1.0, *z.tolist()]


def test_tfn_multiplies_every_feature_with_every_other(tiny_config, toy_batch):
    torch.manual_seed(0)
    model = build_model(tiny_config(kind="tfn", fusion_width=3)).eval().double()
    pan = {m: torch.randn(2, 16, dtype=torch.float64) for m in "tva"}
    y_hat = model.heads(pan)
    for i in range(2):
        t, v, a = (narrow(model, pan, m, i) for m in "tva")
        cube = torch.tensor([x * y * z for x in t for y in v for z in a], dtype=torch.float64)
        assert len(cube) == 4**3
        torch.testing.assert_close(y_hat[i], model.heads.mlp(cube).squeeze())


def test_lmf_equals_the_full_tensor_of_its_factors(tiny_config):
    torch.manual_seed(0)
    model = build_model(tiny_config(kind="lmf", fusion_width=3, lmf_rank=2)).eval().double()
    pan = {m: torch.randn(2, 16, dtype=torch.float64) for m in "tva"}
    factors = [model.heads.factors[m] for m in "tva"]
    weight = torch.einsum("rio,rjo,rko->ijko", *factors)  # what TFN would multiply with
    y_hat = model.heads(pan)
    for i in range(2):
        t, v, a = (torch.tensor(narrow(model, pan, m, i), dtype=torch.float64) for m in "tva")
        fused = torch.einsum("ijko,i,j,k->o", weight, t, v, a)
        torch.testing.assert_close(y_hat[i], model.heads.out(fused).squeeze())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, tiny_config, toy_batch):
    model = build_model(tiny_config(kind=kind)).double().eval()
    batches = [toy_batch(), toy_batch(pad=9)]
    for batch in batches:
        for m in "va":
            batch.inputs[m] = batch.inputs[m].double()
    plain, padded = (model(batch).y_hat for batch in batches)
    assert (plain - padded).abs().max() < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_controls_see_the_external_data_whole(kind, tiny_config):
    torch.manual_seed(1)
    first = build_model(tiny_config(kind=kind))
    assert all(row["trained"] for row in freeze_for_injection(first, train="all"))
    second = build_model(tiny_config(kind=kind))
    heads = {k: v.clone() for k, v in second.heads.state_dict().items()}
    assert load_injected(second, injected_state(first)) == ()
    assert all(row["trained"] for row in freeze_for_fine_tuning(second))
    for name, value in second.state_dict().items():
        kept = heads[name[6:]] if name.startswith("heads.") else first.state_dict()[name]
        assert torch.equal(value, kept), name
