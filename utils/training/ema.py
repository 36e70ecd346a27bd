"""Exponential moving average of the weights of a run."""

import copy

import torch
from torch import nn


class ExponentialMovingAverage:
    """A copy of a model whose weights follow those of the model.

    torch's AveragedModel goes through all modules, and copies every buffer, at every step. Buffers are constants in
    training (coding tables are made when a model is saved), and weights that are not trained stay equal.

    Attributes:
        model: the copy, for validation and for saving.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        pairs = [(average.detach(), weight.detach()) for average, weight in pairs if weight.requires_grad]
        self._averages, self._weights = ([pair[i] for pair in pairs] for i in (0, 1))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average ← decay · average + (1 − decay) · weight, in a few kernels, for which the host does not wait."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
