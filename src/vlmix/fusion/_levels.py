"""One level of a map that is never made: what keys between its cells are, known by the cells alone.

Shape letters: see ``vlmix.fusion._native``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_Slices = tuple[slice, slice]
# Numbers of a level at work at once: few enough to bound the memory, many enough that calls cost nothing.
_STEP_CPU, _STEP_ELSEWHERE = 1 << 22, 1 << 27
# Columns whose products with each other are formed at once, though only neighbours' are kept: with the one to
# the right 16, which a CPU multiplies best; elsewhere few calls count for more than few products.
_BLOCK_CPU, _BLOCK_ELSEWHERE = 15, 127
_FEW_CPU = 1 << 18  # numbers that stay in a core's own cache
_TINY = 1e-12  # keeps the deviation of a constant cell from dividing by nothing


class Level:
    """One level's cells, read some rows of windows at a time."""

    def __init__(self, x_IHLC: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        self.x_IHLC, self.sizes, self.dtype = x_IHLC, sizes, dtype
        rows, columns, high, wide = sizes
        self.channels = x_IHLC.shape[-1]
        self.cells = x_IHLC.shape[1] // rows
        # Keys between cells reach one row of cells beyond their window.
        self.halo = int(tuple(x_IHLC.shape[1:3]) != (rows * high, columns * wide))
        down = self._weights(3 * self.cells, 3 * high)
        self.down_PR = down[high : 2 * high, self.cells - self.halo : 2 * self.cells + self.halo]
        self.across_XL = self._weights(x_IHLC.shape[2], columns * wide)
        self.across_W1QL = self.across_XL.unflatten(0, (columns, wide)).unsqueeze(1)

    def measure(self, b_IGWEC: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``dots``, every key's mean over this level, and its |z_i|^2: the last two (I, G, W, 1, P, Q)."""
        dots_IGWEPQ = b_IGWEC.new_empty(*b_IGWEC.shape[:4], *self.sizes[2:])
        means_IGWPQ, squares_IGWPQ = dots_IGWEPQ.new_empty(2, *dots_IGWEPQ.shape[:3], *self.sizes[2:])
        sums_IGWE11 = b_IGWEC.sum(-1)[..., None, None]
        for at in self._slabs():
            if self.halo:
                z_ISLC, mean_ISL = self._centred(at, room)
                squares_IGWPQ[at] = self._squares(z_ISLC)
            else:
                z_ISLC = self._cells(at)
                mean_ISL, squares_ISL = _moments(z_ISLC)
                squares_IGWPQ[at] = self._by_window(self.down_PR, squares_ISL, self.across_XL)
            means_IGWPQ[at] = self._by_window(self.down_PR, mean_ISL, self.across_XL)
            found = self._dots(b_IGWEC[at], z_ISLC)
            if self.halo:
                found = found.addcmul(means_IGWPQ[at].unsqueeze(3), sums_IGWE11[at])
            dots_IGWEPQ[at] = found
        return dots_IGWEPQ, means_IGWPQ.unsqueeze(3), squares_IGWPQ.unsqueeze(3)

    def dots(self, b_IGWEC: Tensor) -> Tensor:
        """Sums over cells B_ic (b . y_c): (I, G, W, E, P, Q)."""
        dots_IGWEPQ = b_IGWEC.new_empty(*b_IGWEC.shape[:4], *self.sizes[2:])
        for at in self._slabs(edges_apart=True):
            dots_IGWEPQ[at] = self._dots(b_IGWEC[at], self._cells(at))
        return dots_IGWEPQ

    def pool(self, u_IGWEPQ: Tensor, offset_IGWE: Tensor, out_IGWEC: Tensor) -> None:
        """Write sums over keys u_i y_i, with ``offset`` taken from every channel."""
        for at in self._slabs(edges_apart=True):
            found = self._on_cells(u_IGWEPQ[at]) @ self._rows(self._cells(at))
            into = out_IGWEC[at]
            torch.sub(found.view(into.shape), offset_IGWE[at].unsqueeze(-1), out=into)

    def gradient(
        self, b_IGWFC: Tensor, steep_IGWFPQ: Tensor, bend_IGWPQ: Tensor, mean_IGWPQ: Tensor
    ) -> Tensor:
        """Sums over keys B_ic (steep_i b - bend_i (y_i - mean_i)), in the cells' own dtype: (I, H, L, C)."""
        out_IHLC = torch.zeros_like(self.x_IHLC, dtype=self.dtype)
        for at in self._slabs():
            y_ISLC = self._cells(at)
            on_cells = self._on_cells(steep_IGWFPQ[at]).mT @ b_IGWFC[at].flatten(2, 3)
            grad_ISLC = self._joined(on_cells.unflatten(2, (-1, y_ISLC.shape[2])))
            self._bend(grad_ISLC, y_ISLC, bend_IGWPQ[at])
            shift_IGWPQ = bend_IGWPQ[at] * mean_IGWPQ[at]
            grad_ISLC += self._by_cell(self.down_PR, shift_IGWPQ, self.across_XL).unsqueeze(-1)
            self._put(out_IHLC, at, grad_ISLC)
        return out_IHLC.to(self.x_IHLC.dtype)

    def _dots(self, b_IGWEC: Tensor, y_ISLC: Tensor) -> Tensor:
        found = b_IGWEC.flatten(2, 3) @ self._rows(y_ISLC).mT
        found_IGWERL = found.unflatten(2, b_IGWEC.shape[2:4]).unflatten(-1, (-1, y_ISLC.shape[2]))
        return self._on_keys(found_IGWERL)

    def _squares(self, z_ISLC: Tensor) -> Tensor:
        """Every key's |z_i|^2 from the products of neighbouring cells: (I, G, W, P, Q)."""
        down, across = self.down_PR, self.across_XL
        here, beside, below, aslant = _neighbours(z_ISLC)
        return (
            self._by_window(down.square(), here, across.square())
            + 2 * self._by_window(down.square(), beside, _pairs(across))
            + 2 * self._by_window(_pairs(down), below, across.square())
            + 2 * self._by_window(_pairs(down), aslant, _pairs(across))
        )

    def _bend(self, grad_ISLC: Tensor, y_ISLC: Tensor, bend_IGWPQ: Tensor) -> None:
        """Take sums over keys B_ic bend_i y_i from ``grad``: each cell's neighbours, weighed."""
        down, across = self.down_PR, self.across_XL
        here = self._by_cell(down.square(), bend_IGWPQ, across.square()).unsqueeze(-1)
        grad_ISLC.addcmul_(here, y_ISLC, value=-1)
        if not self.halo:
            return
        beside = self._by_cell(down.square(), bend_IGWPQ, _pairs(across)).unsqueeze(-1)
        below = self._by_cell(_pairs(down), bend_IGWPQ, across.square()).unsqueeze(-1)
        aslant = self._by_cell(_pairs(down), bend_IGWPQ, _pairs(across)).unsqueeze(-1)
        every, first, second = slice(None), slice(None, -1), slice(1, None)
        for weight, one, other in (
            (beside, (every, first), (every, second)),
            (below, (first, every), (second, every)),
            (aslant, (first, first), (second, second)),
            (aslant, (first, second), (second, first)),
        ):
            grad_ISLC[:, *one].addcmul_(weight, y_ISLC[:, *other], value=-1)
            grad_ISLC[:, *other].addcmul_(weight, y_ISLC[:, *one], value=-1)

    @property
    def numbers_at_work(self) -> int:
        """The most that ``_centred`` needs room for."""
        images, rows = self._at_once
        return images * (rows * self.cells + 2 * self.halo) * self.x_IHLC[0, 0].numel()

    @property
    def _at_once(self) -> tuple[int, int]:
        """How many images and rows of windows to work on at once."""
        limit = _STEP_CPU if self.x_IHLC.device.type == "cpu" else _STEP_ELSEWHERE
        per_row = (self.cells + 2 * self.halo) * self.x_IHLC[0, 0].numel()
        rows = min(max(limit // max(per_row, 1), 1), self.sizes[0])
        images = min(max(limit // max(per_row * self.sizes[0], 1), 1), self.x_IHLC.shape[0])
        return images, rows

    def _slabs(self, *, edges_apart: bool = False) -> Iterator[_Slices]:
        """Images and rows of windows to work on next; with ``edges_apart`` only two are not plain views."""
        images, rows = self._at_once
        last = self.sizes[0]
        inner = 1 if edges_apart and self.halo and last > 2 else 0
        starts = [*range(inner, last - inner, rows)]
        bounds = [0, *starts, last - inner, last] if inner else [*starts, last]
        for image in range(0, self.x_IHLC.shape[0], max(images, 1)):
            for start, stop in pairwise(bounds):
                yield slice(image, image + images), slice(start, stop)

    def _edges(self, windows: slice) -> tuple[slice, int, int]:
        """The rows of cells that the keys in these windows are made of, and how many lie past either edge."""
        first, last = windows.start * self.cells - self.halo, windows.stop * self.cells + self.halo
        above, under = max(-first, 0), max(last - self.x_IHLC.shape[1], 0)
        return slice(first + above, last - under), above, under

    def _cells(self, at: _Slices) -> Tensor:
        """The cells that keys are made of (I, S, L, C); past the edge the outermost row goes on."""
        inside, above, under = self._edges(at[1])
        y_ISLC = self.x_IHLC[at[0], inside].to(self.dtype)
        if not above and not under:
            return y_ISLC
        return torch.cat([y_ISLC[:, :1]] * above + [y_ISLC] + [y_ISLC[:, -1:]] * under, dim=1)

    def _centred(self, at: _Slices, room: Tensor) -> tuple[Tensor, Tensor]:
        """What ``_cells`` gives less its means, in memory that is used again, and the means (I, S, L)."""
        inside, above, under = self._edges(at[1])
        y_ISLC = self.x_IHLC[at[0], inside]
        images, rows, columns, channels = y_ISLC.shape
        mean_ISL = y_ISLC.mean(-1, dtype=self.dtype)
        shape = (images, above + rows + under, columns, channels)
        z_ISLC = room[: math.prod(shape)].view(shape)
        torch.sub(y_ISLC, mean_ISL.unsqueeze(-1), out=z_ISLC[:, above : above + rows])
        z_ISLC[:, :above] = z_ISLC[:, above : above + 1]
        z_ISLC[:, above + rows :] = z_ISLC[:, above + rows - 1 : above + rows]
        return z_ISLC, torch.cat([mean_ISL[:, :1]] * above + [mean_ISL] + [mean_ISL[:, -1:]] * under, dim=1)

    def _put(self, out_IHLC: Tensor, at: _Slices, grad_ISLC: Tensor) -> None:
        """Add the gradient of what ``_cells`` gave to the cells it came from."""
        inside, above, under = self._edges(at[1])
        out_ISLC = out_IHLC[at[0], inside]
        out_ISLC += grad_ISLC[:, above : grad_ISLC.shape[1] - under]
        out_ISLC[:, 0] += grad_ISLC[:, :above].sum(1)
        out_ISLC[:, -1] += grad_ISLC[:, grad_ISLC.shape[1] - under :].sum(1)

    def _rows(self, y_ISLC: Tensor) -> Tensor:
        """The cells behind each row of windows: (I, G, R * L, C), a view where that is possible."""
        r = self.cells + 2 * self.halo
        return y_ISLC.unfold(1, r, self.cells).movedim(-1, 2).flatten(2, 3)

    def _joined(self, x_IGRL: Tensor) -> Tensor:
        """Add up what rows of windows have on the rows of cells they share: (I, S, L, …)."""
        i, g, r, *rest = x_IGRL.shape
        out = x_IGRL.new_zeros(i, (g - 1) * self.cells + r, *rest)
        for row in range(r):
            out[:, row : row + (g - 1) * self.cells + 1 : self.cells] += x_IGRL[:, :, row]
        return out

    def _on_keys(self, x_IGWERL: Tensor) -> Tensor:
        """Each window's numbers for all cells of its rows -> for its own keys: (I, G, W, E, P, Q)."""
        if self.halo:
            return self.down_PR @ (x_IGWERL @ self.across_W1QL.mT)
        return x_IGWERL.unflatten(-1, (self.sizes[1], -1)).diagonal(0, 2, 5).movedim(-1, 2)

    def _on_cells(self, u_IGWEPQ: Tensor) -> Tensor:
        """The transpose of ``_on_keys``: (I, G, W * E, R * L)."""
        if self.halo:
            u_IGWERL = (self.down_PR.mT @ u_IGWEPQ) @ self.across_W1QL
            return u_IGWERL.flatten(-2).flatten(2, 3)
        i, g, w, e, p, q = u_IGWEPQ.shape
        u_IGWEPWQ = u_IGWEPQ.new_zeros(i, g, w, e, p, w, q)
        u_IGWEPWQ.diagonal(0, 2, 5).copy_(u_IGWEPQ.movedim(2, -1))
        return u_IGWEPWQ.flatten(-3).flatten(2, 3)

    def _by_window(self, down_PR: Tensor, x_ISL: Tensor, across_XL: Tensor) -> Tensor:
        """Numbers of cells (or pairs of cells) spread over keys by weights along both sides."""
        rows_IGRL = x_ISL.unfold(1, down_PR.shape[1], self.cells).mT
        spread_IGPX = down_PR @ (rows_IGRL @ across_XL.mT)
        return spread_IGPX.unflatten(-1, (self.sizes[1], -1)).transpose(2, 3)

    def _by_cell(self, down_PR: Tensor, x_IGWPQ: Tensor, across_XL: Tensor) -> Tensor:
        """The transpose of ``_by_window``: (I, S, L)."""
        x_IGPX = x_IGWPQ.transpose(2, 3).flatten(3)
        return self._joined(down_PR.mT @ (x_IGPX @ across_XL))

    def _weights(self, cells: int, keys: int) -> Tensor:
        """Bilinear weights along one side, as torch has them: (keys, cells)."""
        one_11L = torch.eye(cells, device=self.x_IHLC.device, dtype=self.dtype).unsqueeze(0)
        return F.interpolate(one_11L, size=keys, mode="linear", align_corners=False)[0].mT


def _moments(y_ISLC: Tensor) -> tuple[Tensor, Tensor]:
    """Every cell's mean over channels and sum of squares less the mean: (I, S, L) each.

    Taken from a norm of one group, which finds both in one pass and centres before it squares.
    """
    channels = y_ISLC.shape[-1]
    few = (_FEW_CPU if y_ISLC.device.type == "cpu" else _STEP_ELSEWHERE) // channels
    found = [
        torch.native_group_norm(y_NC, None, None, y_NC.shape[0], channels, 1, 1, _TINY)[1:]
        for y_NC in y_ISLC.flatten(0, 2).split(max(few, 1))
    ]
    mean_ISL, rstd_ISL = (torch.cat(parts).view(y_ISLC.shape[:3]) for parts in zip(*found, strict=True))
    return mean_ISL, channels * (rstd_ISL**-2 - _TINY)


def _pairs(weights_XL: Tensor) -> Tensor:
    """Products of the weights of neighbours: (keys, cells - 1)."""
    return weights_XL[:, :-1] * weights_XL[:, 1:]


def _neighbours(z_ISLC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of each cell with itself, the one to the right, the one below, and crosswise of each four."""
    blocks: list[tuple[Tensor, ...]] = []
    columns = z_ISLC.shape[2]
    width = _BLOCK_CPU if z_ISLC.device.type == "cpu" else _BLOCK_ELSEWHERE
    for left in range(0, columns, width):
        block, own = z_ISLC[:, :, left : left + width + 1], min(width, columns - left)
        level = block @ block.mT
        down = block[:, :-1] @ block[:, 1:].mT
        here, beside, below = (level.diagonal(0, -2, -1), level.diagonal(1, -2, -1), down.diagonal(0, -2, -1))
        aslant = down.diagonal(1, -2, -1) + down.diagonal(-1, -2, -1)
        blocks.append((here[..., :own], beside, below[..., :own], aslant))
    here, beside, below, aslant = (torch.cat(parts, dim=-1) for parts in zip(*blocks, strict=True))
    return here, beside, below, aslant
