"""A tiny DepthConv_VBR."""

import torch

from models import DepthConv_VBR

TINY = dict(
    width=32, depth=1, latent_depth=1, M=64, num_slices=2, hyper_channels=32, hyper_width=32,
    slice_width=32, slice_depth=1, residual_width=16, residual_depth=1, context_model=1,
)


def shake(model: DepthConv_VBR, seed: int = 0) -> DepthConv_VBR:
    """Move every weight off its initial value, so that no block is the identity; latents of several steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "entropy_bottleneck" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
        for (head,) in model.slice_heads:
            head.bias[len(head.bias) // 2 :].add_(10.0)
        model.g_a[3].weight.mul_(12.0)  # the strided convolution
        model.h_a[-1].weight.mul_(0.4)
        if model.order.context_model:
            model.context_model[-1].weight.mul_(0.5)
    return model


def made() -> DepthConv_VBR:
    torch.manual_seed(0)
    model = shake(DepthConv_VBR(**TINY)).eval()
    model.update(force=True)
    return model
