"""The contrastive loss in closed form: value and gradient at once, over tiles, never R x R.

With z the unit rows, s = z z' / tau and E = exp(s), a unit u is what shares one denominator: a row
(released form) or a sample (paper form), w_u its weight (1, or 1 / number of rows). It needs three
sums over its pairs, D_u = sum of E over All_u, T_u = sum of s over P_u, n_u = |P_u|. Then

    L       = sum_u w_u [log D_u - T_u / n_u]
    dL/dz_p = 1/tau sum_q W_pq z_q,   W_pq = E_pq (a_p + a_q) - [(p,q) in P] (b_p + b_q)

with a = w / D and b = w / n of the row's unit; a_p counts if (p,q) is in All, a_q if (q,p) is. b is
the same for all rows of one kind and class, so that b_p + b_q = 2 b_p. s is symmetric: one tile
serves its rows and its columns. That makes R^2 d operations for the sums, R^2 d to have E again
(unless it is kept), 2 R^2 d for the gradient.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from conki_lib.pairs import Rows, relate, rows_of

TILE = 768  # rows of a tile, at most
FP32_REACH = 70.0  # up to exp(+-70) E and its sums are normal fp32 numbers; beyond, E is float64


class Block(NamedTuple):
    """Consecutive rows, all O or all A."""

    part: slice
    pan: bool  # O rows
    own: bool  # of this process


class Tile(NamedTuple):
    """The pairs of two blocks."""

    p: Block
    q: Block
    down: bool  # All holds (p, q)
    up: bool  # All holds (q, p)
    mirror: bool  # serves the rows of q too: the plan does not list (q, p)


class TiledLoss(torch.autograd.Function):
    """The closed form as a step of autograd: forward finds the gradient, backward scales it."""

    @staticmethod
    def forward(ctx, reps: Tensor, problem: "ClosedForm", keep: bool) -> Tensor:
        """Compute the loss and its gradient."""
        loss, gradient = problem.solve(keep=keep)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, above: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient by what comes from above."""
        return ctx.saved_tensors[0] * above, None, None


class ClosedForm:
    """One batch, its rows ordered: own O, own A, then O and A of the other processes.

    Source: section 4.
    Differs: nothing; the sums of `contrastive_loss` in another order.
    """

    def __init__(
        self,
        reps: Float[Tensor, "B K d"],
        y: Tensor,
        names: Sequence[str],
        *,
        tau: float,
        form: str,
        n1: str,
        without: Sequence[str],
        gather: bool,
    ):
        flat, self.shape, self.own = reps.detach().flatten(0, 1), reps.shape, reps[..., 0].numel()
        if gather:
            flat, y = torch.cat([flat, others(flat)]), torch.cat([y, others(y)])
        rows = rows_of(y, names)
        self.order = (2 * (rows.row >= self.own) + ~rows.pan).sort(stable=True).indices
        self.rows, self.z = rows.at(self.order), flat.index_select(0, self.order)
        self.length = torch.cat([lengths(part) for part in self.z.split(TILE)])
        self.z /= self.length
        self.tau, self.form, self.n1, self.without, self.gather = tau, form, n1, without, gather
        self.wide = torch.float64 if 1 / tau > FP32_REACH else self.z.dtype
        self.plan = list(self._plan(list(self._blocks(names, len(y)))))

    def _blocks(self, names: Sequence[str], n_samples: int) -> Iterator[Block]:
        """Cut the ordered rows into blocks of at most `TILE` rows."""
        n_pan, stop = sum(name.startswith("O") for name in names), 0
        for own, n in ((True, self.shape[0]), (False, n_samples - self.shape[0])):
            for pan, k in ((True, n_pan), (False, len(names) - n_pan)):
                start, stop = stop, stop + n * k
                for first in range(start, stop, TILE):
                    yield Block(slice(first, min(first + TILE, stop)), pan, own)

    def _plan(self, blocks: list[Block]) -> Iterator[Tile]:
        """List the tiles: each own block with itself, the own blocks after it, all foreign ones."""
        for i, p in enumerate(blocks):
            for q in blocks[i:] if p.own else ():
                if p.pan == q.pan:
                    yield Tile(p, q, True, True, q.own and q is not p)
                elif "N1" not in self.without:
                    both = self.n1 == "symmetric"
                    yield Tile(p, q, both or p.pan, both or q.pan, q.own)

    def scores(self, t: Tile) -> Tensor:
        """Compute a tile of s = log f."""
        cosine = self.z[t.p.part] @ self.z[t.q.part].T
        return cosine.to(self.wide).div_(self.tau)

    def similarities(self, t: Tile, scores: Tensor) -> Tensor:
        """Turn scores into E in place, 0 where no pair is."""
        e = scores.exp_()
        if t.p.pan == t.q.pan and self.without:
            e *= relate(*self._rows(t), without=self.without).all
        elif t.p is t.q:
            e.fill_diagonal_(0)  # to subtract exp(1 / tau) later would cancel the small terms
        return e

    def positives(self, t: Tile) -> Tensor | None:
        """Mask P1 u P2 in a tile of one kind; a tile of O against A has none."""
        if t.p.pan != t.q.pan:
            return None
        p, q = self._rows(t)
        if self.without:
            return relate(p, q, without=self.without).positive
        same_class = p.label[:, None] == q.label
        return same_class.fill_diagonal_(False) if t.p is t.q else same_class

    def _rows(self, t: Tile) -> tuple[Rows, Rows]:
        return self.rows.at(t.p.part), self.rows.at(t.q.part)

    def bytes_of_similarities(self) -> int:
        """Say what keeping the tiles of E takes."""
        sizes = [len(self.rows.row[t.p.part]) * len(self.rows.row[t.q.part]) for t in self.plan]
        return sum(sizes) * self.wide.itemsize

    def solve(self, *, keep: bool = False, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """Compute the loss over all processes, and its gradient by the own representations.

        Args:
            keep: hold E between the two passes: R^2 / 2 numbers more, a quarter less work.
            slope: compute the gradient, which uses z up; else return None for it.
        """
        sums, kept = self.row_sums(keep)
        loss, a, b = self.pool(sums)
        return loss.to(self.z.dtype), self.gradient(a, b, kept) if slope else None

    def row_sums(self, keep: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Compute D, T and n of the own rows; hand on the tiles of E, or None in their places."""
        sums = self.z.new_zeros(3, self.own, dtype=torch.float64)
        return sums, [self._sum(t, sums, keep) for t in self.plan]

    def _sum(self, t: Tile, sums: Tensor, keep: bool) -> Tensor | None:
        """Add a tile to D, T and n."""
        (D, T, n), scores, positive = sums, self.scores(t), self.positives(t)
        if positive is not None:
            self._add(t, T, scores * positive)
            self._add(t, n, positive)
        e = self.similarities(t, scores)
        self._add(t, D, e)
        return e if keep else None

    def _add(self, t: Tile, sums: Tensor, tile: Tensor) -> None:
        """Add a tile's entries to the sums of its rows, and of its columns if it serves them."""
        if t.down:
            sums[t.p.part] += tile.sum(1)
        if t.up and t.mirror:
            sums[t.q.part] += tile.sum(0)

    def pool(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add up the sums of units; return the loss, and a and b of the rows."""
        released, own = self.form == "released", self.own
        unit = (self.rows.row if released else self.rows.sample)[:own]
        units = sums.new_zeros(3, own if released else self.shape[0])
        D, T, n = units.index_add_(1, unit, sums)
        has = n > 0
        count = self._total(has.sum()).clamp(min=1) if released else 1
        loss = self._total((D.log() - T / n).where(has, 0).sum() / count)
        a, b = (1 / torch.stack([D, n])).where(has, 0)[:, unit] / count
        if self.gather:
            by_row = torch.empty_like(a).index_copy_(0, self.order[:own], a)
            a = torch.cat([a, others(by_row)[self.order[own:] - own]])
        return loss, a.to(self.wide), b.to(self.z.dtype)

    def _total(self, x: Tensor) -> Tensor:
        """Add up over processes."""
        if self.gather:
            dist.all_reduce(x)
        return x

    def gradient(self, a: Tensor, b: Tensor, kept: list[Tensor | None]) -> Tensor:
        """Compute the products W z, and go back from z to the representations."""
        dz = torch.zeros_like(self.z[: self.own])
        kept.reverse()  # to let go of each tile after its use
        for t in self.plan:
            self._push(t, dz, self._weights(t, a, b, kept.pop()))
        return self._through_length(dz)

    def _weights(self, t: Tile, a: Tensor, b: Tensor, e: Tensor | None) -> Tensor:
        """Compute a tile of W, in the memory of E."""
        e = self.similarities(t, self.scores(t)) if e is None else e
        weights = e.mul_(a[t.p.part, None] * t.down + a[t.q.part] * t.up).to(self.z.dtype)
        positive = self.positives(t)
        if positive is not None:
            weights -= positive * (2 * b[t.p.part, None])
        return weights

    def _push(self, t: Tile, dz: Tensor, weights: Tensor) -> None:
        """Let each pair of a tile pull or push its rows."""
        dz[t.p.part].addmm_(weights, self.z[t.q.part])
        if t.mirror:
            dz[t.q.part].addmm_(weights.T, self.z[t.p.part])

    def _through_length(self, dz: Tensor) -> Tensor:
        """Turn the gradient by z into that by x = ||x|| z, in the order and shape of `reps`."""
        own = (dz, self.z[: self.own], self.length[: self.own])
        for g, z, length in zip(*(x.split(TILE) for x in own), strict=True):
            g.addcmul_((g * z).sum(1, keepdim=True), z, value=-1)
            g /= self.tau * length
        gradient = self.z[: self.own]  # z itself is not needed any more, its memory is
        gradient.index_copy_(0, self.order[: self.own], dz)
        if self.gather:
            gradient = gradient * dist.get_world_size()  # DDP will divide by it
        return gradient.view(self.shape)


def lengths(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
    """Measure vectors; a zero vector counts as infinitely long: it scales to 0, with gradient 0.

    Squares are summed in float64: those of 1e20 or 1e-24 are no fp32 numbers.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    return length.masked_fill(length == 0, math.inf)


def others(x: Tensor) -> Tensor:
    """Collect the entries of all other processes, in rank order; each may hold its own number."""
    own = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    padded = x.new_zeros(max(map(int, counts)), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    del parts[dist.get_rank()], counts[dist.get_rank()]
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])
