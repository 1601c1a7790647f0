"""Each metric against a case worked by hand."""

import math

import numpy as np
import pytest

from conki_lib.metrics import MOSI_METRICS, SIMS_METRICS, mosi_metrics, sims_metrics

nan = float("nan")


def test_mosi_case_worked_by_hand():
    y = [-3.0, -1.0, 0.0, 1.0, 2.0]
    y_hat = [-4.0, 0.2, -0.1, 1.4, 2.6]
    score = mosi_metrics(y_hat=y_hat, y=y)
    assert tuple(score) == MOSI_METRICS
    assert score["mae"] == pytest.approx((1.0 + 1.2 + 0.1 + 0.4 + 0.6) / 5)
    assert score["corr"] == pytest.approx(np.corrcoef(y_hat, y)[0, 1])
    # rounded predictions -3 0 -0 1 3 against -3 -1 0 1 2;
    # clipped to 2 first: -2 0 -0 1 2 against -2 -1 0 1 2
    assert score["acc7"] == pytest.approx(3 / 5)
    assert score["acc5"] == pytest.approx(4 / 5)
    # non-negative: predicted 0 1 0 1 1, true 0 0 1 1 1
    assert score["acc2_has0"] == pytest.approx(3 / 5)
    # negatives: precision 1/2, recall 1/2; non-negatives: 2/3, 2/3; weights 2 and 3
    assert score["f1_has0"] == pytest.approx((2 * 1 / 2 + 3 * 2 / 3) / 5)
    # zeros left out: predicted 0 1 1 1, true 0 0 1 1
    assert score["acc2_non0"] == pytest.approx(3 / 4)
    # negatives: precision 1, recall 1/2, F1 2/3; positives: precision 2/3, recall 1, F1 4/5
    assert score["f1_non0"] == pytest.approx((2 * 2 / 3 + 2 * 4 / 5) / 4)


def test_rounding_is_half_to_even_after_clipping():
    # 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, -0.5 -> -0, which equals 0, 3.5 -> clipped to 3
    score = mosi_metrics(y_hat=[0.5, 1.5, 2.5, -0.5, 3.5], y=[0.0, 2.0, 2.0, 0.0, 3.0])
    assert score["acc7"] == 1.0
    # 2.5 -> clipped to 2 in Acc-5, and 1.5 -> 2 stands with it
    assert mosi_metrics(y_hat=[2.5, 1.5, -2.9], y=[3.0, 2.0, -2.0])["acc5"] == 1.0
    assert mosi_metrics(y_hat=[0.5, 1.0], y=[1.0, 0.5])["acc7"] == 0.0


def test_zero_is_non_negative_in_has0_and_left_out_of_non0():
    score = mosi_metrics(y_hat=[0.0, -0.0, 0.0], y=[0.0, 0.0, 1.0])
    assert score["acc2_has0"] == 1.0
    assert score["acc2_non0"] == 0.0  # a prediction of 0 is not positive


def test_no_truth_but_zero_leaves_non0_undefined():
    score = mosi_metrics(y_hat=[0.3, -0.3], y=[0.0, 0.0])
    assert math.isnan(score["acc2_non0"]) and math.isnan(score["f1_non0"])
    assert math.isnan(score["corr"]) and score["mae"] == pytest.approx(0.3)


@pytest.mark.parametrize("metrics", [mosi_metrics, sims_metrics])
def test_constant_prediction_has_no_correlation(metrics):
    assert math.isnan(metrics(y_hat=[0.25, 0.25, 0.25], y=[-0.5, 0.0, 0.5])["corr"])
    assert math.isnan(metrics(y_hat=[0.25], y=[0.5])["corr"])


def test_constants_that_float32_makes():
    """Predictions that differ in float64 only are one constant."""
    assert math.isnan(mosi_metrics(y_hat=[0.1, 0.1 + 1e-12], y=[0.0, 1.0])["corr"])


def test_f1_counts_a_class_that_is_never_predicted_as_zero():
    score = mosi_metrics(y_hat=[1.0, 1.0, 1.0, 1.0], y=[1.0, 1.0, 1.0, -1.0])
    # positives: precision 3/4, recall 1, F1 6/7, weight 3; negatives: 0
    assert score["f1_has0"] == pytest.approx(3 / 4 * 6 / 7)


def test_sims_case_worked_by_hand():
    y = [-1.0, -0.6, 0.0, 0.4, 0.8]
    y_hat = [-1.5, 0.05, -0.2, 0.2, 0.7]
    score = sims_metrics(y_hat=y_hat, y=y)
    assert tuple(score) == SIMS_METRICS
    # clipped first: -1.5 counts as -1
    assert score["mae"] == pytest.approx((0.0 + 0.65 + 0.2 + 0.2 + 0.1) / 5)
    assert score["corr"] == pytest.approx(np.corrcoef([-1.0, 0.05, -0.2, 0.2, 0.7], y)[0, 1])
    # Acc-5 bins: predicted 0 2 1 3 3, true 0 1 2 3 4
    assert score["acc5"] == pytest.approx(2 / 5)
    # Acc-3 bins: predicted 0 1 0 2 2, true 0 0 1 2 2
    assert score["acc3"] == pytest.approx(3 / 5)
    # Acc-2: predicted 0 1 0 1 1, true 0 0 0 1 1 (0 is negative)
    assert score["acc2"] == pytest.approx(4 / 5)
    # negatives: precision 1, recall 2/3, F1 4/5, weight 3; positives: 2/3, 1, F1 4/5, weight 2
    assert score["f1"] == pytest.approx(4 / 5)


def test_sims_bins_are_closed_on_the_right_in_float32():
    edges = [-0.7, -0.1, 0.0, 0.1, 0.7]
    inside = [-0.8, -0.2, -0.05, 0.05, 0.6]  # the bin left of each edge
    score = sims_metrics(y_hat=np.array(edges, dtype=np.float32), y=inside)
    assert score["acc5"] == score["acc3"] == 1.0
    # upcast, float32 0.1 would be larger than 0.1 and -0.7 larger than -0.7
    assert np.float64(np.float32(0.1)) > 0.1 and np.float64(np.float32(-0.7)) > -0.7


def test_float32_decides_on_float64_input_too():
    tiny_above = 0.1 + 1e-12
    assert sims_metrics(y_hat=[tiny_above, -0.5], y=[0.05, -0.5])["acc3"] == 1.0


@pytest.mark.parametrize("metrics", [mosi_metrics, sims_metrics])
@pytest.mark.parametrize(
    ("y_hat", "y", "said"),
    [
        ([nan, 1.0], [0.0, 1.0], r"y_hat: 1 of 2 values are NaN .* row 0"),
        ([0.0, 1.0], [0.0, nan], r"y: 1 of 2 values are NaN .* row 1"),
        ([0.0, math.inf], [0.0, 1.0], r"y_hat: .* row 1"),
        ([0.0, 1.0], [0.0], r"equally many .*'y_hat': 2, 'y': 1"),
        ([], [], r"at least one"),
    ],
)
def test_what_cannot_be_scored_is_an_error(metrics, y_hat, y, said):
    with pytest.raises(ValueError, match=said):
        metrics(y_hat=y_hat, y=y)


def test_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        mosi_metrics([0.0], [0.0])


def test_columns_and_float64_are_taken_as_values():
    y = np.array([[-1.0], [0.5], [2.0]])
    column = mosi_metrics(y_hat=y + 0.25, y=y)
    assert column == mosi_metrics(y_hat=(y + 0.25).ravel().tolist(), y=y.ravel().astype("float32"))
    assert all(isinstance(value, float) for value in column.values())
