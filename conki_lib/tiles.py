"""The contrastive loss in closed form: value and gradient at once, over tiles, never R x R.

With z the unit rows, s = z z' / tau and E = exp(s), a unit u is what shares one denominator: a row
(released form) or a sample (paper form), w_u its weight (1, or 1 / number of rows). It needs three
sums over its pairs, D_u = sum of E over All_u, T_u = sum of s over P_u, n_u = |P_u|. Then

    L       = sum_u w_u [log D_u - T_u / n_u]
    dL/dz_p = 1/tau sum_q W_pq z_q,   W_pq = E_pq (a_p + a_q) - [(p,q) in P] (b_p + b_q)

with a = w / D and b = w / n of the row's unit; a_p counts if (p,q) is in All, a_q if (q,p) is. s is
symmetric: one tile serves its rows and its columns. That makes R^2 d operations for D, R^2 d to
have E again (unless it is kept), 2 R^2 d for the gradient.

The positives need no pairs. With S_p = sum of z_q over the positives q of p, a difference of sums
over groups of rows (`_groups`), T_u is the sum of z_p S_p / tau over the rows of u; and since b is
the same for all rows of one kind and class, b_p + b_q = 2 b_p, their part of the gradient is
-2 b_p S_p / tau.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from conki_lib.pairs import Rows, relate, rows_of

TILE = 768  # rows of a tile, at most: a CPU's caches want small ones
GPU_TILE = 4096  # to start a small product takes a GPU longer than the product
FP32_REACH = 70.0  # up to exp(+-70) E and its sums are normal fp32 numbers; beyond, E is float64


class Block(NamedTuple):
    """Consecutive rows."""

    part: slice
    pan: bool | None  # all O, or all A; None: mixed, where All holds every pair but (p, p)
    own: bool  # of this process


class Tile(NamedTuple):
    """The pairs of two blocks."""

    p: Block
    q: Block
    down: bool  # All holds (p, q)
    up: bool  # All holds (q, p)
    mirror: bool  # serves the rows of q too: the plan does not list (q, p)


class Grouping(NamedTuple):
    """One grouping of the rows, signed: it adds its pairs, or takes them away."""

    group: Tensor  # of every row
    sums: Tensor  # of the z of each group, signed
    n: Tensor  # rows in the group of each own row, signed


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
    """One batch, its rows ordered: own ones first; O before A, where All tells them apart.

    Source: paper, losses.
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
            flat = torch.cat([flat, others(flat)])
            y = torch.cat([y, others(y.to(flat.device)).to(y.device)])
        self.tau, self.form, self.n1, self.without, self.gather = tau, form, n1, without, gather
        self.tile = GPU_TILE if flat.is_cuda else TILE
        self.mixed = n1 == "symmetric" and not without
        rows, self.order = rows_of(y.cpu(), names), None
        if not self.mixed:
            order = (2 * (rows.row >= self.own) + ~rows.pan).sort(stable=True).indices
            rows, self.order = rows.at(order), _beside(flat, order)
            flat = flat[self.order]
        self.rows = Rows(*(_beside(flat, entry) for entry in rows))
        self.length = torch.cat([lengths(part) for part in flat.split(self.tile)])
        self.z = flat / self.length if self.mixed else flat.div_(self.length)
        self.wide = torch.float64 if 1 / tau > FP32_REACH else self.z.dtype
        self.plan = list(self._plan(list(self._blocks(names, len(y)))))
        self.groups = list(self._groups(rows))

    def _blocks(self, names: Sequence[str], n_samples: int) -> Iterator[Block]:
        """Cut the ordered rows into blocks of at most `tile` rows."""
        n_pan, stop = sum(name.startswith("O") for name in names), 0
        kinds = [(True, n_pan), (False, len(names) - n_pan)]
        for own, n in ((True, self.shape[0]), (False, n_samples - self.shape[0])):
            for pan, k in [(None, len(names))] if self.mixed else kinds:
                start, stop = stop, stop + n * k
                for first in range(start, stop, self.tile):
                    yield Block(slice(first, min(first + self.tile, stop)), pan, own)

    def _plan(self, blocks: list[Block]) -> Iterator[Tile]:
        """List the tiles: each own block with itself, the own blocks after it, all foreign ones."""
        for i, p in enumerate(blocks):
            for q in blocks[i:] if p.own else ():
                if p.pan == q.pan:
                    yield Tile(p, q, True, True, q.own and q is not p)
                elif "N1" not in self.without:
                    both = self.n1 == "symmetric"
                    yield Tile(p, q, both or p.pan, both or q.pan, q.own)

    def _groups(self, rows: Rows) -> Iterator[Grouping]:
        """Write P1 u P2 as groups of rows of one kind, added or taken away, but for the row itself.

        P1 is what lies between a row and its sample, P2 between its sample and its class.
        """
        P1, P2 = "P1" not in self.without, "P2" not in self.without
        if P2:
            yield self._grouped(1, rows.label.unique(return_inverse=True)[1], rows.pan)
        if P1 != P2:
            yield self._grouped(1 if P1 else -1, rows.sample, rows.pan)

    def _grouped(self, sign: int, of: Tensor, pan: Tensor) -> Grouping:
        group = 2 * of + pan
        size = group.bincount()
        sums = self.z.new_zeros(len(size), self.z.shape[1])
        n, group = (_beside(self.z, x) for x in (sign * size[group[: self.own]], group))
        return Grouping(group, sums.index_add_(0, group, self.z, alpha=sign), n)

    def pull(self, part: slice) -> Tensor:
        """Add up the unit vectors of the positives of some rows; P1 brings the row itself in."""
        first, *more = self.groups
        total = first.sums.index_select(0, first.group[part])
        for grouping in more:
            total += grouping.sums.index_select(0, grouping.group[part])
        return total

    def scores(self, t: Tile) -> Tensor:
        """Compute a tile of s = log f."""
        cosine = self.z[t.p.part] @ self.z[t.q.part].T
        return cosine.to(self.wide).div_(self.tau)

    def similarities(self, t: Tile) -> Tensor:
        """Compute a tile of E, 0 where no pair is."""
        e = self.scores(t).exp_()
        if t.p.pan == t.q.pan and self.without:
            p, q = self.rows.at(t.p.part), self.rows.at(t.q.part)
            e *= relate(p, q, without=self.without).all
        elif t.p is t.q:
            e.fill_diagonal_(0)  # to subtract exp(1 / tau) later would cancel the small terms
        return e

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
        D, kept = self.denominators(keep)
        loss, a, b = self.pool(torch.stack([D, *self.positives()]))
        return loss.to(self.z.dtype), self.gradient(a, b, kept) if slope else None

    def denominators(self, keep: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Compute D of the own rows; hand on the tiles of E, or None in their places."""
        D = self.z.new_zeros(self.own, dtype=torch.float64)
        return D, [self._add(t, D, keep) for t in self.plan]

    def _add(self, t: Tile, D: Tensor, keep: bool) -> Tensor | None:
        """Add a tile of E to D of its rows, and of its columns if it serves them."""
        e = self.similarities(t)
        if t.down:
            D[t.p.part] += e.sum(1)
        if t.up and t.mirror:
            D[t.q.part] += e.sum(0)
        return e if keep else None

    def positives(self) -> tuple[Tensor, Tensor]:
        """Compute T and n of the own rows."""
        T, n = self.z.new_zeros(2, self.own, dtype=torch.float64)
        for part in self._own_parts() if self.groups else ():
            T[part] = torch.linalg.vecdot(self.z[part], self.pull(part))
        for grouping in self.groups:
            n += grouping.n
        if "P1" not in self.without:  # less the row itself, whose length is 1, or 0
            T -= self.length[: self.own, 0].isfinite().double()
            n -= 1
        return T / self.tau, n

    def _own_parts(self) -> list[slice]:
        starts = range(0, self.own, self.tile)
        return [slice(i, min(i + self.tile, self.own)) for i in starts]

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
            foreign = others(self._as_given(a))
            a = torch.cat([a, foreign if self.mixed else foreign[self.order[own:] - own]])
        return loss, a.to(self.wide), b.to(self.z.dtype)

    def _total(self, x: Tensor) -> Tensor:
        """Add up over processes."""
        if self.gather:
            dist.all_reduce(x)
        return x

    def gradient(self, a: Tensor, b: Tensor, kept: list[Tensor | None]) -> Tensor:
        """Compute the products W z, and go back from z to the representations."""
        dz = torch.zeros_like(self.z[: self.own])
        for part in self._own_parts() if self.groups else ():
            dz[part] = self.pull(part).mul_(-2 * b[part, None])  # what z_p adds, its length takes
        kept.reverse()  # to let go of each tile after its use
        for t in self.plan:
            self._push(t, dz, self._weights(t, a, kept.pop()))
        return self._through_length(dz)

    def _weights(self, t: Tile, a: Tensor, e: Tensor | None) -> Tensor:
        """Compute a tile of the first term of W, in the memory of E."""
        e = self.similarities(t) if e is None else e
        return e.mul_(a[t.p.part, None] * t.down + a[t.q.part] * t.up).to(self.z.dtype)

    def _push(self, t: Tile, dz: Tensor, weights: Tensor) -> None:
        """Let each pair of a tile pull or push its rows."""
        dz[t.p.part].addmm_(weights, self.z[t.q.part])
        if t.mirror:
            dz[t.q.part].addmm_(weights.T, self.z[t.p.part])

    def _through_length(self, dz: Tensor) -> Tensor:
        """Turn the gradient by z into that by x = ||x|| z, in the order and shape of `reps`."""
        own = (dz, self.z[: self.own], self.length[: self.own])
        for g, z, length in zip(*(x.split(self.tile) for x in own), strict=True):
            g.addcmul_(torch.linalg.vecdot(g, z)[:, None], z, value=-1)
            g /= self.tau * length
        if self.gather:
            dz *= dist.get_world_size()  # DDP will divide by it
        # z itself is not needed any more, its memory is
        return self._as_given(dz, out=self.z[: self.own]).view(self.shape)

    def _as_given(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Put entries of the own rows in the order of `reps`."""
        if self.mixed:
            return x
        out = torch.empty_like(x) if out is None else out
        return out.index_copy_(0, self.order[: self.own], x)


def _beside(there: Tensor, x: Tensor) -> Tensor:
    """Send what labels decide from the CPU, where it is found: a GPU would be waited for."""
    return x.to(there.device, non_blocking=True)


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
