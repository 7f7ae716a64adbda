"""The entry point: validate, protect the model, let the criterion score."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import distributed as dist
from torch import nn

from hap import batches as data
from hap.attention import opened
from hap.curvature.criterion import CRITERIA, Criterion, Problem
from hap.curvature.processes import Processes, unwrapped
from hap.curvature.sampling import need_additive, until_settled
from hap.curvature.saved import Saved, identity
from hap.curvature.survey import Peeked, Survey, survey
from hap.curvature.walk import Walk
from hap.errors import HapError, unknown
from hap.types import Progress, Sensitivity, Structure, silent


def measure(
    model: nn.Module,
    batches: Iterable[data.Batch] | None,
    loss: data.Loss | None,
    structure: Structure,
    *,
    criterion: str | Criterion = "gate-fisher",
    samples: int | Literal["auto"] = 512,
    keep: float | None = None,
    cap: int = 8192,
    risk: float = 0.05,
    draws: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    gram: bool = False,
    max_memory: int | None = None,
    autocast: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    state: str | Path | None = None,
    save_every: float = 60.0,
) -> Sensitivity:
    """How much every unit and filter matters to the loss, with a standard error for each.

    The model is put in evaluation mode meanwhile and is left as it was found, also when an error is raised.

    Where `torch.distributed` is set up, every process of the group must call this with the same arguments and the same
    batches; each computes its share of them, and all return the same bits.

    Args:
        model: the dense model; runs on its own device and dtype. What `DistributedDataParallel` wraps is unwrapped.
        batches: calibration batches, read once; None for a criterion that needs no data.
        loss: ``loss(outputs, batch) -> scalar``; None means cross-entropy of the logits, or ``outputs.loss``.
            gate-fisher and gate-ggn need one that is a likelihood, and find out which: cross-entropy (of axis 1, of the
            last axis, or of the next token), binary cross-entropy of logits, or mean squared error.
        structure: what `hap.trace` found in this model.
        criterion: a name in `CRITERIA`, or an instance of `Criterion`.
        samples: the number of examples to use, at most; "auto" to stop when the ranking is settled where units are cut
            off, for criteria whose scores are means over examples. Looks after 128, 256, 512, ... examples.
        keep: with "auto", the fraction of units that stays, and so where the cut is; None means one half.
        cap: with "auto", the number of examples to use, at most. A warning is logged when it, or the data, ends first.
        risk: with "auto", the expected fraction of units on the wrong side of the cut that is good enough.
        draws: random draws per example (gate-fisher) or probes per batch (hessian-trace); None for the default.
        seed: same seed and data, same result.
        progress: wraps the loop over batches.
        gram: also give the matrix of second derivatives between all units (gate-fisher, gate-ggn, gate-empirical).
        max_memory: bytes that the activations saved for a backward pass may take; batches are cut to fit, which does
            not change the scores. Gate criteria only; with `gram`, also bounds what adding to the matrix takes.
        autocast: run the forward pass under `torch.autocast` with this dtype, bfloat16 or float16. Sums stay in
            float32 for each sample and in float64 over samples. Gate criteria only.
        group: the processes that share the work; None for all of them, or for this one alone where
            `torch.distributed` is not set up.
        state: a file to save what has been added up in, so that a run that was killed goes on from there when it is
            started again with the same arguments, to the same bits; deleted at the end. One for each process is kept
            where there are several. For criteria that are `Criterion.resumable`.
        save_every: seconds between two saves.

    Returns:
        Scores of units by family and of filters by layer, float64 on the CPU.

    Raises:
        HapError: an argument is out of range, the structure is another model's, there is no data, the loss is not
            finite, the criterion does not fit the model, the state is another run's, or another process failed.
    """
    model = unwrapped(model)
    chosen = _criterion(criterion)
    _check_counts(chosen, samples, draws)
    _check_auto(chosen, samples, keep, cap, risk)
    _check_structure(model, structure)
    if chosen.needs_data and batches is None:
        raise HapError(
            f"{chosen.name} needs data",
            expected="batches of calibration examples",
            got="None",
            remedy="pass a list or a DataLoader; magnitude and random need no data",
        )
    _check_options(chosen, gram, max_memory, autocast)
    count = chosen.default_draws if draws is None else draws
    most = cap if samples == "auto" else samples
    processes = Processes.of(group, model)
    saved = None
    if state is not None:
        _check_resumable(chosen)
        run = identity(
            model,
            structure,
            criterion=f"{chosen.label} {vars(chosen)}",
            loss=getattr(loss, "__qualname__", type(loss).__qualname__),
            samples=f"auto, keep {keep}, cap {cap}, risk {risk}" if samples == "auto" else samples,
            draws=count,
            seed=seed,
            gram=gram,
            max_memory=max_memory,
            autocast=autocast,
        )
        saved = Saved(processes.file(Path(state)), run, every=save_every)
    walk = Walk(processes, saved)
    # inference_mode(False) also turns gradients on, should the caller have turned them off.
    kept = _gradients_kept(model)
    with data.evaluating(model), opened(model), kept, _recurrent(model), torch.inference_mode(False), walk.together():
        seen = Survey(structure)
        if chosen.watches and batches is not None:
            batches = Peeked(batches)
            seen = survey(model, structure, batches.first)
        problem = Problem(
            model,
            batches,
            loss,
            seen.followed,
            most,
            count,
            seed,
            progress,
            gram,
            max_memory,
            autocast,
            seen.rows,
            walk,
        )
        if samples == "auto":
            found = until_settled(chosen, problem, keep=0.5 if keep is None else keep, risk=risk)
        else:
            found = chosen.score(problem)
    if saved is not None:
        saved.remove()
    _check_scores(chosen.name, seen.followed, found.scores, found.stderr)
    return Sensitivity(
        criterion=chosen.label,
        samples=found.samples,
        draws=found.draws,
        scores=_plain(found.scores),
        stderr=_plain(found.stderr),
        filters=_plain(found.filters),
        filters_stderr=_plain(found.filters_stderr),
        gram=None if found.gram is None else seen.embedded(found.gram, structure),
        skipped=seen.skipped,
    )


def _recurrent(model: nn.Module) -> AbstractContextManager[None]:
    """Without cuDNN's recurrent layers, which have no backward pass in evaluation mode."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


@contextlib.contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Puts every parameter's ``requires_grad`` and ``grad`` back afterwards."""
    found = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in found:
            parameter.grad = None
        yield
    finally:
        for parameter, required, gradient in found:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _criterion(criterion: str | Criterion) -> Criterion:
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str) and criterion in CRITERIA:
        return CRITERIA[criterion]()
    if isinstance(criterion, str):
        raise unknown("criterion", criterion, CRITERIA)
    raise HapError(
        "this is not a criterion",
        expected=f"an instance of hap.curvature.Criterion, or one of: {', '.join(sorted(CRITERIA))}",
        got=repr(criterion),
        remedy="pass an instance, not the class" if isinstance(criterion, type) else "",
    )


def _check_auto(
    criterion: Criterion, samples: int | Literal["auto"], keep: float | None, cap: int, risk: float
) -> None:
    if samples != "auto":
        if keep is not None:
            raise HapError(
                "nothing is to be settled", expected="keep with samples='auto'", got=f"keep={keep}, samples={samples}"
            )
        return
    need_additive(criterion)
    if keep is not None and not 0 < keep <= 1:
        raise HapError("keep is out of range", expected="the fraction of units that stays, in (0, 1]", got=str(keep))
    if cap < 1:
        raise HapError("there are no samples to use", expected="cap >= 1", got=str(cap))
    if not 0 < risk < 1:
        raise HapError("risk is out of range", expected="a fraction of the units, in (0, 1)", got=str(risk))


def _check_counts(criterion: Criterion, samples: int | Literal["auto"], draws: int | None) -> None:
    if isinstance(samples, str):
        if samples != "auto":
            raise HapError("there is no such number of samples", expected="a number or 'auto'", got=repr(samples))
    elif samples < 1:
        raise HapError("there are no samples to use", expected="samples >= 1", got=str(samples))
    if draws is None:
        return
    if not criterion.default_draws:
        raise HapError(
            f"{criterion.name} makes no random draws",
            expected="draws=None",
            got=str(draws),
            remedy="leave draws out, or choose another criterion",
        )
    if draws < 1:
        raise HapError("there are no draws to make", expected="draws >= 1", got=str(draws))


def _check_options(criterion: Criterion, gram: bool, max_memory: int | None, autocast: torch.dtype | None) -> None:
    with_gram = ", ".join(sorted(name for name, known in CRITERIA.items() if known.has_gram))
    gate_based = ", ".join(sorted(name for name, known in CRITERIA.items() if known.gate_based))
    if gram and not criterion.has_gram:
        raise HapError(
            f"{criterion.name} knows nothing of pairs of units", expected=f"gram=True with {with_gram}", got="gram=True"
        )
    for option, value in (("max_memory", max_memory), ("autocast", autocast)):
        if value is not None and not criterion.gate_based:
            raise HapError(
                f"{criterion.name} has no option {option}",
                expected=f"{option} with {gate_based}",
                got=f"{option}={value}",
                remedy=f"leave {option} out; smaller batches take less memory",
            )
    if max_memory is not None and max_memory < 1:
        raise HapError("there is no memory to use", expected="max_memory >= 1, in bytes", got=str(max_memory))
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise HapError("autocast needs a half precision", expected="bfloat16 or float16", got=str(autocast))


def _check_resumable(criterion: Criterion) -> None:
    if not criterion.resumable:
        names = ", ".join(sorted(name for name, known in CRITERIA.items() if known.resumable))
        raise HapError(
            f"{criterion.name} cannot be interrupted",
            expected=f"a state with one of: {names}",
            got=f"criterion {criterion.name}",
            remedy="leave state out",
        )


def _check_structure(model: nn.Module, structure: Structure) -> None:
    if not structure.families and not structure.layers:
        raise HapError(
            "there is nothing to score",
            expected="a structure with at least one family or layer",
            got="neither",
            remedy="see structure.frozen for what cannot leave, and why",
        )
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, spec in structure.tensors.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != tuple(spec.shape):
            raise HapError(
                "this structure is not this model's",
                expected=f"{name} of shape {tuple(spec.shape)}",
                got=f"shape {shape}" if shape else "no such tensor",
                remedy="trace the model that you measure",
            )


def _check_scores(
    name: str, structure: Structure, scores: Mapping[str, torch.Tensor], stderr: Mapping[str, torch.Tensor]
) -> None:
    for family in structure.families:
        for kind, values in (("score", scores), ("standard error", stderr)):
            shape = tuple(values[family.name].shape) if family.name in values else None
            if shape != (family.size,):
                raise HapError(
                    f"criterion {name!r} gave no {kind} for each unit of family {family.name!r}",
                    expected=f"shape ({family.size},)",
                    got="nothing" if shape is None else f"shape {shape}",
                    remedy="a criterion returns Scores with one entry for each family",
                )
        if any(math.isnan(value) for value in scores[family.name].tolist()):
            raise HapError(
                f"criterion {name!r} gave scores that are not numbers",
                expected="a number for each unit",
                got=f"NaN in family {family.name!r}",
                remedy="check inputs and weights for NaN or overflow",
            )


def _plain(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu").double() for name, value in values.items()}
