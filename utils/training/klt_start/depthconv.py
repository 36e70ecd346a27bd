"""The closed-form start of DepthConv: a KLT of 8×8 pixels, then one of 2×2 places of its coefficients."""

from torch import Tensor, nn
from torch.nn import functional as F

from models import DepthConv
from models.depthconv import PATCH
from utils.training.klt_start.common import klt, least_squares, rounded_latents, zero

WHITENING = 0.5  # between the two, channels are divided by their deviation to this power, so that weak ones are heard


def write(model: DepthConv, x: Tensor, scale: float, wiener: bool) -> list[Tensor]:
    """Write the start into a model whose LAEs have theirs; arguments and result as `klt_start` says."""
    color = x.mean((0, 2, 3))
    fine_blocks = F.pixel_unshuffle(x - color.view(1, 3, 1, 1), PATCH)
    fine_basis = klt(fine_blocks, model.config.width)
    fine = F.conv2d(fine_blocks, fine_basis.T[:, :, None, None])
    blocks = F.pixel_unshuffle(fine, 2)
    basis = klt(blocks, model.M)
    y = scale * F.conv2d(blocks, basis.T[:, :, None, None])
    gain = fine.square().mean((0, 2, 3)).sqrt().clamp(min=1e-4) ** -WHITENING
    colors = color.repeat_interleave(PATCH**2)

    first, last = (layer for layer in model.g_a if isinstance(layer, nn.Conv2d))
    k = fine_basis.shape[1]
    K = basis.shape[1]
    first.weight[:k] = (gain[:, None] * fine_basis.T)[:, :, None, None]
    first.bias[:k] = -gain * (fine_basis.T @ colors)
    zero(last)  # the four lower right ones of its 3×3 taps see a block of 2×2
    last.weight[:K, :k, 1:, 1:] = scale * basis.T.view(K, k, 2, 2) / gain.view(1, -1, 1, 1)

    up, out = (layer for layer in model.g_s if isinstance(layer, nn.Conv2d))
    back = basis[:, :, None, None] / scale
    out_of_fine = fine_basis[:, :, None, None]
    if wiener:
        u, weights = rounded_latents(model, y)
        back = least_squares(u, blocks, transpose=back, weights=weights)
        u = F.pixel_shuffle(F.conv2d(u, back), 2)
        out_of_fine = least_squares(u, fine_blocks, transpose=out_of_fine, weights=weights)
    zero(up, 4 * k)
    up.weight[: 4 * k, :K] = back * gain.repeat_interleave(4).view(-1, 1, 1, 1)
    zero(out)
    out.weight[:, :k] = out_of_fine / gain.view(1, -1, 1, 1)
    out.bias.copy_(colors)

    deviations = F.pad(y.square().mean((0, 2, 3)).sqrt(), (0, model.M - K))
    for i, part in enumerate(deviations.chunk(model.num_slices)):
        (head,) = model.slice_heads[i]
        zero(head)
        head.bias[len(part) :] = part
        zero(model.lrp_transforms[i][-1])
    energies = (fine_blocks, fine), (blocks, y / scale)
    return [before.square().sum() - after.square().sum() for before, after in energies]
