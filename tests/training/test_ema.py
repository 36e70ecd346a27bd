import torch
from torch.optim.swa_utils import AveragedModel

from utils.training.ema import ExponentialMovingAverage


def test_the_average_is_that_of_pytorch(tiny):
    tiny.requires_grad_(True)
    tiny.g_a.requires_grad_(False)
    decays = iter((0.0, 0.5, 0.9))
    theirs = AveragedModel(tiny, multi_avg_fn=lambda ema, new, _: torch._foreach_lerp_(ema, new, 1 - next(decays)))
    next(decays)  # theirs copies at the first step
    ours, generator = ExponentialMovingAverage(tiny), torch.Generator().manual_seed(0)
    for decay in (0.0, 0.5, 0.9):
        with torch.no_grad():
            for p in tiny.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator))
        ours.update(decay)
        theirs.update_parameters(tiny)
    expected = theirs.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in ours.model.state_dict().items())
    assert not torch.equal(ours.model.g_s[0].conv.weight, tiny.g_s[0].conv.weight)


def test_buffers_are_constants_in_training(tiny):
    """Otherwise the average would have to follow them."""
    before = {name: buffer.clone() for name, buffer in tiny.named_buffers()}
    out = tiny.train()(torch.rand(1, 3, 128, 128), 1.0)
    (out["x_hat"].mean() + tiny.aux_loss()).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in tiny.named_buffers())
