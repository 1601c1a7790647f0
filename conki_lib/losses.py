"""The losses: similarity f(p, q), contrastive loss L_con in both forms, task loss L_task."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Real
from torch import Tensor

from conki_lib.config import near_names
from conki_lib.pairs import REPS, Labels, as_labels, check_sets, pair_masks
from conki_lib.tiles import ClosedForm, TiledLoss, lengths, others

FORMS = ("released", "paper")
METHODS = ("auto", "tiled", "dense")
MEMORY_CAP = 256 * 2**20  # bytes: "auto" keeps all similarities if half of R x R fits, else tiles
SMALLEST_TAU = 1 / 690  # exp(+-1/tau) must be a float64 number


def task_loss(y_hat: Real[Tensor, " B"], y: Real[Tensor, " B"]) -> Float[Tensor, ""]:
    """Mean squared error of the predicted sentiment, in fp32 at least.

    Formula: L_task = 1/|B| sum_i (y^_i - y_i)^2

    Args:
        y_hat: predictions.
        y: labels, which may be on the CPU.

    Raises:
        ValueError: the shapes differ, where broadcasting would silently compare all with all.

    Source: paper, losses.
    Differs: nothing.
    """
    if y_hat.shape != y.shape:
        raise ValueError(f"y_hat {tuple(y_hat.shape)} and y {tuple(y.shape)} must match")
    y = y.to(y_hat.device, non_blocking=True)
    return (_at_least_fp32(y_hat) - y).square().mean()


def log_f(
    p: Float[Tensor, "P d"], q: Float[Tensor, "Q d"], *, tau: float = 0.07
) -> Float[Tensor, "P Q"]:
    """Compare all rows of p with all rows of q; a zero vector has cosine 0 with everything.

    Formula: log f(p, q) = p/||p|| . q/||q|| . 1/tau, the cosine over the temperature

    Args:
        p: anchors.
        q: the rows that they are compared with.
        tau: temperature, above 0; the smaller, the more the nearest pairs count.

    Source: paper, losses, f(p, q).
    Differs: returns the logarithm; f itself overflows for small tau.
    """
    return (p / lengths(p)) @ (q / lengths(q)).T / tau


def contrastive_loss(
    reps: Float[Tensor, "B K d"],
    y: Labels,
    names: Sequence[str] = REPS,
    *,
    tau: float = 0.07,
    form: str = "released",
    n1: str = "symmetric",
    without: Sequence[str] = (),
    method: str = "auto",
    gather: bool = True,
) -> Float[Tensor, ""]:
    """Hierarchical contrastive loss of a batch.

    Formula, paper form, with P_i = P1_i u P2_i; a set's index i says that the anchor is a row of i:
        L_con = sum_i -1/|P_i| sum_{(p,q) in P_i} log [f(p,q) / sum_{(p',q') in All_i} f(p',q')]
    Released form: the same with rows in place of samples, and the mean over rows for the sum.

    Args:
        reps: representations, not necessarily normalised; half precision is computed in fp32.
        y: labels of the samples; on the CPU, they spare a GPU from being waited for.
        names: which representation stands at each place of axis K; any subset of `REPS`.
        tau: temperature, 0.0015 or more.
        form: "released" or "paper".
        n1: "symmetric" or "literal", see `pair_masks`.
        without: sets whose pairs leave both positives and denominator, e.g. ``("N1",)``.
        method: "dense": the matrix of all pairs; "tiled": memory grows as R, not R^2; "auto": as
            tiled, but similarities are kept if they fit `MEMORY_CAP`. The result is the same.
        gather: in a process group of several, the batch is the union of all processes' batches.

    Returns:
        The loss. Samples (paper) or rows (released) without a positive pair are left out, of the
        mean too; if none has one, 0 with zero gradient. Gathered, each process holds the global
        value, and gradients averaged over processes, as DDP does, equal those of one process that
        holds the whole batch.

    Raises:
        ValueError: shapes that do not fit, or an unknown name, form, reading, set or method.

    The closed form (tiled, auto) gives first derivatives only; dense gives second ones too.

    Source: paper, losses; released form: supervised contrastive loss, Khosla et al. 2020.
    Differs: ordered pairs throughout; symmetric N1 by default.
    """
    y = as_labels(y)
    _check(reps, y, names, tau, form, method)
    check_sets(n1, without)
    gather = gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    with torch.autocast(reps.device.type, enabled=False), full_products(reps.device):
        reps = _at_least_fp32(reps)
        if method == "dense":
            y = y.to(reps.device)
            reps, y = _union(reps, y) if gather else (reps, y)
            return dense_loss(reps, y, names, tau=tau, form=form, n1=n1, without=without)
        problem = ClosedForm(
            reps, y, names, tau=tau, form=form, n1=n1, without=without, gather=gather
        )
        if not (torch.is_grad_enabled() and reps.requires_grad):
            return problem.solve(slope=False)[0]
        keep = method == "auto" and problem.bytes_of_similarities() <= MEMORY_CAP
        return TiledLoss.apply(reps, problem, keep)


def dense_loss(
    reps: Float[Tensor, "B K d"],
    y: Labels,
    names: Sequence[str] = REPS,
    *,
    tau: float = 0.07,
    form: str = "released",
    n1: str = "symmetric",
    without: Sequence[str] = (),
) -> Float[Tensor, ""]:
    """L_con as the equation says it, over the R x R matrix of all pairs; see `contrastive_loss`."""
    rows = reps.flatten(0, 1)
    pairs = pair_masks(y, names, n1=n1, without=without)
    scores, positive, everything = log_f(rows, rows, tau=tau), pairs.positive, pairs.all
    if form == "paper":  # the rows of a sample share one denominator and one mean
        scores, positive, everything = (
            x.unflatten(0, reps.shape[:2]).flatten(1) for x in (scores, positive, everything)
        )
    n = positive.sum(1)
    log_denominator = scores.masked_fill(~everything, -math.inf).logsumexp(1)
    losses = log_denominator - (scores * positive).sum(1) / n.clamp(min=1)
    losses = losses.where(n > 0, 0)
    return losses.sum() if form == "paper" else losses.sum() / (n > 0).sum().clamp(min=1)


@contextlib.contextmanager
def full_products(device: torch.device) -> Iterator[None]:
    """Keep a GPU from TF32: its error of 1e-3 in a cosine would be divided by tau."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(
    reps: Tensor, y: Tensor, names: Sequence[str], tau: float, form: str, method: str
) -> None:
    """Refuse shapes and settings that do not fit, naming the way out."""
    if reps.ndim != 3 or reps.shape[1] != len(names):
        shape = tuple(reps.shape)
        raise ValueError(f"reps {shape} must be (B, K, d) with K = {len(names)}, one per name")
    if len(y) != len(reps):
        raise ValueError(f"reps hold {len(reps)} samples, y {len(y)}: one label per sample")
    if not SMALLEST_TAU <= tau < math.inf:
        raise ValueError(f"tau={tau}: a temperature of {SMALLEST_TAU:.4f} or more is needed")
    for setting, value, known in (("form", form, FORMS), ("method", method, METHODS)):
        if value not in known:
            raise ValueError(f"{setting}={value!r}{near_names(value, known)}: known are {known}")


def _union(reps: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """This process's batch, then the others' without gradient; gradients scaled for DDP's mean."""
    if reps.requires_grad:
        reps, world = reps.clone(), dist.get_world_size()
        reps.register_hook(lambda gradient: gradient * world)
    return torch.cat([reps, others(reps.detach())]), torch.cat([y, others(y)])
