"""torch.compile for the networks of a codec."""

import torch

from models import Codec


def compile_networks(model: Codec) -> None:
    """`torch.compile` the sub-networks in place; the slice loop between them is not compiled."""
    # Dynamo counts the graphs of all networks together, as they are calls of one nn.Module method: its limit of 8 would
    # leave g_s out.
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the name in PyTorch 2.6
    setattr(config, limit, max(getattr(config, limit), 4 * len(model.networks)))
    config.optimize_ddp = False  # would split graphs where gradients are sent, and each is small already
    for network in model.networks:
        network.compile(dynamic=False)  # to Dynamo the next network is the same one on another shape: else dynamic
