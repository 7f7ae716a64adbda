"""Pruning inside Hugging Face's `Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from hap.batches import Batch, Loss, device_of, take
from hap.checkpoint import PLAN, write
from hap.errors import HapError
from hap.pipeline import prune
from hap.pipeline.rounds import joined, repeatable, round_settings, schedule
from hap.pipeline.stages import examples, fitted_on
from hap.planning import Plan
from hap.pretrained import transformers
from hap.surgery import apply_, follow_
from hap.types import Budget

log = logging.getLogger(__name__)


def _base() -> Any:
    """What callbacks derive from. Without `transformers` the error comes when one is made, not on import."""
    try:
        return transformers().TrainerCallback
    except HapError:
        return object


Base: Any = _base()


class PruningCallback(Base):
    """Prunes the model that a `Trainer` trains, in place, once or in several steps while it trains.

    The optimizer goes on with its moments, cut like the weights, and the learning rate as it was planned. Between two
    steps the model trains; the budget shrinks geometrically from the whole model to what may remain in the end.

    >>> trainer = transformers.Trainer(..., callbacks=[PruningCallback(hap.Budget(params=0.5))])  # doctest: +SKIP

    After training ``hap.save(trainer.model, callback.plan, directory)`` writes what `hap.load` opens.

    Args:
        budget: what may remain, of the model as it is when training begins.
        start: fraction of all training steps after which to prune for the first time; 0 is before the first.
        end: the fraction after which to prune for the last time, if there are several.
        times: how often to prune; implants, if there are any, come in the last time.
        batches: calibration data, read in each step; None for the training set in random order.
        loss: as in `hap.prune`.
        seed: of the order of calibration, and of everything drawn at random.
        settings: the other options of `hap.prune`, such as ``criterion`` or ``samples``. `implant_ratio` is 0 unless
            given.

    Attributes:
        plan: one plan for the model as it was when training began, whatever the number of steps; None before the first.
        done: how many steps have been taken.

    Raises:
        HapError: `transformers` is missing, an option is out of range, `batches` can be read only once, or, when
            training begins, the `Trainer` runs in a way that a model cannot change in.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        start: float = 0.0,
        end: float = 0.5,
        times: int = 1,
        batches: Iterable[Batch] | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        transformers()
        if times < 1 or not 0 <= start < 1 or (times > 1 and not start < end <= 1):
            raise HapError(
                "this is no schedule",
                expected="times >= 1 and 0 <= start < end <= 1, fractions of all training steps",
                got=f"times={times}, start={start}, end={end}",
            )
        if batches is not None and iter(batches) is batches:
            raise HapError(
                "the calibration data can be read only once",
                expected="a list or a DataLoader, which each step reads anew",
                got=type(batches).__name__,
                remedy="PruningCallback(..., batches=list(batches))",
            )
        self.budget = budget
        self.plan: Plan | None = None
        self.done = 0
        self._budgets = schedule(budget, times)
        self._at = [start + (end - start) * i / (times - 1) for i in range(times - 1)] + [end if times > 1 else start]
        self._batches = batches
        self._loss = loss
        self._seed = seed
        self._settings = repeatable({"implant_ratio": 0.0, **settings})

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Refuses what cannot work, and prunes if the schedule says so."""
        _check(args, state)
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.global_step and (self._due(state) or (checkpoint / PLAN).exists()):  # the schedule may have changed
            self._resume(checkpoint, given["model"])
        elif self.plan is not None and _size(given["model"]) != self.plan.small.params:  # another training's
            self.plan, self.done = None, 0
        self._prune_if_due(state, **given)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Prunes if the schedule says so: the gradient has been used, and the next is not there yet."""
        self._prune_if_due(state, **given)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Makes the `Trainer`'s checkpoint one that `hap.load` opens."""
        if self.plan is not None and state.is_world_process_zero:
            directory = f"{args.output_dir}/checkpoint-{state.global_step}"
            write(given["model"], self.plan, Path(directory), tokenizer=given.get("processing_class"))

    def _due(self, state: Any) -> int:
        """How many steps of the schedule should have been taken by now."""
        return sum(fraction * state.max_steps <= state.global_step for fraction in self._at)

    def _resume(self, checkpoint: Path, model: nn.Module) -> None:
        """Takes up the plan that a run before has left: what it has pruned is not to be pruned again."""
        try:
            plan = Plan.from_json((checkpoint / PLAN).read_text(encoding="utf-8"))
        except OSError as error:
            raise _resumed(f"no plan there: {error}", checkpoint) from error
        params = _size(model)
        if params != plan.small.params:
            raise _resumed(f"a model of {params:,} parameters", checkpoint)
        self.plan, self.done = plan, plan.options["iterations"]

    def _prune_if_due(self, state: Any, **given: Any) -> None:
        due = self._due(state)
        if due > self.done:
            self._prune(due, **given)

    def _prune(self, due: int, *, model: nn.Module, optimizer: Any, train_dataloader: Any, **_: Any) -> None:
        batches = self._batches if self._batches is not None else _calibration(train_dataloader, self._seed)
        data = list(take(batches, examples(**self._settings), device_of(model)))
        settings = {**self._settings, **round_settings(self.plan, self._settings, last=due == len(self._at))}
        budget = self._budgets[due - 1]
        with _unwrapped(model):
            plan = prune(model, data, self._loss, budget, seed=self._seed, **settings).plan
            before = dict(model.named_parameters())
            apply_(model, plan, data, samples=fitted_on(self._settings.get("samples")))
        follow_(getattr(optimizer, "optimizer", optimizer), before, model, plan)  # Accelerate wraps it
        self.plan, self.done = joined(self.plan, plan, budget, due, self._settings), due
        log.info("pruning %d of %d: %s parameters are left", due, len(self._at), f"{plan.small.params:,}")


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _resumed(got: str, checkpoint: Path) -> HapError:
    return HapError(
        "the training goes on after a pruning, and this model is not what was pruned",
        expected=f"the model that hap.load opens from {checkpoint}",
        got=got,
        remedy=f"model, _ = hap.load({str(checkpoint)!r}, dense), with the dense model for the Trainer's; "
        "or train from the start",
    )


def _check(args: Any, state: Any) -> None:
    problems = {
        "a search of hyperparameters": state.is_hyper_param_search,
        "several processes": args.world_size > 1,
        "DeepSpeed": bool(args.deepspeed),
        "FSDP": bool(args.fsdp),
        "load_best_model_at_end=True": args.load_best_model_at_end,  # the best may be of another size
    }
    if found := [name for name, is_so in problems.items() if is_so]:
        raise HapError(
            "a model cannot be pruned while it is trained in this way",
            expected="one process, and the weights of the last step",
            got=", ".join(found),
            remedy="prune first, with hap.prune, then train the smaller model with the Trainer",
        )


def _calibration(loader: Any, seed: int) -> DataLoader[Any]:
    """The training set in an order of its own: to read the Trainer's loader would shift its random numbers."""
    if not hasattr(loader.dataset, "__len__"):
        raise HapError(
            "a training set without a length cannot be read in random order",
            expected="batches=, the calibration data",
            got=type(loader.dataset).__name__,
            remedy="PruningCallback(..., batches=...)",
        )
    order = RandomSampler(loader.dataset, generator=torch.Generator().manual_seed(seed))
    return DataLoader(loader.dataset, loader.batch_size or 8, sampler=order, collate_fn=loader.collate_fn)


@contextmanager
def _unwrapped(model: nn.Module) -> Iterator[None]:
    """Takes Accelerate's mixed precision off: a copy of the model would go on calling the original's forward."""
    own: dict[str, Any] = {
        name: vars(model).pop(name) for name in ("forward", "_original_forward") if name in vars(model)
    }
    try:
        yield
    finally:
        vars(model).update(own)
