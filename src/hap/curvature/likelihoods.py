"""Output distributions: what the losses of supervised training are the negative log-likelihood of.

For such a loss the Fisher information is the generalized Gauss-Newton matrix (Martens, JMLR 2020, section 9.2), which
can be sampled, one draw of labels for each backward pass, or computed, one backward pass for each output.

Each loss here is a mean over *terms*: the positions of a text, the outputs of a multi-label classifier. For sample i
with ``counts[i]`` terms and their sum l_i, the mean loss is ``sum_i l_i / sum_i counts[i]`` and its curvature
``sum_i F_i / sum_i counts[i]`` with F_i that of l_i: nothing depends on how the data is cut into batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from hap import batches
from hap.curvature.outputs import entry, finite_scores, labels_like, need_finite, scores_of, unfit
from hap.errors import HapError

Directions = list[tuple[torch.Tensor, torch.Tensor]]


class Objective(ABC):
    """A loss as a sum over samples, whose gradient by each sample's gates one backward pass gives."""

    @abstractmethod
    def counts(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """The number of terms in each sample: (samples,)."""

    @abstractmethod
    def total(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """The sum over all terms of the batch of the loss on the true labels: a scalar.

        Raises:
            HapError: there are no labels, or they do not fit the outputs.
        """


class Likelihood(Objective):
    """A loss that is the negative log-likelihood of an output distribution, up to a constant."""

    def check(self, outputs: Any, batch: batches.Batch) -> None:
        """Refuses labels that do not fit the outputs, once before anything is computed with them."""

    @abstractmethod
    def sampled(self, outputs: Any, batch: batches.Batch, generator: torch.Generator) -> torch.Tensor:
        """A scalar; the mean over draws of its squared gradient by a sample's gates is F_pp for that sample.

        Drawn on the CPU in float64, sample by sample, so that the same seed means the same labels on every device
        and however the data is cut into batches.
        """

    @abstractmethod
    def drawn(self, outputs: Any, batch: batches.Batch) -> int:
        """How many float64 numbers `sampled` draws for each sample."""

    @abstractmethod
    def signed(self, outputs: Any, batch: batches.Batch, generator: torch.Generator) -> torch.Tensor:
        """As `sampled`, from random signs of all outputs in place of labels: one that is rare is not missed.

        The gradient is ``J' R z`` with z the signs and ``R R'`` the Hessian of the loss by the outputs.
        """

    @abstractmethod
    def exact(self, outputs: Any, batch: batches.Batch) -> Directions:
        """Pairs (scalar, weights (samples,)): the weighted sum of their squared gradients is F_pp.

        Raises:
            HapError: there are positions, each of which would need backward passes of its own.
        """


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Mean cross-entropy of logits.

    Positions whose label is -100 do not count; without labels, those whose ``attention_mask`` is 0 do not.

    Attributes:
        class_axis: where the logits have their classes: 1 in PyTorch, -1 in Hugging Face models of texts.
        shift: position t predicts the label at t + 1, as in causal language models.
    """

    class_axis: Literal[1, -1] = 1
    shift: bool = False

    def counts(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """See `Objective.counts`."""
        scores, _, counted = self._read(outputs, batch)
        return counted.reshape(len(scores), -1).sum(1)

    def check(self, outputs: Any, batch: batches.Batch) -> None:
        """Refuses labels that are no classes, on any device: to pick by one on a GPU would end the use of it."""
        scores, labels, _ = self._read(outputs, batch)
        if labels is not None:
            batches.check_labels(labels, scores.shape[1])

    def total(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """See `Objective.total`."""
        scores, labels, counted = self._read(outputs, batch)
        if labels is None:
            raise unfit("cross-entropy", "int64 labels, one for each set of class scores", scores, batch)
        if labels.device.type == "cpu":  # elsewhere, looking at the labels would stop the device at every step
            batches.check_labels(labels, scores.shape[1])
        return _picked(self._log_p(scores, counted), labels.masked_fill(~counted, 0), counted).neg()

    def sampled(self, outputs: Any, batch: batches.Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Likelihood.sampled`. Labels are independent between positions: the sum's Fisher is the sum."""
        scores, _, counted = self._read(outputs, batch)
        log_p = self._log_p(scores, counted)
        return _picked(log_p, _sample(log_p.detach(), generator), counted)

    def drawn(self, outputs: Any, batch: batches.Batch) -> int:
        """See `Likelihood.drawn`."""
        _, _, counted = self._read(outputs, batch)
        return counted[0].numel()

    def signed(self, outputs: Any, batch: batches.Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Likelihood.signed`: ``R = diag sqrt(p) - p sqrt(p)'`` has ``R R' = diag p - p p'``."""
        scores, _, counted = self._read(outputs, batch)
        log_p = self._log_p(scores, counted)
        root = (log_p.detach() / 2).exp() * _signs(log_p, generator)
        return (log_p * root).where(counted.unsqueeze(1) & (root != 0), 0).sum()

    def exact(self, outputs: Any, batch: batches.Batch) -> Directions:
        """See `Likelihood.exact`: ``F_pp = sum_c p(c) (d log p(c) / d a_p)^2``."""
        scores, _, counted = self._read(outputs, batch)
        if scores.ndim != 2:
            raise HapError(
                "gate-ggn needs one set of class scores for each sample",
                expected="logits (N, classes)",
                got=f"logits {tuple(scores.shape)}",
                remedy="use gate-fisher, which allows positions",
            )
        log_p = self._log_p(scores, counted)
        weights = log_p.detach().exp() * counted.unsqueeze(1)
        return [(log_p[:, c].sum(), weights[:, c]) for c in range(scores.shape[1])]

    def _read(self, outputs: Any, batch: batches.Batch) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Scores (N, classes, ...), labels (N, ...) if they fit, and which positions (N, ...) count."""
        scores = scores_of(outputs, batch, least=2).movedim(self.class_axis, 1)
        positions = scores.shape[:1] + scores.shape[2:]
        given = entry(batch, "labels")
        labels = given if given is not None and given.dtype == torch.int64 and given.shape == positions else None
        mask = entry(batch, "attention_mask")
        if labels is not None:
            counted = labels != batches.IGNORED_LABEL
        elif mask is not None and mask.shape == positions:
            counted = mask != 0
        else:
            counted = torch.ones(positions, dtype=torch.bool, device=scores.device)
        if not self.shift:
            return scores, labels, counted
        if scores.ndim < 3:
            raise unfit("cross-entropy of the next token", "logits (N, positions, classes)", scores, batch)
        return scores[:, :, :-1], labels if labels is None else labels[:, 1:], counted[:, 1:]

    def _log_p(self, scores: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        log_p = scores.log_softmax(1)
        need_finite(log_p.detach().amax(1)[counted])  # a class's -inf alone is a masked class
        return log_p


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Mean binary cross-entropy of logits: each output is a yes or no of its own."""

    def counts(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """See `Objective.counts`."""
        return _outputs_of_each(scores_of(outputs, batch))

    def total(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """See `Objective.total`."""
        scores = finite_scores(outputs, batch)
        labels = labels_like(scores, batch, "binary cross-entropy")
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")

    def sampled(self, outputs: Any, batch: batches.Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Likelihood.sampled`."""
        scores = finite_scores(outputs, batch)
        p = scores.detach().to("cpu").double().sigmoid()
        labels = (_uniform(p.shape, generator) < p).to(scores)
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")

    def drawn(self, outputs: Any, batch: batches.Batch) -> int:
        """See `Likelihood.drawn`."""
        return scores_of(outputs, batch)[0].numel()

    def signed(self, outputs: Any, batch: batches.Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Likelihood.signed`."""
        scores = finite_scores(outputs, batch)
        p = scores.detach().sigmoid()
        return (scores * (p * (1 - p)).sqrt() * _signs(scores, generator)).sum()

    def exact(self, outputs: Any, batch: batches.Batch) -> Directions:
        """See `Likelihood.exact`: ``F_pp = sum_o p_o (1 - p_o) (d z_o / d a_p)^2``."""
        scores = _rows(finite_scores(outputs, batch))
        p = scores.detach().sigmoid()
        return [(scores[:, o].sum(), (p * (1 - p))[:, o]) for o in range(scores.shape[1])]


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Mean squared error: outputs with Gaussian noise of variance 1/2, so that ``F_pp = 2 sum_o (d f_o / d a_p)^2``."""

    def counts(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """See `Objective.counts`."""
        return _outputs_of_each(scores_of(outputs, batch))

    def total(self, outputs: Any, batch: batches.Batch) -> torch.Tensor:
        """See `Objective.total`."""
        values = finite_scores(outputs, batch)
        return (values - labels_like(values, batch, "mean squared error")).square().sum()

    def sampled(self, outputs: Any, batch: batches.Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Likelihood.sampled`. Inverts the distribution function: `torch.randn` depends on the batch's size."""
        values = finite_scores(outputs, batch)
        noise = torch.special.ndtri(_uniform(values.shape, generator).clamp(min=2.0**-54))
        return (values * noise.to(values)).sum() * 2**0.5

    def drawn(self, outputs: Any, batch: batches.Batch) -> int:
        """See `Likelihood.drawn`."""
        return scores_of(outputs, batch)[0].numel()

    def signed(self, outputs: Any, batch: batches.Batch, generator: torch.Generator) -> torch.Tensor:
        """See `Likelihood.signed`."""
        values = finite_scores(outputs, batch)
        return (values * _signs(values, generator)).sum() * 2**0.5

    def exact(self, outputs: Any, batch: batches.Batch) -> Directions:
        """See `Likelihood.exact`."""
        values = _rows(finite_scores(outputs, batch))
        return [(values[:, o].sum(), values.new_full((len(values),), 2.0)) for o in range(values.shape[1])]


def _rows(scores: torch.Tensor) -> torch.Tensor:
    if scores.ndim > 2:
        raise HapError(
            "gate-ggn needs one row of outputs for each sample",
            expected="outputs (N,) or (N, outputs)",
            got=f"outputs {tuple(scores.shape)}",
            remedy="use gate-fisher, which allows any shape",
        )
    return scores.reshape(len(scores), -1)


def _outputs_of_each(scores: torch.Tensor) -> torch.Tensor:
    return torch.full((len(scores),), scores[0].numel(), device=scores.device)


def _picked(log_p: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The sum of the labels' log-probabilities over the positions that count."""
    return log_p.gather(1, labels.unsqueeze(1)).squeeze(1).where(counted, 0).sum()


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, like.shape, generator=generator, dtype=torch.int8).to(like) * 2 - 1


def _uniform(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _sample(log_p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels (N, ...) from log-probabilities (N, classes, ...), by inverting the distribution function."""
    cumulative = log_p.to("cpu").double().exp().cumsum(1)
    labels = (cumulative <= _uniform(cumulative[:, :1].shape, generator) * cumulative[:, -1:]).sum(1)
    return labels.to(log_p.device)
