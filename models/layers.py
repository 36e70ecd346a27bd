"""Backbone blocks of TCM (CVPR 2023, arXiv 2303.14978): window attention and its mixtures with convolution.

Shapes are `[B, H, W, C]` inside the transformer half and `[B, C, H, W]` elsewhere; H and W are
multiples of the window size p. Module and parameter names are those of the published checkpoints.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from compressai.layers import GDN, AttentionBlock, ResidualBlock, conv1x1
from timm.layers.drop import DropPath
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from models.large.bands import Footprint, computes_whole, footprint, multiple

# Elements that are computed at once, without gradients. On a CPU 1 MiB of input and 4 MiB of a transformer's hidden
# layer stay in the cache; on a GPU the limit bounds the memory of large pictures.
CHUNK, CHUNK_ON_GPU = 2**18, 2**26
MAX_WINDOWS = 2**16 - 1  # in one call: CUDA's attention kernels have as many blocks in one dimension of their grid


def _find_cut_windows(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The windows of a rows × cols grid that a cyclic shift cuts: their numbers, and the kind of cut.

    Kind 0 is the last row, 1 the last column, 2 both (the corner). Returns two int64 tensors `[rows + cols - 1]`.
    """
    right = torch.arange(1, rows, device=device) * cols - 1
    bottom = torch.arange((rows - 1) * cols, rows * cols - 1, device=device)
    corner = torch.arange(rows * cols - 1, rows * cols, device=device)
    kinds = torch.ones_like(right), torch.zeros_like(bottom), torch.full_like(corner, 2)
    return torch.cat((right, bottom, corner)), torch.cat(kinds)


_cut_windows = functools.lru_cache(maxsize=64)(_find_cut_windows)


def _in_chunks(work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """work(x), whose rows are independent; without gradients it is computed piece by piece."""
    chunk = CHUNK if x.device.type == "cpu" else CHUNK_ON_GPU
    if computes_whole() or x.numel() <= chunk:
        return work(x)
    size = max(1, chunk * len(x) // x.numel())
    first = work(x[:size])
    out = first.new_empty((len(x), *first.shape[1:]))
    out[:size] = first
    for start in range(size, len(x), size):
        out[start : start + size] = work(x[start : start + size])
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of `[n, heads, tokens, d]` with a bias `[1 or n, heads, tokens, tokens]`, MAX_WINDOWS at a time."""
    if len(q) <= MAX_WINDOWS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    parts = [x.expand(len(q), -1, -1, -1).split(MAX_WINDOWS) for x in (q, k, v, bias)]
    return torch.cat([_attention(*part) for part in zip(*parts, strict=True)])


def _learning_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same with a bias that learns, for which PyTorch has no fused kernel on a CPU. Its composed one searches for
    rows without any key, which do not exist here, and made a training step in bfloat16 take 1.4 times as long."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return scores.softmax(-1).to(v.dtype) @ v


class WMSA(nn.Module):
    """Multi-head self-attention in p × p windows with a learned relative-position bias.

    Args:
        input_dim: channels C of the input `[B, H, W, C]`; a multiple of head_dim.
        output_dim: channels of the output `[B, H, W, output_dim]`.
        head_dim: channels d of one head.
        window_size: p.
        type: "W" for aligned windows, "SW" for windows shifted by ⌊p/2⌋.
    """

    def __init__(self, input_dim: int, output_dim: int, head_dim: int, window_size: int, type: str) -> None:
        super().__init__()
        if input_dim % head_dim:
            raise ValueError(f"head_dim ({head_dim}) must divide the attention's width ({input_dim})")
        if type not in ("W", "SW"):
            raise ValueError(f'window type must be "W" or "SW", not {type!r}')
        self.head_dim = head_dim
        self.heads = input_dim // head_dim
        self.window_size = p = window_size
        self.shift = p // 2 if type == "SW" else 0
        self.embedding_layer = nn.Linear(input_dim, 3 * input_dim)
        self.relative_position_params = nn.Parameter(torch.zeros(self.heads, 2 * p - 1, 2 * p - 1))
        self.linear = nn.Linear(input_dim, output_dim)
        trunc_normal_(self.relative_position_params, std=0.02)

        # The position of (query i, key j) in the flattened (2p-1)² table, and the pairs that may not see each other in
        # a cut window (last row, last column, corner), depend on p alone, so they are made once.
        y = torch.arange(p).repeat_interleave(p)
        x = torch.arange(p).repeat(p)
        offset = (y[:, None] - y + p - 1) * (2 * p - 1) + (x[:, None] - x + p - 1)
        self.register_buffer("position_index", offset.flatten(), persistent=False)
        if self.shift:
            below = y >= p - self.shift
            beyond = x >= p - self.shift
            rows = below[:, None] != below
            cols = beyond[:, None] != beyond
            hidden = torch.stack([rows, cols, rows | cols])[:, None]  # [3, 1, p², p²]
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            self.register_buffer("cut_mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        p = self.window_size
        s = self.shift
        rows = H // p
        cols = W // p
        if s:
            x = x.roll((-s, -s), dims=(1, 2))
        windows = x.view(B, rows, p, cols, p, C).transpose(2, 3).reshape(-1, p * p, C)
        bias = self.relative_position_params.flatten(1)[:, self.position_index].view(1, self.heads, p * p, p * p)
        out = _in_chunks(lambda part: self._attend(part, bias), windows)
        if s:
            # A mask for all windows would be as large as all scores. Instead one bias is broadcast to all windows,
            # and the few that the shift cut are computed again with their masks.
            cut = _find_cut_windows if torch.compiler.is_compiling() else _cut_windows  # a trace's stay out
            number, kind = cut(rows, cols, x.device)
            index = (torch.arange(B, device=x.device)[:, None] * (rows * cols) + number).flatten()
            mask = (bias + self.cut_mask[kind]).repeat(B, 1, 1, 1)
            out = out.index_copy(0, index, self._attend(windows[index], mask).to(out.dtype))
        out = out.view(B, rows, cols, p, p, -1).transpose(2, 3).reshape(B, H, W, -1)
        return out.roll((s, s), dims=(1, 2)) if s else out

    def _attend(self, windows: Tensor, bias: Tensor) -> Tensor:
        """Attention within windows `[n, p², C]`, with a bias `[1 or n, heads, p², p²]` on the scores."""
        n, tokens, C = windows.shape
        qkv = self.embedding_layer(windows).view(n, tokens, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 × [n, heads, p², d]
        attention = _learning_attention if bias.requires_grad and q.device.type == "cpu" else _attention
        out = attention(q, k, v, bias)
        return self.linear(out.transpose(1, 2).reshape(n, tokens, C))


class Block(nn.Module):
    """Pre-norm transformer block on `[B, H, W, input_dim]`: x + msa(ln1(x)), then x + mlp(ln2(x))."""

    def __init__(
        self, input_dim: int, output_dim: int, head_dim: int, window_size: int, drop_path: float, type: str = "W"
    ) -> None:
        super().__init__()
        if (dim := input_dim) != output_dim:
            raise ValueError(f"a block adds to its input: output_dim is {input_dim} too, not {output_dim}")
        self.ln1 = nn.LayerNorm(dim)
        self.msa = WMSA(dim, dim, head_dim=head_dim, window_size=window_size, type=type)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.ln2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        attended = self.drop_path(self.msa(self.ln1(x)))
        attended += x  # in place, which saves memory
        out = self.drop_path(_in_chunks(self.mlp, self.ln2(attended).flatten(0, 2)).view_as(x))
        out += attended
        return out


class ConvTransBlock(nn.Module):
    """Half of the channels through a residual convolution, half through a transformer block.

    `[B, conv_dim + trans_dim, H, W]` to the same shape (CVPR 2023, section 3.2).
    """

    def __init__(
        self, conv_dim: int, trans_dim: int, head_dim: int, window_size: int, drop_path: float, type: str = "W"
    ) -> None:
        super().__init__()
        self.dims = conv_dim, trans_dim
        self.trans_block = Block(
            trans_dim, trans_dim, head_dim=head_dim, window_size=window_size, drop_path=drop_path, type=type
        )
        self.conv1_1 = conv1x1(conv_dim + trans_dim, conv_dim + trans_dim)
        self.conv1_2 = conv1x1(conv_dim + trans_dim, conv_dim + trans_dim)
        self.conv_block = ResidualBlock(conv_dim, conv_dim)

    def forward(self, x: Tensor) -> Tensor:
        # conv1_1 as two convolutions, whose outputs are contiguous; halves of one output would be copied later.
        weights = self.conv1_1.weight.split(self.dims)
        biases = self.conv1_1.bias.split(self.dims)
        conv, trans = (F.conv2d(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        local = self.conv_block(conv)
        local += conv
        trans = self.trans_block(trans.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out = self.conv1_2(torch.cat((local, trans), dim=1))
        out += x
        return out


@footprint.register
def _(layer: ConvTransBlock) -> Footprint:
    """Window attention sees windows of p rows that start at multiples of p, or half a window later: in an aligned slice
    only the half windows at its ends differ from those of the picture. The two 3×3 convolutions beside it see less."""
    window = layer.trans_block.msa.window_size
    return Footprint(multiple(max(window // 2, 2), window), window)


class SwinBlock(nn.Module):
    """Two transformer blocks, windows aligned and then shifted, on `[B, input_dim, H, W]`."""

    def __init__(self, input_dim: int, output_dim: int, head_dim: int, window_size: int, drop_path: float) -> None:
        super().__init__()
        sizes = dict(head_dim=head_dim, window_size=window_size, drop_path=drop_path)
        self.block_1 = Block(input_dim, output_dim, **sizes, type="W")
        self.block_2 = Block(input_dim, output_dim, **sizes, type="SW")

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class ResidualUnit(nn.Module):
    """The unit of CompressAI's AttentionBlock; theirs is local to a function, so that no pickle can hold one."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out += x
        return self.relu(out)


class SWAtten(AttentionBlock):
    """CompressAI's AttentionBlock whose gate looks through a SwinBlock (CVPR 2023, section 3.3).

    `[B, input_dim, H, W]` to `[B, output_dim, H, W]`. With inter_dim the block works at that
    width between two 1×1 convolutions; without, at input_dim, which must equal output_dim.
    """

    def __init__(
        self, input_dim: int, output_dim: int, head_dim: int, window_size: int, drop_path: float,
        inter_dim: int | None = 192,
    ) -> None:
        if inter_dim is None and input_dim != output_dim:
            raise ValueError(f"without inter_dim, input_dim and output_dim must agree ({input_dim}, {output_dim})")
        width = input_dim if inter_dim is None else inter_dim
        super().__init__(width)
        for unit in (*self.conv_a, *self.conv_b[:-1]):
            unit.__class__ = ResidualUnit
        self.non_local_block = SwinBlock(
            width, width, head_dim=head_dim, window_size=window_size, drop_path=drop_path
        )
        self.in_conv = nn.Identity() if inter_dim is None else conv1x1(input_dim, inter_dim)
        self.out_conv = nn.Identity() if inter_dim is None else conv1x1(inter_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        u = self.in_conv(x)
        gate = torch.sigmoid(self.conv_b(self.non_local_block(u)))
        return self.out_conv(self.conv_a(u) * gate + u)


@footprint.register
def _(layer: SWAtten) -> Footprint:  # half a window, then three 3×3 convolutions
    window = layer.non_local_block.block_2.msa.window_size
    return Footprint(multiple(window // 2 + 3, window), window)


class SubsampledConv(nn.Conv2d):
    """A 1×1 convolution of stride 2, computed as one of stride 1 on every other pixel.

    The numbers are the same, but oneDNN's weight gradient of the strided one writes past its buffer on
    channels-last images of 3 channels (AVX-512, torch 2.15: memory corruption in training).
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, ::2, ::2])


class PointwiseConv(nn.Conv2d):
    """A 1×1 convolution, `[B, in_channels, H, W]` to `[B, out_channels, H, W]`.

    With gradients on a CPU, outside autocast, it is a matrix product, whose gradients use all cores; those of the
    convolution do not. Files are coded without gradients, and so by the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        # Channels-last, as the weights are in training: so is the gradient then.
        matrix = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x.permute(0, 2, 3, 1), matrix, self.bias).permute(0, 3, 1, 2)


class Float32GDN(GDN):
    """A GDN that stays in float32 under autocast: it squares its input, and float16 ends at 65,504."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Float32Conv(nn.Conv2d):
    """A convolution that stays in float32 under autocast: its output is rounded to whole numbers, and bfloat16
    numbers above 128 are a step of one apart."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())
