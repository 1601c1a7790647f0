"""ConKI as a whole: representations, masks, freezing plans, what stage 2 takes over."""

import itertools

import pytest
import torch

from conki_lib.config import RunConfig
from conki_lib.encoders import Encoded
from conki_lib.model import (
    ConKI,
    build_model,
    freeze_for_fine_tuning,
    freeze_for_injection,
    injected_state,
    load_injected,
    parameter_groups,
    parameter_table,
)
from conki_lib.pairs import REPS

SUBSETS = [c for k in (1, 2, 3) for c in itertools.combinations("tva", k)]


@pytest.fixture
def make_model(tiny_config):
    """A function that builds a seeded model of a tiny configuration."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return build_model(tiny_config(**changes))

    return make


def one_step(model, batch):
    """One step of plain gradient descent; returns the names of what it changed."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = (model(batch).y_hat - batch.y).square().mean()
    loss.backward()
    torch.optim.SGD(trained, 0.1).step()
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


# --- representations ---


@pytest.mark.parametrize("pan, specific", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("modalities", SUBSETS)
def test_every_subset_runs(modalities, pan, specific, make_model, toy_batch):
    model = make_model(modalities=modalities, pan=pan, specific=specific)
    y_hat, reps, names = model(toy_batch())
    kinds = "O" * pan + "A" * specific
    assert names == tuple(r for r in REPS if r[0] in kinds and r[2] in modalities)
    assert y_hat.shape == (4,)
    assert reps.shape == (4, len(names), 16)
    y_hat.sum().backward()
    assert model.plugged(modalities[0]) == (
        () if not specific else (0,) if modalities[0] == "t" else (1,)
    )


def test_representations_stand_where_the_names_say(make_model, toy_batch):
    model = make_model().eval()
    encoded = model.encode(toy_batch())
    _, reps, names = model.represent(encoded)
    for m in "tva":
        assert torch.equal(reps[:, names.index(f"O_{m}")], encoded[m].pan)
        specific = model.adapters[m](encoded[m].hidden, encoded[m].mask)
        assert torch.equal(reps[:, names.index(f"A_{m}")], specific)


def test_fusion_is_what_the_paper_says(make_model, toy_batch):
    model = make_model().eval()
    y_hat, reps, names = model(toy_batch())
    rep = {name: reps[:, k] for k, name in enumerate(names)}
    heads = model.heads
    fused = [heads.intra[m](torch.cat([rep[f"A_{m}"], rep[f"O_{m}"]], 1)) for m in "tva"]
    x = torch.cat(fused, 1)
    gate = heads.cross
    assert gate.squeeze.out_features == 3 * 16 // 8
    x = x * torch.sigmoid(gate.excite(torch.relu(gate.squeeze(x))))
    torch.testing.assert_close(y_hat, heads.mlp(x).squeeze(1))
    widths = [layer.out_features for layer in heads.mlp if isinstance(layer, torch.nn.Linear)]
    assert widths == [16, 8, 4, 2, 1]


def test_plain_concatenation(make_model, toy_batch):
    model = make_model(fusion="concat")
    assert not list(model.heads.cross.parameters())
    assert model(toy_batch()).y_hat.shape == (4,)


def test_backbones_do_not_notice_the_adapters(make_model, toy_batch):
    with_adapters = make_model().eval().encode(toy_batch())
    without = make_model(specific=False).eval().encode(toy_batch())
    for m in "tva":
        assert torch.equal(with_adapters[m].pan, without[m].pan)
        for h, k in zip(with_adapters[m].hidden, without[m].hidden, strict=True):
            assert torch.equal(h, k)


def test_a_cache_of_the_documented_parts_feeds_represent(make_model, toy_batch):
    model = make_model().eval()
    batch = toy_batch()
    encoded = model.encode(batch)
    cached = {
        m: Encoded(e.pan.clone(), {i: e.hidden[i].clone() for i in model.plugged(m)}, e.mask)
        for m, e in encoded.items()
    }
    for e in cached.values():  # what stands at padded steps does not matter
        for h in e.hidden.values():
            h[~e.mask] = 7.0
    assert torch.allclose(model(batch).y_hat, model(cached).y_hat, atol=1e-6)
    specific_only = make_model(pan=False).eval()
    bare = {m: e._replace(pan=None) for m, e in cached.items()}
    assert specific_only.represent(bare).names == REPS[3:]


def test_a_missing_modality_is_named(make_model, toy_batch):
    batch = toy_batch()
    del batch.inputs["v"]
    with pytest.raises(ValueError, match="holds no vision, but modalities is tva"):
        make_model()(batch)


def test_adapter_gradient_can_be_cut(make_model, toy_batch):
    for on in (True, False):
        model = make_model(pan=False)
        model.adapter_gradient = on
        model(toy_batch()).y_hat.sum().backward()
        reached = {n for n, p in model.encoders.named_parameters() if p.grad is not None}
        assert bool(reached) is on
        assert all(p.grad is not None for p in model.adapters.parameters())


# --- padding, order, size of a batch ---


def deviations(make_model, change, training=False):
    """Largest change of any output, in float32 and in float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        model = make_model(adapter_init_std=0.3).to(dtype).train(training)
        with torch.set_grad_enabled(training):
            found.append(change(model, dtype))
    return found


def cast(batch, dtype):
    for m in "va":
        batch.inputs[m] = batch.inputs[m].to(dtype)
    return batch


def largest(a, b):
    with torch.no_grad():
        pairs = ((a.y_hat, b.y_hat), (a.reps, b.reps))
        return max(float((x - y).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("training", [False, True])
def test_extra_padding_changes_nothing(training, make_model, toy_batch):
    def change(model, dtype):
        plain = model(cast(toy_batch(), dtype))
        return largest(plain, model(cast(toy_batch(pad=11), dtype)))

    single, double = deviations(make_model, change, training)
    assert single < 1e-5
    assert double < 1e-13


def select(batch, rows):
    """The same utterances in another order or number, padded to their own longest."""
    lengths = {m: x[rows] for m, x in batch.lengths.items()}
    inputs = {m: x[rows][:, : int(lengths[m].max())] for m, x in batch.inputs.items()}
    ids = tuple(batch.ids[i] for i in rows)
    return type(batch)(inputs, lengths, batch.y[rows], ids, batch.index[rows], batch.corpus)


@pytest.mark.parametrize("sizes", [(6,), (1, 1, 1, 1, 1, 1), (4, 2)])
def test_order_and_size_of_batches_change_nothing(sizes, make_model, toy_batch):
    order = torch.tensor([4, 1, 5, 0, 3, 2])

    def change(model, dtype):
        batch = cast(toy_batch(6), dtype)
        whole = model(batch)
        parts = [model(select(batch, rows)) for rows in order.split(sizes)]
        y_hat = torch.cat([p.y_hat for p in parts])
        reps = torch.cat([p.reps for p in parts])
        moved = whole._replace(y_hat=whole.y_hat[order], reps=whole.reps[order])
        return largest(moved, whole._replace(y_hat=y_hat, reps=reps))

    single, double = deviations(make_model, change)
    assert single < 1e-5
    assert double < 1e-13


def test_recomputed_activations_give_the_same_gradient(make_model, toy_batch):
    gradients = []
    for on in (False, True):
        model = make_model(encoder_dropout=0.0).train()
        model.checkpoint_activations = on
        assert model.checkpoint_activations is on
        torch.manual_seed(1)
        y_hat, reps, _ = model(toy_batch())
        (y_hat.sum() + reps.square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_recomputation_is_really_on(make_model, toy_batch):
    def kept(on):
        model = make_model().train()
        model.checkpoint_activations = on
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            model(toy_batch())
        return sum(sizes)

    assert kept(True) < 0.7 * kept(False)


def test_half_precision_answers_in_float32(make_model, toy_batch):
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        y_hat, reps, _ = model(toy_batch())
    assert y_hat.dtype == reps.dtype == torch.float32


# --- groups and freezing plans ---


@pytest.mark.parametrize("kind", ["conki", "text-only", "late-fusion", "tfn", "lmf"])
def test_every_parameter_is_in_one_group(kind, make_model):
    model = make_model(kind=kind)
    groups = parameter_groups(model)
    assert list(groups) == ["text", "sequence", "adapters", "heads"]
    names = [name for group in groups.values() for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(name.startswith("encoders.t.") for name, _ in groups["text"])
    assert bool(groups["sequence"]) is (kind != "text-only")
    assert bool(groups["adapters"]) is (kind == "conki")
    table = parameter_table(model)
    assert sum(row["parameters"] for row in table) == sum(p.numel() for p in model.parameters())


def test_stage_1_changes_adapters_and_heads_only(make_model, toy_batch):
    model = make_model()
    table = freeze_for_injection(model)
    assert {row["group"] for row in table if row["trained"]} == {"adapters", "heads"}
    changed = one_step(model, toy_batch())
    assert {name.split(".")[0] for name in changed} == {"adapters", "heads"}
    assert {name.split(".")[1] for name in changed if name.startswith("adapters")} == set("tva")
    assert not any(
        module.training for module in model.encoders.modules() if module is not model.encoders
    )
    assert model.adapters["t"].training


def test_stage_1_reads_no_dropout_of_frozen_backbones(make_tiny_bert, tiny_config, toy_batch):
    backbone = make_tiny_bert(dropout=0.5)
    model = build_model(tiny_config(text_backbone=backbone, encoder_dropout=0.5))
    freeze_for_injection(model)
    model.train()
    first, second = model.encode(toy_batch()), model.encode(toy_batch())
    for m in "tva":
        assert torch.equal(first[m].pan, second[m].pan)
        assert not first[m].pan.requires_grad


def test_stage_1_of_everything(make_model, toy_batch):
    model = make_model()
    freeze_for_injection(model)
    table = freeze_for_injection(model, train="all")
    assert all(row["trained"] == row["parameters"] for row in table)
    assert {n.split(".")[0] for n in one_step(model, toy_batch())} == {
        "adapters",
        "encoders",
        "heads",
    }


@pytest.mark.parametrize("changes", [{"specific": False}, {"kind": "tfn"}])
def test_stage_1_without_adapters_is_an_error(changes, make_model):
    with pytest.raises(ValueError, match="stage1_train: all"):
        freeze_for_injection(make_model(**changes))


def test_stage_2_leaves_injected_adapters_alone(make_model, toy_batch):
    model = make_model()
    table = freeze_for_fine_tuning(model, injected=("t",), freeze_adapters=True)
    frozen = {(row["group"], row["modality"]) for row in table if not row["trained"]}
    assert frozen == {("adapters", "t")}
    changed = one_step(model, toy_batch())
    assert not model.adapters["t"].training
    assert {n[:10] for n in changed if n.startswith("adapters")} == {"adapters.v", "adapters.a"}
    assert {n[:10] for n in changed if n.startswith("encoders")} == {
        "encoders.t",
        "encoders.v",
        "encoders.a",
    }


def test_stage_2_may_train_injected_adapters(make_model, toy_batch):
    model = make_model()
    freeze_for_injection(model)
    freeze_for_fine_tuning(model, injected=("t", "v", "a"), freeze_adapters=False)
    assert any(name.startswith("adapters.t") for name in one_step(model, toy_batch()))
    assert all(p.requires_grad for p in model.parameters())


def test_without_pan_what_nothing_reads_is_frozen(make_model, toy_batch):
    model = make_model(pan=False, adapter_text_layers=(1,))
    freeze_for_fine_tuning(model)
    batch = toy_batch()
    model(batch).y_hat.sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad is (p.grad is not None), name
    assert not model.encoders["t"].backbone.encoder.layer[1].output.dense.weight.requires_grad
    assert model.encoders["t"].backbone.encoder.layer[0].output.dense.weight.requires_grad


# --- what stage 2 takes over ---


def test_stage_2_starts_from_all_but_the_heads(make_model, toy_batch):
    first = make_model(seed=1, pan=False)
    freeze_for_injection(first)
    one_step(first, toy_batch())
    state = injected_state(first)
    second = make_model(seed=2)
    fresh = {k: v.clone() for k, v in second.heads.state_dict().items()}
    assert load_injected(second, state) == ("t", "v", "a")
    assert all(torch.equal(v, fresh[k]) for k, v in second.heads.state_dict().items())
    for name, value in second.state_dict().items():
        if not name.startswith("heads."):
            assert torch.equal(value, state[name]), name


def test_the_state_does_not_follow_later_training(make_model, toy_batch):
    model = make_model()
    state = injected_state(model)
    before = state["encoders.v.cls"].clone()
    one_step(model, toy_batch())
    assert torch.equal(state["encoders.v.cls"], before)


def test_what_the_external_corpus_lacks_stays_new(make_model):
    widths = {"toy": {"v": 5, "a": 3}, "outside": {"v": 7}}
    state = injected_state(make_model(seed=1, modalities=("t", "v"), widths=widths))
    model = make_model(seed=2)
    audio = {k: v.clone() for k, v in model.state_dict().items() if ".a." in k}
    assert load_injected(model, state) == ("t", "v")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in audio.items())
    assert torch.equal(model.encoders["v"].cls, state["encoders.v.cls"])
    only_target = make_model(seed=3, widths={"toy": {"v": 5, "a": 3}, "new.one": {"v": 4}})
    assert load_injected(only_target, state) == ("t", "v")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"adapter_width": 12}, [r"\(12,\)", r"\(8,\)", "adapter_width"]),
        ({"widths": {"toy": {"v": 6, "a": 3}}}, [r"\(16, 6\)", r"\(16, 5\)", "encoders.v"]),
        ({"adapter_text_layers": (0, 1)}, ["adapters.t.chain.1", "run it again"]),
    ],
)
def test_a_state_of_another_width_is_refused(changes, parts, make_model):
    state = injected_state(make_model(**changes))
    model = make_model(seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_injected(model, state)
    for part in parts:
        assert error.match(part)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_state_of_another_backbone_is_refused(make_model, make_tiny_bert):
    wide = injected_state(make_model(text_backbone=make_tiny_bert(d=24), d=24))
    with pytest.raises(ValueError, match=r"24.*16"):
        load_injected(make_model(), wide)


# --- presets ---


def test_released_preset_builds_at_the_paper_backbones_shape(make_tiny_bert, toy_batch):
    """Names and pooling of the released settings, on a 12-layer backbone."""
    folder = make_tiny_bert(layers=12)
    config = RunConfig(
        preset="released", text_backbone=folder, d=16, adapter_width=12, adapter_ff=16,
        encoder_ff=16, widths={"toy": {"v": 5, "a": 3}},
    ).model  # fmt: skip
    model = ConKI(config)
    assert [model.plugged(m) for m in "tva"] == [(0, 5, 10), (1,), (1,)]
    assert model.adapters["t"].pooler is not None
    assert model(toy_batch()).names == REPS


def test_steps_beyond_the_positions_are_refused_by_the_settings():
    with pytest.raises(ValueError, match="max_steps is 600, but encoder_positions only 512"):
        RunConfig(max_steps=600)
    assert RunConfig(max_steps=600, encoder_positions=600).model.encoder_positions == 600
