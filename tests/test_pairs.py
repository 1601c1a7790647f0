"""The paper's set notation as Python set comprehensions over names specifies the masks."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conki_lib.pairs import REPS, SETS, pair_masks, pair_table, row_names, sentiment_class


def paper_sets(y, reps=REPS, n1="symmetric", without=()):
    """Section 3 as it stands there: the four sets of a batch, pairs of names such as "O_t^1"."""
    B = range(1, len(y) + 1)
    r = {i: round(y[i - 1]) for i in B}  # Python rounds half to even
    has = {X: [name[2] for name in reps if name[0] == X] for X in "OA"}
    sets = {
        "P1": {
            (f"{X}_{m}^{i}", f"{X}_{n}^{i}")
            for X in "OA"
            for m in has[X]
            for n in has[X]
            if m != n
            for i in B
        },
        "P2": {
            (f"{X}_{m}^{i}", f"{X}_{n}^{j}")
            for X in "OA"
            for m in has[X]
            for n in has[X]
            for i in B
            for j in B
            if r[i] == r[j] and i != j
        },
        "N1": {
            (f"O_{m}^{i}", f"A_{n}^{j}") for m in has["O"] for n in has["A"] for i in B for j in B
        },
        "N2": {
            (f"{X}_{m}^{i}", f"{X}_{n}^{j}")
            for X in "OA"
            for m in has[X]
            for n in has[X]
            for i in B
            for j in B
            if r[i] != r[j] and i != j
        },
    }
    if n1 == "symmetric":
        sets["N1"] |= {(q, p) for p, q in sets["N1"]}
    return {name: set() if name in without else pairs for name, pairs in sets.items()}


def named(mask, names):
    return {(names[p], names[q]) for p, q in mask.nonzero().tolist()}


labels = st.lists(
    st.one_of(
        st.sampled_from([-2.5, -1.5, -1.0, -0.5, -0.0, 0.0, 0.4, 0.5, 1.0, 1.5, 2.5]),
        st.floats(-3, 3, width=32),
    ),
    min_size=1,
    max_size=5,
)
some_reps = st.permutations(REPS).flatmap(
    lambda order: st.integers(1, 6).map(lambda k: tuple(order[:k]))
)
readings = st.sampled_from(["symmetric", "literal"])
left_out = st.sets(st.sampled_from(SETS)).map(tuple)


@settings(deadline=None)  # a busy machine is no failure
@given(labels, some_reps, readings, left_out)
def test_masks_are_the_sets_of_the_paper(y, reps, n1, without):
    masks = pair_masks(torch.tensor(y), reps, n1=n1, without=without)
    names, sets = row_names(len(y), reps), paper_sets(y, reps, n1, without)
    for name in SETS:
        assert named(getattr(masks, name), names) == sets[name]
    assert named(masks.positive, names) == sets["P1"] | sets["P2"]
    assert named(masks.all, names) == set().union(*sets.values())


@settings(deadline=None)  # a busy machine is no failure
@given(labels, some_reps)
def test_symmetric_sets_partition_all_pairs_but_with_oneself(y, reps):
    masks = pair_masks(torch.tensor(y), reps)
    members = sum(getattr(masks, name).int() for name in SETS)
    assert torch.equal(members, 1 - torch.eye(len(members), dtype=torch.int32))


@settings(deadline=None)  # a busy machine is no failure
@given(labels, some_reps, readings, left_out)
def test_the_table_lists_every_pair_once(y, reps, n1, without):
    table = pair_table(torch.tensor(y), reps, n1=n1, without=without)
    assert list(table.columns) == ["set", "p", "q"]
    assert not table.duplicated().any()
    for name, pairs in paper_sets(y, reps, n1, without).items():
        rows = table[table["set"] == name]
        assert set(zip(rows["p"], rows["q"], strict=True)) == pairs


def test_the_appendix_example_counts_unordered_pairs():
    masks = pair_masks(torch.tensor([1.0, 1.2, -2.0]))
    assert masks.counts(ordered=False) == {"P1": 18, "P2": 18, "N1": 81, "N2": 36}
    assert masks.counts() == {"P1": 36, "P2": 36, "N1": 162, "N2": 72}
    literal = pair_masks(torch.tensor([1.0, 1.2, -2.0]), n1="literal")
    assert literal.counts()["N1"] == literal.counts(ordered=False)["N1"] == 81


def test_literal_n1_belongs_to_o_rows_only():
    mask = pair_masks(torch.tensor([0.0, 1.0]), n1="literal").N1
    for p, q in itertools.product(range(12), repeat=2):
        assert mask[p, q] == (p % 6 < 3 and q % 6 >= 3)


def test_rows_are_sample_major():
    assert row_names(2, ("O_t", "A_v")) == ["O_t^1", "A_v^1", "O_t^2", "A_v^2"]
    assert pair_table(torch.tensor([0.0]), ("O_v", "O_a")).values.tolist() == [
        ["P1", "O_v^1", "O_a^1"],
        ["P1", "O_a^1", "O_v^1"],
    ]


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_classes_round_half_to_even(kind):
    y = kind([0.5, 1.5, 2.5, -0.5, -1.5, -0.0, 0.4999, -2.6])
    classes = sentiment_class(y)
    assert classes.dtype == torch.int64
    assert classes.tolist() == [0, 2, 2, 0, -2, 0, 0, -3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_classes_of_any_number_type(dtype):
    assert sentiment_class(torch.tensor([-2, 0, 3], dtype=dtype)).tolist() == [-2, 0, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_label_that_is_no_number_is_named(bad):
    with pytest.raises(ValueError, match=r"y\[1\] is (nan|inf)"):
        sentiment_class(torch.tensor([0.0, bad]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reps=("O_t", "O_x")), "'O_x'.*did you mean 'O_"),
        (dict(reps=("O_t", "O_t")), "twice"),
        (dict(n1="symetric"), "n1='symetric'.*did you mean 'symmetric'"),
        (dict(without=("N3",)), "'N3'.*did you mean"),
        (dict(without="N1"), "a tuple"),
    ],
)
def test_misspelt_settings_are_refused_with_the_near_names(options, message):
    for f in (pair_masks, pair_table):
        with pytest.raises(ValueError, match=message):
            f(torch.tensor([0.0, 1.0]), **options)


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Series, lambda y: np.array(y)[::-1]])
def test_labels_of_any_kind_keep_their_precision(kind):
    y = [0.50000000001, 0.5, -0.5, 1.5]
    wanted = [1, 0, 0, 2]
    found = sentiment_class(kind(y)).tolist()
    assert found == (wanted[::-1] if "lambda" in kind.__name__ else wanted)
