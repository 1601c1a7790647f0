"""Several gloo processes against one that holds the whole batch: value and gradient."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from conki_lib import tiles
from conki_lib.losses import contrastive_loss
from conki_lib.pairs import REPS

SETTINGS = [
    dict(names=REPS),
    dict(names=REPS, form="paper"),
    dict(names=REPS, n1="literal", without=("P2",)),
    dict(names=("O_t", "O_v", "A_a"), n1="literal", form="paper"),
    dict(names=("O_t", "A_a"), without=("N2",)),
]


def batch(order):
    """Eight samples of six representations; random or sorted labels."""
    g = torch.Generator().manual_seed(3)
    reps = torch.randn(8, 6, 5, generator=g, dtype=torch.float64)
    y = torch.tensor([0.0, 2.0, -1.0, 0.4, 2.0, 0.0, -1.0, 3.0])
    return reps, y.sort().values if order == "sorted" else y


def gradient_of(reps, y, names, **options):
    reps = reps[:, : len(names)].clone().requires_grad_()
    loss = contrastive_loss(reps, y, names, **options)
    loss.backward()
    return loss.detach(), reps.grad


def each_process(rank, world, splits, file):
    """Compare this process's value and gradient rows with those of the whole batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    for sizes in splits:
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for order, options in itertools.product(("random", "sorted"), SETTINGS):
            compare(mine, *batch(order), options, case=f"{sizes} {order} {options}")
        no_gradient(mine, *batch("random"))
        if min(sizes) > 0:  # DDP itself takes no empty batch
            through_a_model(mine)
    dist.destroy_process_group()


def compare(mine, reps, y, options, case):
    """DDP divides the sum of gradients by the number of processes."""
    whole, gradient = gradient_of(reps, y, **options, method="dense", gather=False)
    for method, tiles.TILE in (("dense", 768), ("auto", 768), ("tiled", 4)):
        value, rows = gradient_of(reps[mine], y[mine], **options, method=method)
        assert abs(value - whole) < 1e-12, f"{case} {method}"
        difference = rows / dist.get_world_size() - gradient[mine]
        assert (difference.abs() < 1e-12).all(), f"{case} {method}"


def no_gradient(mine, reps, y):
    """Evaluation gathers too, unless told not to."""
    for method in ("dense", "tiled", "auto"):
        value = contrastive_loss(reps[mine], y[mine], method=method)
        assert abs(value - contrastive_loss(reps, y, gather=False)) < 1e-12
        alone = contrastive_loss(reps[mine], y[mine], method=method, gather=False)
        assert len(reps[mine]) == len(reps) or abs(alone - value) > 1e-3


def through_a_model(mine):
    """Weights of a model under DDP get the gradient of the whole batch."""
    for order, method in itertools.product(("random", "sorted"), ("dense", "tiled", "auto")):
        reps, y = batch(order)
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 4).double()
        parallel = DistributedDataParallel(model)
        contrastive_loss(parallel(reps[mine]), y[mine], method=method).backward()
        averaged = model.weight.grad.clone()
        model.zero_grad()
        contrastive_loss(model(reps), y, method="dense", gather=False).backward()
        assert (averaged - model.weight.grad).abs().max() < 1e-12


@pytest.mark.parametrize(
    "splits", [[(4, 4), (7, 1), (3, 5), (8, 0)], [(2, 5, 1)]], ids=["two", "three"]
)
def test_processes_together_equal_one(splits, tmp_path):
    """Even, uneven and empty shares of the batch."""
    world = len(splits[0])
    mp.spawn(each_process, (world, splits, tmp_path / "rendezvous"), nprocs=world)
