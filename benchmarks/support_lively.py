"""Random weights at which a mistake of the tracer shows."""

from __future__ import annotations

import torch
from support_case import Example
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def enliven(example: Example) -> None:
    """Changes a fresh model so that every unit matters; the model is in evaluation mode afterwards.

    Fresh networks hide mistakes: scales of one, shifts of zero, layer scales of 1e-6, weights so small that attention
    is flat. Here scales and shifts are random, weights have the spread at which signals keep their size, and batch
    norms hold the statistics of the example's own activations.
    """
    with torch.no_grad():
        for name, parameter in example.model.named_parameters():
            _enliven(parameter, name.endswith("bias"))
        _run_with_statistics(example)


def _enliven(parameter: nn.Parameter, is_shift: bool) -> None:
    if not parameter.ndim or not parameter.is_floating_point():
        return
    if parameter.ndim == 1 or bool((parameter == parameter.flatten()[0]).all()):
        is_shift = is_shift or not bool(parameter.any())
        random = 0.3 * torch.randn_like(parameter) if is_shift else 0.5 + torch.rand_like(parameter)
        parameter.copy_(random)
        return
    spread = float(parameter.std()) * parameter[0].numel() ** 0.5
    if 0 < spread < 0.5:
        parameter.mul_(1 / spread)


def _run_with_statistics(example: Example) -> None:
    model = example.model.eval()
    norms = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(*example.args, **example.kwargs)
    for norm, momentum in norms.items():
        norm.momentum = momentum
        norm.eval()
