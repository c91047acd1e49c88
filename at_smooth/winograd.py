"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3), for attacks on a CPU.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016): a 6x6 tile d of the input and a 3x3
filter g give a 4x4 tile of the output,

    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A.

Written out over all tiles, Bᵀ d B is a product with the Kronecker square of Bᵀ, and the sum of ⊙ over the channels is a
product of matrices for each of the 36 places in a tile. A GPU's library does likewise by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from at_smooth.scratch import SCRATCH

OUT, IN = 4, 6  # pixels a side of a tile of the output, and of the input that it depends on
PLACES = IN * IN

_matrix = partial(torch.tensor, dtype=torch.float32, device="cpu")

_BT = _matrix([
    [4.0, 0.0, -5.0, 0.0, 1.0, 0.0],
    [0.0, -4.0, -4.0, 1.0, 1.0, 0.0],
    [0.0, 4.0, -4.0, -1.0, 1.0, 0.0],
    [0.0, -2.0, -1.0, 2.0, 1.0, 0.0],
    [0.0, 2.0, -1.0, -2.0, 1.0, 0.0],
    [0.0, 4.0, 0.0, -5.0, 0.0, 1.0],
])  # fmt: skip
_G = _matrix([
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
])  # fmt: skip
_AT = _matrix([
    [1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
    [0.0, 1.0, -1.0, 2.0, -2.0, 0.0],
    [0.0, 1.0, 1.0, 4.0, 4.0, 0.0],
    [0.0, 1.0, -1.0, 8.0, -8.0, 1.0],
])  # fmt: skip

_BB, _AA, _GG = torch.kron(_BT, _BT), torch.kron(_AT, _AT), torch.kron(_G, _G)
_GG_TURNED = torch.kron(_G.flip(1), _G.flip(1))  # of the filter turned by 180 degrees

_AT_ONCE = 3 * 2**19  # values in the tiles of one piece of a batch: about what stays in a cache
_GROUP = 12  # places whose filters are formed at once, where they are used once: likewise


def winograd_conv2d(images: Tensor, weight: Tensor) -> Tensor:
    """``F.conv2d(images, weight, padding=1)`` up to rounding; its gradient reaches the images, not the weight.

    Args:
        images: (N, C, H, W), float32 on the CPU.
        weight: (K, C, 3, 3), likewise, frozen.

    Returns:
        (N, K, H, W), channels_last. Errors are some 3e-6 of the outputs' standard deviation (rms), at most 1e-4; an
        infinity spoils the tiles that it is in.
    """
    result: Tensor = _Convolution.apply(images, weight, False)
    return result


def tiles(height: int, width: int) -> tuple[int, int]:
    """How many tiles there are in a column and in a row of an output of this size."""
    return -(-height // OUT), -(-width // OUT)


class _Convolution(torch.autograd.Function):
    """By the filters; or by the filters turned, from their outputs back to their inputs, as gradients go."""

    @staticmethod
    def forward(images: Tensor, weight: Tensor, turned: bool) -> Tensor:
        return _convolve(images, weight, turned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, ctx.turned = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _Convolution.apply(gradients[0], weight, not ctx.turned), None, None


def _convolve(images: Tensor, weight: Tensor, turned: bool) -> Tensor:
    n, inputs, height, width = images.shape
    outputs = weight.shape[1 if turned else 0]
    rows, columns = tiles(height, width)
    padded = F.pad(images, (1, 1 + OUT * columns - width, 1, 1 + OUT * rows - height))
    padded = padded.permute(0, 2, 3, 1).contiguous()
    size = (n, outputs, OUT * rows, OUT * columns)
    result = torch.empty(size, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
    by_tile = result.permute(0, 2, 3, 1).view(n, rows, OUT, columns, OUT, outputs)
    at_once = max(1, _AT_ONCE // (PLACES * rows * columns * max(inputs, outputs)))
    # of several pieces, each needs all filters; for one they need never be in memory together
    filters = list(_filters(weight, turned, PLACES)) if n > at_once else _filters(weight, turned, _GROUP)
    for piece, out in zip(torch.split(padded, at_once), torch.split(by_tile, at_once), strict=True):
        d = SCRATCH.empty("tiles", IN, IN, len(piece), rows, columns, inputs)
        d.copy_(piece.unfold(1, IN, OUT).unfold(2, IN, OUT).permute(4, 5, 0, 1, 2, 3))
        d = torch.mm(_BB, d.view(PLACES, -1), out=SCRATCH.empty("transformed", PLACES, d.numel() // PLACES))
        d = d.view(PLACES, -1, inputs)
        y = SCRATCH.empty("products", PLACES, d.shape[1], outputs)
        for places, u in filters:
            torch.bmm(d[places], u, out=y[places])
        y = torch.mm(_AA, y.view(PLACES, -1), out=SCRATCH.empty("tiles", OUT * OUT, y.numel() // PLACES))
        out.copy_(y.view(OUT, OUT, len(piece), rows, columns, outputs).permute(2, 3, 0, 4, 1, 5))
    if (OUT * rows, OUT * columns) == (height, width):
        return result
    return result[:, :, :height, :width].contiguous(memory_format=torch.channels_last)


def _filters(weight: Tensor, turned: bool, at_once: int) -> Iterator[tuple[slice, Tensor]]:
    """Places, so many at once (P), with their G g Gᵀ: (P, C, K), or (P, K, C) turned; each may overwrite the last."""
    g = weight.permute(0, 2, 3, 1).reshape(len(weight), 9, -1)
    for first, matrix in enumerate(torch.split(_GG_TURNED if turned else _GG, at_once)):
        into = SCRATCH.empty("filters", len(g), len(matrix), g.shape[2])
        filters = torch.bmm(matrix.expand(len(g), -1, -1), g, out=into).transpose(0, 1)
        yield slice(first * at_once, (first + 1) * at_once), filters if turned else filters.transpose(1, 2)
