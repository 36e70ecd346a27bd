"""The weights of the reference outputs: numbers that depend on a tensor's name, its shape and a seed alone."""

import zlib

import numpy as np
import torch

# Coding tables and GDN stay as the library makes them.
KEPT = ("gaussian_conditional.", "_quantized_cdf", "_offset", "_cdf_length", "target", ".beta", ".gamma", "pedestal")
KEPT += ("bound",)


@torch.no_grad()
def fill_weights(state_dict: dict[str, torch.Tensor], seed: int) -> None:
    """Overwrite the learned tensors of a state dict in place."""
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and tensor.numel() and not any(kept in name for kept in KEPT):
            draw = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
            tensor.copy_(torch.from_numpy(_values(name, tuple(tensor.shape), draw)))


def _values(name: str, shape: tuple[int, ...], draw: np.random.RandomState) -> np.ndarray:
    if name.endswith("quantiles"):  # [C, 1, 3]: medians off zero
        return np.array([-10.0, 0.0, 10.0]) + 0.2 * draw.standard_normal((shape[0], 1, 1))
    values = draw.standard_normal(shape)
    if name.endswith("weight") and len(shape) >= 2:
        return values * 0.6 / np.sqrt(np.prod(shape[1:])) * (6.0 if name.startswith("g_a.9.") else 1.0)
    if name.startswith("cc_scale_transforms") and name.endswith(".4.bias"):
        return 1.5 + 0.5 * values  # σ of the latents' own size
    if name.endswith("weight") and ".ln" in name:
        return 1 + 0.1 * values
    if name.endswith("alpha"):
        return np.full(shape, 0.3)
    return values * (0.2 if "relative_position_params" in name or "_factor" in name else 0.05)
