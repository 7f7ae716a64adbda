"""Pruning while Hugging Face's Trainer trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hap
from hap.errors import HapError
from hap.pretrained import load_text_classifier

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
trainer_module = pytest.importorskip("hap.trainer")
PruningCallback = trainer_module.PruningCallback


@pytest.fixture
def make(tiny_bert: Path, tmp_path: Path):
    """Makes a Trainer of a tiny model on 32 texts, 4 steps an epoch."""

    def build(callback: Any, *, checkpointing: bool = False, **options: Any) -> Any:
        model, tokenizer = load_text_classifier(tiny_bert, ("bad", "good"))
        if checkpointing:
            model.activation_checkpointing_enable()
        lines = [("a very good film" if i % 2 else "the plot was bad") + " and long" * (i % 5) for i in range(32)]
        data = [{**tokenizer(line), "labels": i % 2} for i, line in enumerate(lines)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=8,
            num_train_epochs=2,
            learning_rate=0.01,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            **{"save_strategy": "no", **options},
        )
        return transformers.Trainer(
            model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer, callbacks=[callback]
        )

    return build


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Watch(transformers.TrainerCallback):
    """The number of parameters before each step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **given: Any) -> None:
        self.sizes.append(sum(p.numel() for p in model.parameters()))


def test_one_step(make, tmp_path: Path) -> None:
    callback, watch = PruningCallback(hap.Budget(params=0.85), start=0.5, samples=16), Watch()
    trainer = make(callback)
    trainer.add_callback(watch)
    dense = sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    small = callback.plan.small.params
    assert watch.sizes == [dense] * 4 + [small] * 4
    assert 0.8 * dense < small <= 0.85 * dense
    for parameter in trainer.model.parameters():
        moments = trainer.optimizer.state[parameter]
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
        assert moments["step"] == 8  # Adam goes on
    assert len(losses(trainer)) == 8 and all(torch.isfinite(torch.tensor(losses(trainer))))
    hap.save(trainer.model, callback.plan, tmp_path / "saved", tokenizer=trainer.processing_class)
    loaded, _ = hap.load(tmp_path / "saved")
    batch = trainer.processing_class(["a very good film"], return_tensors="pt")
    trainer.model.eval()
    torch.testing.assert_close(loaded(**batch).logits, trainer.model(**batch).logits, rtol=1e-6, atol=1e-7)


def test_a_schedule_ends_with_the_budget(make, tmp_path: Path) -> None:
    callback, watch = PruningCallback(hap.Budget(params=0.8), start=0.0, end=0.5, times=3, samples=16), Watch()
    trainer = make(callback)
    trainer.add_callback(watch)
    dense = sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    sizes = [size / dense for size in watch.sizes]
    assert callback.done == 3
    assert len(set(sizes)) == 3 and sizes[0] < 1
    assert callback.plan.dense.params == dense and callback.plan.small.params == watch.sizes[-1]
    hap.save(trainer.model, callback.plan, tmp_path / "saved")
    for name, tensor in hap.load(tmp_path / "saved")[0].state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])
    for size, limit in ((sizes[0], 0.8 ** (1 / 3)), (sizes[2], 0.8 ** (2 / 3)), (sizes[4], 0.8)):
        assert limit - 0.03 < size <= limit


def test_widths_and_budget_are_of_the_model_as_training_began(make) -> None:
    """Half of the neurons stay, not half of half; and names may come in an iterator, though each step reads them."""
    settings = {"samples": 16, "minimum": {"*": 0.5}, "protect": iter(["bert.encoder.layer.1.intermediate"])}
    callback = PruningCallback(hap.Budget(params=0.8), times=3, **settings)
    make(callback).train()
    plan = callback.plan
    assert plan.budget == hap.Budget(params=0.8) and plan.options["iterations"] == 3
    left = {name: len(d.keep) / (len(d.keep) + len(d.prune)) for name, d in plan.decisions.items()}
    assert min(left.values()) == 0.5
    assert [share for name, share in left.items() if name.startswith("bert.encoder.layer.1.intermediate")] == [1]


def test_calibration_reads_so_many_samples(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner and the surgery read the same, in each step."""
    read: list[list[Any]] = []

    def noting(name: str, place: int) -> None:
        whole = getattr(trainer_module, name)

        def note(*args: Any, **options: Any) -> Any:
            read.append(list(args[place]))
            return whole(*args, **options)

        monkeypatch.setattr(trainer_module, name, note)

    noting("prune", 1)
    noting("apply_", 2)
    batch = {"input_ids": torch.ones(8, 5, dtype=torch.int64), "labels": torch.zeros(8, dtype=torch.int64)}
    make(PruningCallback(hap.Budget(params=0.85), times=2, batches=[batch] * 4, samples=12)).train()
    assert [[len(part["labels"]) for part in data] for data in read] == [[8, 4]] * 4


def test_training_before_pruning_is_as_without(make) -> None:
    """Calibration reads the training set, and leaves the Trainer's order and random numbers alone."""
    seen = []
    for callback in (PruningCallback(hap.Budget(params=0.85), start=0.5, samples=16), Watch()):
        trainer = make(callback)  # seeds the global generators
        trainer.train()
        seen.append(losses(trainer))
    assert seen[0][:4] == seen[1][:4] and seen[0][5:] != seen[1][5:]


@pytest.mark.parametrize("options", [{"bf16": True}, {"checkpointing": True}], ids=["bf16", "checkpointing"])
def test_mixed_precision_and_gradient_checkpointing(make, options: dict[str, Any]) -> None:
    callback = PruningCallback(hap.Budget(params=0.85), start=0.5, samples=16)
    trainer = make(callback, **options)
    trainer.train()
    assert sum(p.numel() for p in trainer.model.parameters()) == callback.plan.small.params
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


def test_the_trainers_checkpoints_open(make, tmp_path: Path) -> None:
    trainer = make(PruningCallback(hap.Budget(params=0.85), start=0.25, samples=16), save_strategy="epoch")
    trainer.train()
    assert not (tmp_path / "trainer" / "checkpoint-2").exists()
    loaded, plan = hap.load(tmp_path / "trainer" / "checkpoint-8")
    trainer.model.eval()
    batch = trainer.processing_class(["a very good film"], return_tensors="pt")
    torch.testing.assert_close(loaded(**batch).logits, trainer.model(**batch).logits, rtol=1e-6, atol=1e-7)


def test_what_cannot_work_is_refused(make) -> None:
    with pytest.raises(HapError, match="this is no schedule"):
        PruningCallback(hap.Budget(params=0.5), start=0.6, end=0.5, times=2)
    with pytest.raises(HapError, match="the calibration data can be read only once"):
        PruningCallback(hap.Budget(params=0.5), batches=iter([]))
    trainer = make(
        PruningCallback(hap.Budget(params=0.5)),
        load_best_model_at_end=True,
        save_strategy="epoch",
        eval_strategy="epoch",
    )
    with pytest.raises(HapError, match="cannot be pruned while it is trained") as error:
        trainer.train()
    assert error.value.got == "load_best_model_at_end=True"


def test_the_last_pruning_comes_at_the_end() -> None:
    """Where 0.2 + 0.8 is more than 1 by rounding."""
    callback = PruningCallback(hap.Budget(params=0.5), start=0.2, end=1.0, times=4)
    assert callback._at[-1] == 1.0 and callback._at[0] == 0.2


def test_a_resumed_training_goes_on_from_the_plan(make, tmp_path: Path) -> None:
    """What a run before has pruned is not pruned again; another model than the pruned one is refused."""

    def callback() -> Any:
        return PruningCallback(hap.Budget(heads=0.5), criterion="magnitude", start=0.3)

    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    first = make(callback(), **options)
    first.train()
    checkpoint = tmp_path / "trainer" / "checkpoint-4"
    small, plan = hap.load(checkpoint)
    again = callback()
    trainer = make(again, **options)
    with pytest.raises((HapError, RuntimeError)):  # transformers' own, of the weights' shapes, or ours
        trainer.train(resume_from_checkpoint=str(checkpoint))
    again = callback()
    trainer = make(again, **options)
    trainer.model = trainer.model_wrapped = small
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert again.plan == plan and again.done == 1
    assert sum(p.numel() for p in trainer.model.parameters()) == plan.small.params
    longer = callback()  # by its schedule, nothing would be pruned yet
    trainer = make(longer, **{**options, "max_steps": 20, "save_strategy": "no"})
    trainer.model = trainer.model_wrapped = hap.load(checkpoint)[0]
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert longer.plan == plan and sum(p.numel() for p in trainer.model.parameters()) == plan.small.params
    (checkpoint / "plan.json").unlink()
    other = make(callback(), **options)
    other.model = other.model_wrapped = hap.load(tmp_path / "trainer" / "checkpoint-6")[0]
    with pytest.raises(HapError, match="goes on after a pruning"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_a_callback_prunes_in_every_training_of_a_dense_model(make) -> None:
    callback = PruningCallback(hap.Budget(heads=0.5), criterion="magnitude")
    for _ in range(2):
        trainer = make(callback, max_steps=1)
        dense = sum(p.numel() for p in trainer.model.parameters())
        trainer.train()
        assert sum(p.numel() for p in trainer.model.parameters()) == callback.plan.small.params < dense
    trainer.train()  # goes on with what is small
    assert sum(p.numel() for p in trainer.model.parameters()) == callback.plan.small.params
