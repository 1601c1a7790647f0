"""Batches: masks, padding, standardisation, buckets, seeds and fallbacks."""

import numpy as np
import pandas as pd
import pytest
import torch

from conki_lib.data.batch import make_loader, tokenise
from conki_lib.data.store import open_store, write_store


class Letters:
    """A tokenizer with one id per letter, in the calling form of transformers."""

    def __call__(self, texts, *, truncation, max_length, padding, return_attention_mask):
        assert truncation and not padding and not return_attention_mask
        return {"input_ids": [[101, *map(ord, t)][: max_length - 1] + [102] for t in texts]}


def ids_of(loader):
    return [batch.ids for batch in loader]


@pytest.fixture
def split(make_tiny_store):
    return open_store(make_tiny_store(sizes=(70, 4, 4), longest=30))["train"]


def tokens_of(split):
    return tokenise(split.table["text"], Letters(), max_tokens=20)


def test_tokenise_lowers_and_cuts():
    assert [t.tolist() for t in tokenise(["AB", "abcdef"], Letters(), max_tokens=4)] == [
        [101, 97, 98, 102],
        [101, 97, 98, 102],
    ]
    assert tokenise(["A"], Letters(), lower_case=False)[0].tolist() == [101, 65, 102]
    assert tokenise([], Letters()) == []


@pytest.mark.parametrize("standardise", [True, False])
def test_batches_hold_the_frames_and_nothing_else(split, standardise):
    tokens = tokens_of(split)
    loader = make_loader(
        split, modalities="tva", batch_size=7, tokens=tokens, shuffle=True, standardise=standardise
    )
    seen = []
    for batch in loader:
        assert batch.corpus == "toy" and len(batch) == len(batch.ids) == len(batch.y)
        for b, i in enumerate(batch.index.tolist()):
            utterance = split[i]
            assert batch.ids[b] == utterance.id and batch.y[b].item() == pytest.approx(utterance.y)
            assert batch.inputs["t"][b][batch.mask("t")[b]].tolist() == tokens[i].tolist()
            assert not batch.inputs["t"][b][~batch.mask("t")[b]].any()
            for m in "va":
                x, mask = batch.inputs[m][b], batch.mask(m)[b]
                assert mask.sum() == batch.lengths[m][b] == len(utterance.inputs[m])
                assert (x[~mask] == 0).all()
                mean, std = map(torch.from_numpy, split.store.stats(m))
                expected = utterance.inputs[m]
                if standardise:
                    expected = (expected - mean) / std
                torch.testing.assert_close(x[mask], expected, rtol=0, atol=0)
        for m in "tva":
            assert batch.inputs[m].shape[1] == batch.lengths[m].max()
            assert batch.lengths[m].dtype == torch.int64
        assert batch.y.dtype == torch.float32 and batch.inputs["v"].dtype == torch.float32
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(70))


def test_standardised_train_frames_have_mean_0_and_deviation_1(split):
    loader = make_loader(split, modalities="a", batch_size=16, shuffle=False)
    x = torch.cat([batch.inputs["a"][batch.mask("a")] for batch in loader]).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(3).double(), rtol=0, atol=1e-5)


def test_other_splits_take_the_train_statistics(make_tiny_store):
    store = open_store(make_tiny_store())
    batch = next(iter(make_loader(store["test"], modalities="v", batch_size=1, shuffle=False)))
    mean, std = map(torch.from_numpy, store.stats("v"))
    raw = store["test"][int(batch.index)].inputs["v"]
    torch.testing.assert_close(batch.inputs["v"][0], (raw - mean) / std)


def test_order_is_a_function_of_seed_and_epoch(split):
    def order(seed, epoch, **options):
        loader = make_loader(
            split, modalities="va", batch_size=4, shuffle=True, seed=seed, **options
        )
        loader.batch_sampler.set_epoch(epoch)
        return ids_of(loader)

    torch.manual_seed(1)
    first = order(0, 3)
    state = torch.get_rng_state()
    assert order(0, 3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert order(0, 4) != first and order(1, 3) != first


def test_processes_share_every_batch_or_hear_why_not(split):
    def batches(rank, world):
        loader = make_loader(split, modalities="v", batch_size=4, shuffle=True)
        loader.dataset.share = (rank, world)
        return list(loader)

    for one, two, whole in zip(batches(0, 2), batches(1, 2), batches(0, 1), strict=True):
        assert sorted([*one.ids, *two.ids]) == sorted(whole.ids)
        for part, rows in ((one, slice(0, None, 2)), (two, slice(1, None, 2))):
            assert torch.equal(part.inputs["v"], whole.inputs["v"][rows])  # padded as the whole
            assert torch.equal(part.mask("v"), whole.mask("v")[rows])
    with pytest.raises(ValueError, match="cannot be shared by 5 processes: raise batch_size"):
        batches(4, 5)


def test_buckets_save_padding_and_keep_everyone(split):
    def padding(**options):
        loader = make_loader(split, modalities="v", batch_size=4, **options)
        batches = list(loader)
        assert len(batches) == len(loader) == 18
        assert sorted(i for b in batches for i in b.index.tolist()) == list(range(70))
        return sum((~b.mask("v")).sum().item() for b in batches)

    lengths = split.lengths("v")
    arrival = sum((lengths[i : i + 4].max() - lengths[i : i + 4]).sum() for i in range(0, 70, 4))
    assert padding(shuffle=False) < arrival / 4 and padding(shuffle=True) < arrival / 2


def test_max_steps_and_pad_to(split):
    loader = make_loader(
        split, modalities="va", batch_size=70, shuffle=False, max_steps=6, pad_to={"a": 11}
    )
    (batch,) = loader
    assert batch.inputs["v"].shape[1] == 6 == batch.lengths["v"].max()
    assert batch.inputs["a"].shape[1] == 11 and batch.lengths["a"].max() == 6
    (wide,) = make_loader(split, modalities="va", batch_size=70, shuffle=False, pad_to=40)
    (tight,) = make_loader(split, modalities="va", batch_size=70, shuffle=False)
    for m in "va":
        assert wide.inputs[m].shape[1] == 40
        assert torch.equal(wide.inputs[m][wide.mask(m)], tight.inputs[m][tight.mask(m)])


def test_missing_modality_and_placeholder_give_one_zero_frame(tmp_path):
    utterances = pd.DataFrame(
        {
            "id": ["a", "b"],
            "video": ["a", "b"],
            "clip": ["0", "0"],
            "text": ["", ""],
            "y": [0.0, 1.0],
            "standard": ["train", "train"],
        }
    )
    v = [np.zeros((3, 2)), np.arange(8.0).reshape(4, 2) + 5]
    path = write_store(
        tmp_path / "s", utterances, {"v": v}, name="s", language="en", label_range=(-3, 3)
    )
    split = open_store(path)["train"]
    (batch,) = make_loader(split, modalities="va", batch_size=2, shuffle=False)
    assert batch.ids == ("a", "b")
    assert batch.lengths["v"].tolist() == [1, 4] and not batch.inputs["v"][0].any()
    assert batch.inputs["a"].shape == (2, 1, 1) and not batch.inputs["a"].any()
    assert batch.lengths["a"].tolist() == [1, 1]


def test_wrong_calls_are_explained(split):
    with pytest.raises(ValueError, match=r"tokens=tokenise"):
        make_loader(split, modalities="ta", batch_size=2, shuffle=False)
    with pytest.raises(ValueError, match="70 utterances, 2 given"):
        make_loader(split, modalities="t", batch_size=2, shuffle=False, tokens=tokens_of(split)[:2])
    with pytest.raises(ValueError, match="subset of 'tva'"):
        make_loader(split, modalities="tx", batch_size=2, shuffle=False)


def test_to_moves_everything(split):
    batch = next(iter(make_loader(split, modalities="va", batch_size=2, shuffle=False)))
    moved = batch.to("meta")
    tensors = [*moved.inputs.values(), *moved.lengths.values(), moved.y, moved.index]
    assert all(x.device.type == "meta" for x in tensors) and moved.ids == batch.ids
