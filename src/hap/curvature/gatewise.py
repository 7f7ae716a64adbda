"""What all gate criteria share: one loop over pieces of batches, which keeps a few sums only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from hap import batches
from hap.curvature.criterion import Criterion, Problem, Scores
from hap.curvature.gates import Gates, gated
from hap.curvature.gram import Gram
from hap.curvature.likelihoods import Likelihood, Objective
from hap.curvature.moments import Moments
from hap.curvature.objectives import AnyLoss, need_likelihood, need_mean, objective_of
from hap.curvature.pieces import Pieces, shapes
from hap.curvature.sums import Part, State
from hap.errors import HapError


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass that has been made, over a piece of a batch.

    Attributes:
        gates: where gradients come from.
        objective: what the loss is.
        outputs, batch: of this pass.
        generators: one for each draw.
    """

    gates: Gates
    objective: Objective
    outputs: Any
    batch: batches.Batch
    generators: list[torch.Generator]

    def loss_gradients(self) -> torch.Tensor:
        """The derivative of each sample's loss, summed over its terms, by its gates: (samples, gates). Ends the graph.

        Raises:
            HapError: there are no labels.
        """
        with self.gates.precision():
            total = self.objective.total(self.outputs, self.batch)
        return self.gates.gradients(total, keep=False)


class GateCriterion(Criterion):
    """A criterion that is a mean over samples of something that gate gradients tell.

    Layers whose output the gates cannot see (used as functions, not modules) have no filter scores.
    """

    gate_based: ClassVar[bool] = True
    watches: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    resumable: ClassVar[bool] = True
    covers_data: ClassVar[bool] = True
    any_loss: ClassVar[bool] = True  # whether it takes losses that are no likelihood

    def score(self, problem: Problem) -> Scores:
        """See the class.

        Raises:
            HapError: the loss does not fit the criterion, or a family's consumers cannot be gated.
        """
        moments = Moments()
        with gated(problem.model, problem.structure, autocast=problem.autocast, rows=problem.rows) as gates:
            gram = Gram(gates.layout.units, max_memory=problem.max_memory) if problem.gram else None
            parts: list[Part] = [moments, _Seen(gates)] if gram is None else [moments, _Seen(gates), gram]
            for one in self._passes(problem, gates, parts):
                moments.add(self.values(one, gram), one.objective.counts(one.outputs, one.batch))
                del one  # what its graph keeps must not outlive it
            seen = gates.seen()
        if not moments.terms:
            raise HapError(
                "nothing in the data counts",
                expected="at least one position whose label is not -100 and whose attention mask is not 0",
                got=f"none in {moments.count} examples",
                remedy="check the labels",
            )
        mean, stderr = self.result(moments.mean), moments.stderr()
        scores = gates.layout.scores(mean, stderr, samples=moments.count, draws=problem.draws)
        return replace(
            scores,
            filters={name: value for name, value in scores.filters.items() if name in seen},
            filters_stderr={name: value for name, value in scores.filters_stderr.items() if name in seen},
            gram=None if gram is None else gram.total() / moments.terms,
            terms=moments.terms,
        )

    @abstractmethod
    def values(self, one: Pass, gram: Gram | None) -> torch.Tensor:
        """What is averaged, summed over each sample's terms: (samples, gates). Adds to the Gram matrix, if any."""

    def result(self, mean: torch.Tensor) -> torch.Tensor:
        """The scores, from the mean of `values`."""
        return mean

    def _passes(self, problem: Problem, gates: Gates, parts: list[Part]) -> Iterator[Pass]:
        """A forward pass over every piece of every batch that is this process's."""
        objective: Objective | None = None
        generators = [problem.generator("labels", draw) for draw in range(problem.draws)]
        pieces = Pieces(gates.saved_bytes, max_memory=problem.max_memory)
        labels = _Labels(gates, generators)

        def skipped(number: int, batch: batches.Batch, done: bool) -> None:
            nonlocal objective
            if objective is None:  # the first batch says what the loss is, whoever computes it
                objective = self._objective(problem, gates, gates.outputs_of(batch), batch)
            if not done:
                labels.skip(objective, batch)

        for _, batch in problem.share(self.label, *parts, generators=generators, skipped=skipped):
            for piece in pieces.of(batch):
                outputs = gates.forward(piece)
                if objective is None:
                    # A whole batch, because a mean and a sum are the same on a piece of one sample.
                    whole = outputs if piece is batch else gates.outputs_of(batch)
                    objective = self._objective(problem, gates, whole, batch)
                    del whole
                yield Pass(gates, objective, outputs, piece, generators)
                del outputs  # before the next piece's

    def _objective(self, problem: Problem, gates: Gates, outputs: Any, batch: batches.Batch) -> Objective:
        with gates.precision():
            objective = objective_of(problem.loss, outputs, batch)
            if not self.any_loss:
                return need_likelihood(self.name, objective, outputs, batch)
        count = batches.size(batch)
        if isinstance(objective, AnyLoss) and count > 1:
            halves = batches.cut(batch, 0, count // 2), batches.cut(batch, count // 2, count)
            loss = batches.checked(problem.loss)
            with gates.precision():
                values = [float(loss(gates.outputs_of(half), half)) for half in halves]
                need_mean(float(loss(outputs, batch).detach()), (values[0], values[1]))
        return objective


class _Labels:
    """Moves the generators of labels past a batch that another process samples the labels of."""

    def __init__(self, gates: Gates, generators: list[torch.Generator]) -> None:
        self.gates = gates
        self.generators = generators
        self._drawn: dict[tuple[torch.Size, ...], int] = {}

    def skip(self, objective: Objective, batch: batches.Batch) -> None:
        """Draw as many numbers as `Likelihood.sampled` would; the model runs on one sample of each shape only."""
        if not self.generators:
            return
        assert isinstance(objective, Likelihood)
        sample = batches.cut(batch, 0, 1)
        key = shapes(sample)
        if key not in self._drawn:
            self._drawn[key] = objective.drawn(self.gates.outputs_of(sample), sample)
        for generator in self.generators:
            torch.rand(batches.size(batch) * self._drawn[key], generator=generator, dtype=torch.float64)


class _Seen:
    """Which layers' outputs the gates have seen, as a `Part`."""

    def __init__(self, gates: Gates) -> None:
        self.taps = gates.outputs

    def state(self) -> State:
        """See `Part.state`."""
        return {name: torch.tensor([getattr(tap, name) for tap in self.taps]) for name in ("called", "blind")}

    def clear(self) -> None:
        """See `Part.clear`."""
        for tap in self.taps:
            tap.called = tap.blind = False

    def merge(self, state: State) -> None:
        """See `Part.merge`."""
        for tap, called, blind in zip(self.taps, state["called"].tolist(), state["blind"].tolist(), strict=True):
            tap.called, tap.blind = tap.called or called, tap.blind or blind
