"""Attention and blocks against their definitions, written out in loops."""

import pytest
import torch

from models import layers
from models.layers import WMSA, ConvTransBlock, Float32GDN, SWAtten


def test_gdn_squares_what_float16_cannot_hold():
    x = torch.full((1, 4, 2, 2), 300.0)
    gdn = Float32GDN(4)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(gdn(x.half()), gdn(x)) and torch.isfinite(gdn(x)).all()


def attention_by_definition(m: WMSA, x: torch.Tensor, p: int, shifted: bool) -> torch.Tensor:
    """Token by token: which window it is in, whom it sees, with which bias."""
    B, H, W, C = x.shape
    d = m.head_dim
    h = C // d
    s = p // 2 if shifted else 0
    qkv = m.embedding_layer(x).view(B, H, W, 3, h, d)
    out = torch.zeros(B, H, W, h, d)
    for b in range(B):
        for yi in range(H):
            for xi in range(W):
                ry, rx = (yi - s) % H, (xi - s) % W  # place after the roll
                keys, bias = [], []
                for ky in range(ry // p * p, ry // p * p + p):
                    for kx in range(rx // p * p, rx // p * p + p):
                        last_row, last_col = ry // p == H // p - 1, rx // p == W // p - 1
                        cut = p - s
                        if s and last_row and (ry % p < cut) != (ky % p < cut):
                            continue
                        if s and last_col and (rx % p < cut) != (kx % p < cut):
                            continue
                        keys.append(((ky + s) % H, (kx + s) % W))
                        bias.append(m.relative_position_params[:, ry - ky + p - 1, rx - kx + p - 1])
                k = torch.stack([qkv[b, y, x_, 1] for y, x_ in keys])
                v = torch.stack([qkv[b, y, x_, 2] for y, x_ in keys])
                score = torch.einsum("hd,khd->hk", qkv[b, yi, xi, 0], k) / d**0.5 + torch.stack(bias, 1)
                out[b, yi, xi] = torch.einsum("hk,khd->hd", score.softmax(-1), v)
    return m.linear(out.flatten(3))


@pytest.mark.parametrize("kind", ["W", "SW"])
@pytest.mark.parametrize("size", [(4, 4), (8, 12)])
def test_window_attention_is_its_definition(kind, size):
    torch.manual_seed(0)
    m = WMSA(16, 24, 8, 4, kind)
    torch.nn.init.normal_(m.relative_position_params)
    x = torch.randn(2, *size, 16)
    with torch.no_grad():
        torch.testing.assert_close(m(x), attention_by_definition(m, x, 4, kind == "SW"), atol=1e-5, rtol=1e-4)


def test_pieces_change_nothing(monkeypatch):
    torch.manual_seed(0)
    block = ConvTransBlock(32, 32, 8, 8, 0, "SW")
    x = torch.randn(2, 64, 16, 24)
    whole = block(x)  # with gradients: in one piece
    monkeypatch.setattr(layers, "CHUNK", 64 * 32 * 5)  # five windows, not a divisor of the twelve
    with torch.no_grad():
        torch.testing.assert_close(block(x), whole.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("device", "most"), [("cpu", 2**22), ("meta", 2**30)])
def test_the_hidden_layer_of_a_piece_fits_the_cache_of_a_cpu_and_the_memory_of_a_gpu(device, most):
    """4 MiB and 1 GiB, four times the input, and pieces no smaller than that needs. Meta tensors stand for a GPU's."""
    sizes = []
    x = torch.zeros(3 * most // (4 * 4 * 32) + 1, 32, device=device)
    with torch.no_grad():
        layers._in_chunks(lambda part: sizes.append(4 * part.nbytes) or part, x)
    assert len(sizes) == 4 and most / 2 < max(sizes) <= most


def test_attention_is_handed_no_more_windows_than_a_kernel_takes(monkeypatch):
    """A dimension of CUDA's grids has 65,535 blocks; no fewer are handed over than may be."""
    seen = []
    kernel = "scaled_dot_product_attention"
    monkeypatch.setattr(torch.nn.functional, kernel, lambda q, k, v, attn_mask: seen.append(len(q)) or q)
    windows = torch.zeros(2**17 - 1, 1, 1, 1)
    assert len(layers._attention(windows, windows, windows, windows[:1])) == len(windows)
    assert max(seen) <= 65535 and len(seen) == 3


def queries_keys_values_and_bias(windows: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(windows, 4, 64, 8)] * 3 + [(1, 4, 64, 64)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def test_more_windows_than_a_kernel_takes_are_attended_in_turn(monkeypatch):
    given = queries_keys_values_and_bias(windows=12)
    found, kernel, largest = [], torch.nn.functional.scaled_dot_product_attention, 0

    def counted(q, *others, **more):
        nonlocal largest
        largest = max(largest, len(q))
        return kernel(q, *others, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for limit in (12, 5):
        monkeypatch.setattr(layers, "MAX_WINDOWS", limit)
        largest = 0
        out = layers._attention(*given)
        assert largest == limit
        found.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_that_learns_on_a_cpu_is_the_same_attention(precision, tolerance):
    given = queries_keys_values_and_bias(windows=3)
    expected = layers._attention(*given)
    gradients = torch.autograd.grad(expected.square().sum(), given)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        learning = layers._learning_attention(*given)
    assert learning.dtype == precision
    found = torch.autograd.grad(learning.float().square().sum(), given)
    for one, other in zip((learning, *found), (expected, *gradients), strict=True):
        assert (one - other).norm() < tolerance * other.norm()


def test_1x1_convolutions_that_learn_on_a_cpu_are_convolutions():
    torch.manual_seed(0)
    layer = layers.PointwiseConv(6, 10)
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    products = layer(x)
    expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    gradients = [torch.autograd.grad(out.square().sum(), (x, *layer.parameters())) for out in (products, expected)]
    torch.testing.assert_close(products, expected)
    torch.testing.assert_close(*gradients)
    assert products.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


def test_gradients_reach_everything():
    torch.manual_seed(0)
    block = ConvTransBlock(32, 32, 8, 8, 0, "SW")
    x = torch.randn(1, 64, 8, 8, requires_grad=True)
    block(x).square().sum().backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_swatten_with_and_without_inner_width():
    x = torch.randn(1, 48, 8, 8)
    assert SWAtten(48, 48, 16, 8, 0, None)(x).shape == x.shape
    assert SWAtten(48, 48, 16, 8, 0, 32)(x).shape == x.shape
    with pytest.raises(ValueError, match="must agree"):
        SWAtten(48, 32, 16, 8, 0, None)


def test_unknown_window_type_and_head():
    with pytest.raises(ValueError, match="window type"):
        WMSA(16, 16, 8, 4, "X")
    with pytest.raises(ValueError, match="head_dim"):
        WMSA(16, 16, 5, 4, "W")
