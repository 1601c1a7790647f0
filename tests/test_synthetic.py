"""The generator: deterministic, leak-free, and as instructive as its text says."""

import dataclasses

import numpy as np
import pytest
from layouts import write_synthetic

from conki_lib.data.store import open_store
from conki_lib.data.synthetic import (
    AUDIO,
    DOMAIN_WORDS,
    EXTERNAL,
    TARGET,
    VISION,
    WORDS,
    _phrases,
    ceilings,
    generate,
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return open_store(write_synthetic(tmp_path_factory.mktemp("synthetic") / "synthetic"))


@pytest.fixture(scope="module")
def external(tmp_path_factory):
    path = tmp_path_factory.mktemp("external") / "synthetic-external"
    return open_store(write_synthetic(path, EXTERNAL, sizes=(1600, 50, 50)))


@pytest.fixture(scope="module")
def reached(target, external):
    return ceilings(target, external)


def test_the_seed_decides_everything(tmp_path):
    def fingerprint(name, seed):
        path = write_synthetic(tmp_path / name, sizes=(20, 5, 5), seed=seed)
        return open_store(path).fingerprint

    assert fingerprint("a", 0) == fingerprint("b", 0) != fingerprint("c", 1)


def test_sizes_and_widths(target, external):
    assert target.info.counts["standard"] == {"train": 600, "valid": 150, "test": 300}
    assert target.info.widths == {"v": len(VISION), "a": len(AUDIO)} == {"v": 12, "a": 8}
    assert external.info.widths == {"v": 16, "a": 10}
    assert EXTERNAL.sizes == (3200, 400, 400)


def test_speakers_are_never_shared(target, external):
    table = target.utterances
    assert table.groupby("video")["standard"].nunique().max() == 1
    assert not set(table["video"]) & set(external.utterances["video"])
    assert table.groupby("video").size().max() == TARGET.clips


def test_labels_are_mean_votes_with_ties(target):
    y = target.utterances["y"].to_numpy()
    assert np.abs(y).max() <= 3 and not np.signbit(y[y == 0]).any()
    np.testing.assert_array_equal(y, y.round(1))
    ties = np.abs(y) % 1 == 0.5
    assert ties.sum() > 20 and (y == 0).sum() > 20
    assert np.abs(y - target.utterances["latent"]).mean() < 0.35


def test_domain_words_are_taught_by_the_external_corpus_only(target, external):
    uses = {s: (target[s].table["domain_word"] != "").mean() for s in target.splits}
    assert uses["train"] < 0.05 and uses["valid"] > 0.25 and uses["test"] > 0.25
    words = external["train"].table["domain_word"].value_counts()
    assert set(words.index) - {""} == set(DOMAIN_WORDS) and words.min() >= 10
    for row in target.utterances.itertuples():
        assert row.domain_word in row.text
        if row.domain_word:
            assert row.said_plain == 0 and row.said == DOMAIN_WORDS[row.domain_word]
            assert not set(row.text.split()) & set(WORDS)


def test_negation_and_intensifiers_move_the_meaning(target):
    means = dict(zip(*_phrases(), strict=True))
    assert means["not good"] < 0 < means["a bit good"] < means["good"] < means["incredibly good"]
    assert means["terrible"] < means["bad"] < 0 < means["not bad"] < means["good"]
    table = target.utterances
    bad = table["text"].str.contains("not bad")
    assert bad.any() and (table["said"][bad] == round(means["not bad"], 3)).all()


def test_conflicts(target):
    table = target.utterances
    assert 0.08 < table["conflict"].mean() < 0.2
    assert set(table["conflict_cue"]) == {"", "text", "face", "voice"}
    irony = table[table["conflict_cue"] == "text"]
    assert (np.sign(irony["said"]) != np.sign(irony["latent"])).mean() > 0.9
    assert (np.sign(irony["shown"]) == np.sign(irony["latent"])).mean() > 0.9
    smiles = table[table["conflict_cue"] == "face"]
    assert (smiles["shown"] >= 0).all() and (smiles["latent"] < 0).all()
    plain = table[~table["conflict"]]
    assert np.corrcoef(plain["shown"], plain["latent"])[0, 1] > 0.8


def test_sequences_have_lengths_lags_and_silence(target):
    train = target["train"]
    v, a = train.lengths("v"), train.lengths("a")
    assert not np.array_equal(v, a) and v.max() <= 20 and a.min() >= 5
    smile, early, late, felt = VISION.index("smile"), [], [], []
    for utterance, silent, shown in zip(
        train, train.table["silent_v"], train.table["shown"], strict=True
    ):
        frames = utterance.inputs["v"].numpy()
        zero = ~frames.any(axis=1)
        assert zero.mean() == pytest.approx(silent, abs=1e-3)
        if silent < 1:
            assert not zero[0] and not zero[-1] and len(frames) >= 5
            early.append(frames[0, smile])
            late.append(frames[~zero][-2:, smile].mean())
            felt.append(shown)
    change = np.array(late) - np.array(early)
    assert abs(np.corrcoef(early, felt)[0, 1]) < 0.15  # only the speaker's baseline as yet
    assert np.corrcoef(change, felt)[0, 1] > 0.4
    assert 0.05 < train.table["silent_v"].mean() < 0.25
    assert target.info.cleaned["vision.empty"] == (target.utterances["silent_v"] == 1).sum() > 5


def test_an_oracle_beats_all_cues_and_these_beat_text(reached):
    mae = {name: row["mae"] for name, row in reached.items()}
    every = mae["cues as meant: said + shown + sounded"]
    assert mae["oracle: the felt sentiment"] < every - 0.1
    for cue in ("said", "shown", "sounded"):
        assert every < mae[f"cues as meant: {cue}"] - 0.15
        assert mae[f"cues as meant: {cue}"] < mae["median of train"] - 0.2
    for simple in ("face", "voice"):
        assert every + 0.2 < mae[f"ridge: {simple}"] < mae["median of train"] - 0.15


def test_external_knowledge_of_words_helps(reached):
    unknown, known = (
        reached[f"cues as meant: {name}"] for name in ("said, domain words unknown", "said")
    )
    assert known["mae"] < unknown["mae"] - 0.15 and known["corr"] > unknown["corr"] + 0.1
    own, both = reached["ridge: words"], reached["ridge: words, external corpus too"]
    assert both["mae"] < own["mae"] - 0.1 and both["corr"] > own["corr"] + 0.1


def test_other_domains_can_be_described():
    domain = dataclasses.replace(TARGET, name="mine", slang=(0.0, 0.0, 0.0), sizes=(30, 10, 10))
    table = generate(domain, seed=3).utterances
    assert len(table) == 50 and (table["domain_word"] == "").all()
