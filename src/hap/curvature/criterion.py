"""What a criterion is: a way to score units and filters. New ones need no change to this package."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import nn

from hap import batches
from hap.batches import Batch
from hap.curvature.rows import Rows
from hap.curvature.sums import Part
from hap.curvature.walk import Skipped, Walk
from hap.errors import HapError
from hap.types import Progress, Structure, silent


@dataclass(frozen=True, eq=False)
class Problem:
    """What a criterion is given. The model is in evaluation mode, with gradients enabled.

    A criterion may set ``requires_grad`` and ``grad`` of the parameters as it likes: `measure` puts
    them back. Hooks it registers it must remove itself.

    Attributes:
        model: the dense model.
        data: batches as the caller gave them; read them through `batches`.
        loss: ``loss(outputs, batch)``; None for `hap.batches.default_loss`.
        structure: the units and layers to score.
        samples: the number of examples to use, at most.
        draws: random draws per example or batch; 0 for a criterion that makes none.
        seed: seed of all randomness, see `generator`.
        progress: wraps the loop over batches.
        gram: also give the Gram matrix, see `Scores`.
        max_memory: bytes that saved activations may take; None for no limit.
        autocast: dtype of the forward pass under `torch.autocast`; None for none.
        rows: where the samples are in what modules read and put out, for a criterion that `Criterion.watches`.
        walk: which batches are this process's, and where what was added up is kept, see `share`.
    """

    model: nn.Module
    data: Iterable[batches.Batch] | None
    loss: batches.Loss | None
    structure: Structure
    samples: int
    draws: int = 0
    seed: int = 0
    progress: Progress = silent
    gram: bool = False
    max_memory: int | None = None
    autocast: torch.dtype | None = None
    rows: Mapping[tuple[str, str], Rows | None] = field(default_factory=dict)
    walk: Walk = field(default_factory=Walk)

    def batches(self, description: str) -> Iterator[batches.Batch]:
        """The first `samples` examples on the model's device.

        Raises:
            HapError: there is no example at all.
        """
        taken = batches.take(self.data, self.samples, batches.device_of(self.model))
        return iter(self.progress(taken, description))

    def share(
        self,
        description: str,
        *parts: Part,
        generators: Sequence[torch.Generator] = (),
        skipped: Skipped | None = None,
    ) -> Iterator[tuple[int, Batch]]:
        """Of the batches, those that are this process's to compute, with their numbers: see `Walk.over`.

        All that the loop finds out must be in `parts`, which hold the sums over all processes when it ends. The
        criterion is then `Criterion.resumable`.
        """
        return self.walk.over(self.batches(description), parts, generators, skipped)

    def generator(self, *key: str | int) -> torch.Generator:
        """A generator of its own for each key, on the CPU so that results do not depend on the device."""
        text = "/".join(map(str, (self.seed, *key)))
        digest = hashlib.blake2b(text.encode(), digest_size=4).digest()  # torch's Mersenne twister reads 32 bits
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@dataclass(frozen=True, eq=False)
class Scores:
    """What a criterion returns; the fields are those of `hap.types.Sensitivity`.

    Attributes:
        terms: the number of terms of the loss that the scores are means over; None for one of each example.
    """

    samples: int
    draws: int
    scores: Mapping[str, torch.Tensor]
    stderr: Mapping[str, torch.Tensor]
    filters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    filters_stderr: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gram: torch.Tensor | None = None
    terms: float | None = None


class Criterion(ABC):
    """Scores every unit and every filter of a model; the higher, the more it is needed.

    Attributes:
        name: the name in `CRITERIA` and in results.
        default_draws: draws when the caller names none; 0 for a criterion that makes none.
        needs_data: whether it reads batches.
        has_gram: whether it knows the second derivatives between all pairs of units (``gram=True``).
        gate_based: whether it takes the options ``max_memory`` and ``autocast``.
        watches: whether it looks at what modules read, so that families whose readers it cannot follow are left out.
        additive: whether its scores are means over examples, so that those of chunks of the data can be merged
            (``samples="auto"``).
        resumable: whether it reads batches by `Problem.share`, so that it can be interrupted (``state=``), and several
            processes share the work. If not, every process does all of it.
        predicts_loss: whether its scores are estimates of how much the loss rises, in the loss's own unit.
        covers_data: whether its standard errors are from the spread over examples; else they hold given the data.
        label: the name in results, with the options that make another criterion of it.

    >>> class Last(Criterion):
    ...     name = "last"
    ...     needs_data = False
    ...     def score(self, problem):
    ...         sizes = {f.name: f.size for f in problem.structure.families}
    ...         return Scores(
    ...             samples=0, draws=0,
    ...             scores={n: torch.arange(s, dtype=torch.float64) for n, s in sizes.items()},
    ...             stderr={n: torch.zeros(s, dtype=torch.float64) for n, s in sizes.items()},
    ...         )

    Pass ``criterion=Last()`` to `measure`, or decorate the class with `register` to use its name.
    """

    name: ClassVar[str]
    default_draws: ClassVar[int] = 0
    needs_data: ClassVar[bool] = True
    has_gram: ClassVar[bool] = False
    gate_based: ClassVar[bool] = False
    watches: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    resumable: ClassVar[bool] = False
    predicts_loss: ClassVar[bool] = False
    covers_data: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """See the class."""
        return self.name

    @abstractmethod
    def score(self, problem: Problem) -> Scores:
        """Score the units and filters of `problem`."""


CRITERIA: dict[str, type[Criterion]] = {}

C = TypeVar("C", bound=type[Criterion])


def register(criterion: C) -> C:
    """Class decorator: make a criterion known by its name.

    Raises:
        HapError: another criterion has this name.
    """
    if CRITERIA.setdefault(criterion.name, criterion) is not criterion:
        raise HapError(
            f"there is a criterion {criterion.name!r} already",
            expected="a name of its own for each criterion",
            got=f"{CRITERIA[criterion.name].__qualname__} and {criterion.__qualname__}",
            remedy="choose another name",
        )
    return criterion
