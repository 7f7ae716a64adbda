"""torch-pruning's importances on the same units and images, each used as its documentation says.

A group's score comes from the package's own importance object, with the package's own defaults (each group is divided
by its mean, so that its global pruning compares shares of a layer), for the groups of the inner families alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from curvature_setting import Setting
from torch import nn
from torch.nn import functional as F

from hap import batches

Batches = list[batches.Batch]
Peer = Callable[[Setting, Batches, int], torch.Tensor]


def _graph(model: nn.Module) -> Any:
    import torch_pruning as tp

    return tp.DependencyGraph().build_dependency(model, example_inputs=torch.zeros(2, 3, 32, 32))


def _scores(setting: Setting, model: nn.Module, importance: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """The importance of every inner unit, asked for one family's group at a time."""
    import torch_pruning as tp

    graph, found = _graph(model), []
    for family in setting.inner:
        units = list(range(family.size))
        group = graph.get_pruning_group(model.get_submodule(family.name), tp.prune_conv_out_channels, idxs=units)
        found.append(importance(group).detach().double())
    return torch.cat(found)


def _by_weights(name: str, **options: Any) -> Peer:
    def peer(setting: Setting, data: Batches, seed: int) -> torch.Tensor:
        from torch_pruning.pruner import importance

        return _scores(setting, copy.deepcopy(setting.model), getattr(importance, name)(**options))

    return peer


def _taylor(setting: Setting, data: Batches, seed: int) -> torch.Tensor:
    """The gradient of the mean loss over all images, as after one large batch."""
    from torch_pruning.pruner.importance import GroupTaylorImportance

    model = copy.deepcopy(setting.model)
    total = sum(map(batches.size, data))
    for images, labels in data:
        (F.cross_entropy(model(images), labels, reduction="sum") / total).backward()
    return _scores(setting, model, GroupTaylorImportance())


def _each_sample(model: nn.Module, data: Batches) -> Iterable[None]:
    """Leaves each sample's gradient in the model in turn. One by one: in evaluation mode that changes nothing."""
    for images, labels in data:
        for i in range(len(images)):
            model.zero_grad()
            F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
            yield


def _hessian(setting: Setting, data: Batches, seed: int) -> torch.Tensor:
    """As released (1.6.1): `accumulate_grad` looks up names among parameters, so that only the last sample counts."""
    from torch_pruning.pruner.importance import GroupHessianImportance

    model, scorer = copy.deepcopy(setting.model), GroupHessianImportance()
    scorer.zero_grad()
    for _ in _each_sample(model, data):
        scorer.accumulate_grad(model)
    return _scores(setting, model, scorer)


def _hessian_mended(setting: Setting, data: Batches, seed: int) -> torch.Tensor:
    """The mean over all samples that its documentation describes."""
    from torch_pruning.pruner.importance import GroupHessianImportance

    model, scorer = copy.deepcopy(setting.model), GroupHessianImportance()
    sums = {p: torch.zeros_like(p) for p in model.parameters()}
    for _ in _each_sample(model, data):
        for p, total in sums.items():
            total += p.grad.square()
    scorer._accu_grad = sums
    scorer._counter = dict.fromkeys(sums, sum(map(batches.size, data)))
    return _scores(setting, model, scorer)


def _obdc(setting: Setting, data: Batches, seed: int) -> torch.Tensor:
    """Labels are sampled from the network's outputs, one for each image."""
    from torch_pruning.pruner.importance import OBDCImportance

    model = copy.deepcopy(setting.model)
    scorer = OBDCImportance(num_classes=len(setting.splits.classes))
    # What its _prepare_model does, which fails on a network without attention (1.6.1).
    for family in setting.inner:
        for name in (family.name, *(m.parameter.removesuffix(".weight") for m in family.roles("consumer"))):
            layer = model.get_submodule(name)
            scorer.modules.append(layer)
            layer.register_forward_pre_hook(scorer._save_input)
            layer.register_full_backward_hook(scorer._save_grad_output)
    generator = torch.Generator().manual_seed(seed)
    for images, _ in data:
        model.zero_grad()
        outputs = model(images)
        labels = torch.multinomial(outputs.detach().softmax(1), 1, generator=generator).squeeze(1)
        F.cross_entropy(outputs, labels).backward()
        scorer.step()
    scorer._rm_hooks(model)
    return _scores(setting, model, scorer)


PEERS: Mapping[str, Peer] = {
    "torch-pruning L1": _by_weights("GroupMagnitudeImportance", p=1),
    "torch-pruning L2": _by_weights("GroupMagnitudeImportance", p=2),
    "torch-pruning BN scale": _by_weights("BNScaleImportance"),
    "torch-pruning LAMP": _by_weights("LAMPImportance"),
    "torch-pruning FPGM": _by_weights("FPGMImportance"),
    "torch-pruning Taylor": _taylor,
    "torch-pruning Hessian, as released": _hessian,
    "torch-pruning Hessian, mended": _hessian_mended,
    "torch-pruning OBDC": _obdc,
}
