"""The losses against float64 loops over the paper's sets: value and gradient, all readings."""

import itertools
import math

import jaxtyping
import pytest
import torch
from test_pairs import paper_sets
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from conki_lib import losses, tiles
from conki_lib.losses import contrastive_loss, dense_loss, full_products, log_f, task_loss
from conki_lib.pairs import REPS, row_names

METHODS = ("dense", "tiled", "auto")
FORMS = ("released", "paper")
UNBALANCED = ("O_t", "O_v", "A_a")


def by_loops(reps, y, names=REPS, *, tau=0.07, form="released", n1="symmetric", without=()):
    """Section 4 with loops over named pairs; a unit is what shares one denominator."""
    vectors = dict(zip(row_names(len(y), names), reps.flatten(0, 1), strict=True))
    sets = paper_sets(y.tolist(), names, n1, without)
    positive, everything = sets["P1"] | sets["P2"], set().union(*sets.values())
    f = {
        (p, q): (vectors[p] @ vectors[q] / vectors[p].norm() / vectors[q].norm() / tau).exp()
        for p, q in everything
    }
    terms = []
    for unit in dict.fromkeys(p if form == "released" else p.split("^")[1] for p in vectors):
        pairs, positives = (
            [(p, q) for p, q in s if p == unit or p.split("^")[1] == unit]
            for s in (everything, positive)
        )
        if positives:
            denominator = sum(f[pair] for pair in pairs)
            terms.append(-sum((f[pair] / denominator).log() for pair in positives) / len(positives))
    total = sum(terms, reps.sum() * 0)
    return total if form == "paper" else total / max(len(terms), 1)


def with_gradient(loss, reps, *args, **options):
    reps = reps.clone().requires_grad_()
    value = loss(reps, *args, **options)
    (gradient,) = torch.autograd.grad(value, reps)
    return value.detach(), gradient


def random_reps(B, K=6, d=7, seed=0, dtype=torch.float64):
    return torch.randn(B, K, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=[tiles.TILE, 4], ids=["one tile", "tiles of 4"])
def tile(request, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", request.param)


@pytest.mark.parametrize("names", [REPS, UNBALANCED, ("A_v", "O_a"), ("O_t",), REPS[3:]])
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient_equal_the_loops(names, form, monkeypatch):
    y = torch.tensor([1.0, -2.0, 0.6, 0.0])
    reps = random_reps(4, len(names))
    subsets = [(), ("P1",), ("P2",), ("N1",), ("N2",), ("P1", "N1"), ("P2", "N2"), ("P1", "P2")]
    for n1, without in itertools.product(("symmetric", "literal"), subsets):
        options = dict(form=form, n1=n1, without=without)
        value, gradient = with_gradient(by_loops, reps, y, names, **options)
        for method, rows in itertools.product(METHODS, (768, 4)):
            monkeypatch.setattr(tiles, "TILE", rows)
            got = with_gradient(contrastive_loss, reps, y, names, method=method, **options)
            assert abs(got[0] - value) < 1e-12, (method, rows, options)
            assert (got[1] - gradient).abs().max() < 1e-12, (method, rows, options)


@pytest.mark.parametrize("tau", [0.005, 0.01, 0.07, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_temperatures_equal_the_loops(tau, form, tile):
    reps, y = random_reps(4), torch.tensor([1.0, 1.0, 0.0, -1.0])
    value, gradient = with_gradient(by_loops, reps, y, tau=tau, form=form)
    for method in METHODS:
        got = with_gradient(contrastive_loss, reps, y, tau=tau, form=form, method=method)
        assert abs(got[0] - value) < 1e-12 * max(1, value)
        assert (got[1] - gradient).abs().max() < 1e-12 * gradient.abs().max().clamp(min=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("names", "n1", "without"),
    [(REPS, "symmetric", ()), (UNBALANCED, "literal", ("P1",)), (REPS[1:5], "literal", ("N2",))],
)
def test_gradcheck(method, form, names, n1, without, tile):
    reps = random_reps(3, len(names), 3).requires_grad_()
    y = torch.tensor([1.0, 0.0, 1.4])
    options = dict(tau=0.5, form=form, n1=n1, without=without, method=method)
    assert gradcheck(lambda x: contrastive_loss(x, y, names, **options), reps)


def hard_reps(kind, B, d):
    """Random directions; one cluster per class at cosine .5; all nearly collapsed to one point."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(B, 6, d, generator=g)
    y = torch.randint(-3, 4, (B,), generator=g).float()
    centres = torch.randn(7, d, generator=g)
    if kind == "clustered":
        return noise + centres[(y + 3).long(), None], y
    return (noise if kind == "random" else centres[0] + 0.2 * noise), y


@pytest.mark.parametrize(
    ("kind", "bound"), [("random", 2e-6), ("clustered", 2e-5), ("collapsed", 2e-4)]
)
@pytest.mark.parametrize("tau", [0.01, 0.0125, 0.0142, 0.015, 0.07, 1.0])
def test_fp32_gradient_at_full_width(kind, bound, tau):
    reps, y = hard_reps(kind, 24, 768)
    value, gradient = with_gradient(dense_loss, reps.double(), y, tau=tau)
    for method in METHODS:
        got = with_gradient(contrastive_loss, reps, y, tau=tau, method=method)
        assert got[0].dtype == got[1].dtype == torch.float32
        assert abs(got[0] - value) < 2e-6 * value
        assert (got[1] - gradient).norm() < bound * gradient.norm()
        assert (got[1] - gradient).abs().max() < bound * gradient.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_equal_and_opposite_rows_at_the_smallest_temperature(method):
    """Exponents reach from -1/tau to 1/tau: fp32 numbers could not hold them."""
    row = random_reps(1, 1, 768, dtype=torch.float32)
    reps = torch.cat([row, -row, row]).expand(3, 6, 768) + 0.01 * random_reps(3, 6, 768).float()
    y = torch.tensor([0.0, 0.0, 1.0])
    value, gradient = with_gradient(dense_loss, reps.double(), y, tau=0.005)
    got = with_gradient(contrastive_loss, reps, y, tau=0.005, method=method)
    assert abs(got[0] - value) < 1e-5 * value
    assert (got[1] - gradient).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(method, dtype):
    reps, y = random_reps(5).to(dtype), torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0])
    value, gradient = with_gradient(contrastive_loss, reps, y, method=method)
    exact, slope = with_gradient(contrastive_loss, reps.float(), y, method=method)
    assert value.dtype == torch.float32 and torch.equal(value, exact)
    assert gradient.dtype == dtype and torch.equal(gradient, slope.to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method):
    reps, y = random_reps(5).float(), torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0])
    outside = with_gradient(contrastive_loss, reps, y, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        leaf = reps.clone().requires_grad_()
        value = contrastive_loss(leaf, y, method=method)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, outside[0]) and torch.equal(leaf.grad, outside[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_order_of_samples_changes_nothing(method, form, tile):
    reps, y = random_reps(6), torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0, 2.0])
    value, gradient = with_gradient(contrastive_loss, reps, y, form=form, method=method)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    got = with_gradient(contrastive_loss, reps[order], y[order], form=form, method=method)
    assert abs(got[0] - value) < 1e-12
    assert (got[1] - gradient[order]).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("names", "y", "without"),
    [
        (("O_t", "A_t"), [0.0, 1.0], ()),
        (("O_t",), [0.0], ()),
        (("O_t",), [], ()),
        ((), [0.0, 0.0], ()),
        (REPS, [0.0, 1.0], ("P1",)),
        (REPS, [0.0, 0.0], ("P1", "P2")),
        (REPS, [0.0, 0.0], ("P1", "P2", "N1", "N2")),
    ],
)
def test_without_any_positive_the_loss_is_zero(method, form, names, y, without):
    reps = random_reps(len(y), len(names)).requires_grad_()
    loss = contrastive_loss(reps, torch.tensor(y), names, form=form, without=without, method=method)
    loss.backward()
    assert loss == 0 and reps.grad.shape == reps.shape and not reps.grad.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("names", "y"), [(REPS, [0.4]), (REPS, [1.0, 1.0, 1.0]), (REPS[:2], [0.0, 1.0])]
)
def test_one_sample_and_one_class_equal_the_loops(method, form, names, y):
    reps, y = random_reps(len(y), len(names)), torch.tensor(y)
    value, gradient = with_gradient(by_loops, reps, y, names, form=form)
    got = with_gradient(contrastive_loss, reps, y, names, form=form, method=method)
    assert abs(got[0] - value) < 1e-12 and (got[1] - gradient).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_zero_vectors_have_cosine_zero_and_no_gradient(method, tile):
    reps, y = random_reps(3), torch.tensor([1.0, 1.0, 0.0])
    reps[0, 1] = reps[2, 4] = 0
    value, gradient = with_gradient(contrastive_loss, reps, y, method=method)
    assert not gradient[0, 1].any() and not gradient[2, 4].any()
    # a vector orthogonal to all others has cosine 0 too, but with itself
    wide = torch.cat([reps, torch.zeros(3, 6, 2, dtype=reps.dtype)], dim=-1)
    wide[0, 1, -2] = wide[2, 4, -1] = 1
    expected, slope = with_gradient(by_loops, wide, y)
    assert abs(value - expected) < 1e-12
    slope[0, 1] = slope[2, 4] = 0
    assert (gradient - slope[..., :-2]).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_show_in_the_loss(method, bad):
    reps, y = random_reps(3), torch.tensor([1.0, 1.0, 0.0])
    reps[1, 2, 3] = bad
    assert not contrastive_loss(reps, y, method=method).isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_labels_of_any_kind_and_reps_of_any_stride(method):
    reps, y = random_reps(5), [1.0, 1.0, 0.0, 0.5, -1.0]
    value, gradient = with_gradient(contrastive_loss, reps, torch.tensor(y), method=method)
    strided = reps.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    got = with_gradient(contrastive_loss, strided, y, method=method)
    assert torch.equal(got[0], value) and torch.equal(got[1], gradient)


@pytest.mark.parametrize("method", METHODS)
def test_scales_above_and_several_backwards(method):
    reps, y = random_reps(4).requires_grad_(), torch.tensor([1.0, 1.0, 0.0, 0.5])
    loss = contrastive_loss(reps, y, method=method)
    (once,) = torch.autograd.grad(loss, reps, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 0.25, reps, retain_graph=True)
    (again,) = torch.autograd.grad(loss, reps)
    assert torch.equal(scaled, once * 0.25) and torch.equal(again, once)


@pytest.mark.parametrize("method", METHODS)
def test_without_gradient_the_value_is_the_same_and_the_input_untouched(method):
    reps, y = random_reps(4), torch.tensor([1.0, 1.0, 0.0, 0.5])
    before = reps.clone()
    value, _ = with_gradient(contrastive_loss, reps, y, method=method)
    assert torch.equal(contrastive_loss(reps, y, method=method), value)
    with torch.no_grad():
        loss = contrastive_loss(reps.requires_grad_(), y, method=method)
    assert torch.equal(loss, value) and not loss.requires_grad and torch.equal(reps, before)


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest result of any operation held."""

    numbers = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("without", [(), ("P2",)])
def test_tiled_never_holds_the_matrix_of_all_pairs(monkeypatch, without):
    monkeypatch.setattr(tiles, "TILE", 12)
    reps, y = random_reps(20), torch.arange(20) % 3
    with LargestTensor() as seen:
        with_gradient(contrastive_loss, reps, y, without=without, method="tiled")
    assert seen.numbers == reps.numel()
    with LargestTensor() as seen:
        with_gradient(contrastive_loss, reps, y, without=without, method="dense")
    assert seen.numbers == 120**2


@pytest.mark.parametrize(("cap", "computed"), [(2**20, 1), (0, 2)])
def test_auto_keeps_similarities_only_under_the_cap(monkeypatch, cap, computed):
    calls = []
    scores = tiles.ClosedForm.scores
    monkeypatch.setattr(losses, "MEMORY_CAP", cap)
    monkeypatch.setattr(
        tiles.ClosedForm, "scores", lambda self, t: calls.append(t) or scores(self, t)
    )
    with_gradient(contrastive_loss, random_reps(4), torch.zeros(4), method="auto")
    assert len(calls) == computed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n1", ["symmetric", "literal"])
@pytest.mark.parametrize("without", [(), ("N1",), ("P1",), ("P2",), ("P1", "P2")])
def test_a_device_is_never_asked_for_its_numbers(form, n1, without):
    """The meta device has none: whatever would wait for a GPU's answer is an error there."""
    reps, y = torch.empty(9, 6, 7, device="meta"), torch.linspace(-3, 3, 9)
    options = {"tau": 0.07, "form": form, "n1": n1, "without": without, "gather": False}
    loss, gradient = tiles.ClosedForm(reps, y, REPS, **options).solve()
    assert loss.is_meta and gradient.is_meta and gradient.shape == reps.shape
    assert task_loss(reps[:, 0, 0], y).is_meta


def test_log_f_is_cosine_over_temperature():
    p, q = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
    assert torch.allclose(log_f(p, q, tau=0.5), torch.tensor([[0.0, math.sqrt(2), 0.0]]))


def test_softmax_cross_entropy_identity():
    """With one positive pair each, the released form is cross-entropy over cosine logits."""
    reps, y = random_reps(3, 2), torch.tensor([0.0, 1.0, 2.0])
    logits = log_f(reps.flatten(0, 1), reps.flatten(0, 1), tau=0.07).fill_diagonal_(-math.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0, 3, 2, 5, 4]))
    assert abs(contrastive_loss(reps, y, ("O_t", "O_v")) - expected) < 1e-12


def test_task_loss_is_the_mean_squared_error_in_fp32():
    y_hat = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    loss = task_loss(y_hat, torch.tensor([0.0, 4.0]))
    loss.backward()
    assert loss == 2.5 and loss.dtype == torch.float32
    assert y_hat.grad.tolist() == [1.0, -2.0]
    with pytest.raises((ValueError, TypeError)):  # the latter from the types checked in tests
        task_loss(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(names=("O_t", "O_v")), "K = 2"),
        (dict(names=(*REPS[:5], "A_b")), "'A_b'.*did you mean"),
        (dict(y=torch.tensor([0.0, math.nan, 0.0])), r"y\[1\]"),
        (dict(tau=0.0), "tau=0.0"),
        (dict(tau=math.nan), "tau=nan"),
        (dict(form="papers"), "form='papers'.*did you mean 'paper'"),
        (dict(method="tile"), "method='tile'.*did you mean 'tiled'"),
        (dict(n1="both"), "n1='both'"),
        (dict(without=("P3",)), "'P3'"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**{"reps": random_reps(3), "y": torch.zeros(3), **change})


def test_a_label_for_every_sample():
    with pytest.raises(ValueError, match="3 samples, y 2"):
        contrastive_loss(random_reps(3), [0.0, 0.0])


@pytest.mark.parametrize("method", ["dense", "tiled", "auto"])
@pytest.mark.parametrize("shape", [(), (4, 1), (4, 2)])
def test_labels_must_be_one_per_sample(method, shape, request):
    # as for a user, whose calls no type checker sees
    jaxtyping.config.update("jaxtyping_disable", True)
    request.addfinalizer(lambda: jaxtyping.config.update("jaxtyping_disable", False))
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        contrastive_loss(torch.randn(4, 6, 5), torch.zeros(shape), method=method)


@pytest.mark.parametrize("method", ["dense", "tiled", "auto"])
@pytest.mark.parametrize("scale", [1e20, 1e-24])
def test_very_long_and_very_short_vectors_keep_their_directions(method, scale):
    g = torch.Generator().manual_seed(0)
    reps, y = torch.randn(4, 6, 5, generator=g), torch.tensor([1.0, 1.0, 0.0, 0.0])
    wanted = contrastive_loss(reps, y, method=method)
    scaled = (reps * scale).requires_grad_()
    loss = contrastive_loss(scaled, y, method=method)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert scaled.grad is None and torch.autograd.grad(loss, scaled)[0].abs().max() > 0


def test_products_of_a_gpu_are_full_fp32_and_the_setting_comes_back():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_products(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
        with full_products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
