from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DistributedSampler

import hap
from hap.training.devices import Accelerated, Share
from hap.training.layout import wants_channels_last
from hap.training.objective import Objective

accelerate = pytest.importorskip("accelerate")
SOURCE = Path(hap.__file__).parents[1]
WORKER = Path(__file__).with_name("accelerate_worker.py")


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerate_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    return load_worker()


@pytest.fixture
def accelerator():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process_gives_the_same_bits(worker: ModuleType, accelerator) -> None:
    plain, through = worker.build(), worker.build()
    first = hap.finetune(plain, worker.data(5, 6), **worker.OPTIONS)
    second = hap.finetune(through, worker.data(5, 6), accelerator=accelerator(), **worker.OPTIONS)
    assert [r.train_loss for r in first.epochs] == pytest.approx([r.train_loss for r in second.epochs], rel=1e-12)
    assert [r.samples for r in second.epochs] == [30, 30, 30]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, through.state_dict()[name]), name


def test_mixed_precision_is_taken_off_again(worker: ModuleType, accelerator) -> None:
    model = worker.build().float()
    seen = []
    model[3].register_forward_hook(lambda module, args, output: seen.append((module.training, output.dtype)))
    batches = [(x.float(), y) for x, y in worker.data(3, 6)]
    hap.finetune(model, batches, accelerator=accelerator(mixed_precision="bf16"), epochs=1)
    assert set(seen) == {(True, torch.bfloat16)}
    assert model(batches[0][0]).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model) or "_original_forward" not in vars(model)


def test_an_accelerator_that_accumulates_by_itself_is_refused(worker: ModuleType, accelerator) -> None:
    """It would divide the loss once more."""
    model, batches = worker.build(), worker.data(3, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dividing = accelerator(gradient_accumulation_steps=4)
    with pytest.raises(hap.HapError, match="accumulates gradients by itself") as caught:
        hap.finetune(model, batches, accelerator=dividing)
    assert "accumulate=4" in caught.value.remedy
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hap.evaluate(model, batches, accelerator=dividing) == hap.evaluate(model, batches)


def test_the_accelerator_keeps_what_it_had(worker: ModuleType, accelerator) -> None:
    """It holds each optimizer that it has prepared, and with it the moments."""
    ours = accelerator()
    mine, _ = ours.prepare(torch.nn.Linear(2, 2), torch.optim.SGD(worker.build().parameters()))
    held = [*ours._models, *ours._optimizers]
    for _ in range(2):
        hap.finetune(worker.build(), worker.data(3, 6), accelerator=ours)
    with pytest.raises(hap.HapError, match="not a scalar"):
        hap.finetune(worker.build(), worker.data(3, 6), lambda outputs, batch: outputs, accelerator=ours)
    assert mine in ours._models
    assert list(map(id, [*ours._models, *ours._optimizers])) == list(map(id, held))


def test_parameters_without_a_gradient_are_named_as_the_cause() -> None:
    class Waiting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one.")

    for precision in ("no", "bf16"):
        stub = SimpleNamespace(mixed_precision=precision, process_index=0, num_processes=2)
        with pytest.raises(hap.HapError, match="had no part in the loss") as caught:
            Accelerated(stub).forward(Waiting(), (torch.ones(1), None))
        assert "find_unused_parameters=True" in caught.value.remedy


def test_the_teacher_is_where_the_accelerator_will_put_the_student(worker: ModuleType, accelerator) -> None:
    place = Accelerated(accelerator()).device(torch.nn.Linear(1, 1, device="meta"))
    assert place == torch.device("cpu")
    student, teacher = worker.build(), worker.build().to("meta")
    Objective(None, distill=hap.Distillation(teacher)).check(student, torch.device("meta"))
    with pytest.raises(hap.HapError, match="the teacher is on another device"):
        Objective(None, distill=hap.Distillation(teacher)).check(student, place)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6])
def test_shares_are_of_equal_length_and_hold_every_batch(count: int) -> None:
    every = list(range(count))
    shares = [list(Share(every, rank, 3)) for rank in range(3)]
    assert {len(share) for share in shares} == {-(-count // 3)}  # or the others would wait for the last
    assert {batch for share in shares for batch in share} == set(every)
    assert [share[0] for share in shares if share][:count] == every[:3]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_do_what_one_does_with_larger_batches(tmp_path: Path, sharded: bool) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, str(WORKER), str(tmp_path), *(["sharded"] if sharded else [])],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert first["seen"].tolist() == [48] * 3  # seven batches of six, the first once more
    worker = load_worker()
    alone = worker.build()
    history = hap.finetune(alone, worker.rounds(), validation=worker.data(3, 6), ema=0.9, **worker.OPTIONS)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    assert first["losses"].tolist() == pytest.approx([record.train_loss for record in history.epochs], rel=1e-9)
    assert first["accuracies"].tolist() == [record.validation.accuracy for record in history.epochs]
    whole = hap.evaluate(alone, worker.data(3, 6))  # three batches for two processes: one only fills up
    assert first["again"].tolist() == pytest.approx([whole.loss, whole.accuracy, 18], rel=1e-9)


SHUFFLED = """
import sys
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import hap

read = []

class Noting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x):
        if self.training:
            read.append(x[:, 0].long().tolist())
        return self.layer(nn.functional.dropout(x, 0.5, self.training))

accelerator = Accelerator(cpu=True)
data = TensorDataset(torch.arange(60.0)[:, None], torch.arange(60) % 2)
hap.finetune(Noting(), DataLoader(data, 16, shuffle=True), epochs=3, lr=1e-4, accelerator=accelerator)
torch.save(read, f"{sys.argv[1]}/{accelerator.process_index}.pt")
"""


@pytest.mark.slow
def test_processes_shuffle_alike_whatever_else_they_draw(tmp_path: Path) -> None:
    """Dropout draws fewer numbers for the short last batch, which one process alone has."""
    (tmp_path / "shuffled.py").write_text(SHUFFLED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(tmp_path / "shuffled.py"), str(tmp_path)], env=environment, check=True, timeout=240)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for epoch in range(3):
        batches = [*first[2 * epoch : 2 * epoch + 2], *second[2 * epoch : 2 * epoch + 2]]
        assert sorted(x for batch in batches for x in batch) == list(range(60))


def test_data_that_are_shared_out_already_are_refused(accelerator) -> None:
    """Each process would read its share of its share."""
    examples = torch.utils.data.TensorDataset(torch.rand(8, 2))
    loader = torch.utils.data.DataLoader(examples, sampler=DistributedSampler(examples, num_replicas=2, rank=0))
    for batches in (loader, accelerator().prepare(torch.utils.data.DataLoader(examples))):
        assert Share(batches, 0, 1) is not None
        with pytest.raises(hap.HapError, match="shared out among the processes already"):
            Share(batches, 0, 2)


def test_shards_are_contiguous() -> None:
    model = torch.nn.Conv2d(3, 4, 3)
    assert wants_channels_last(model, "auto", torch.device("cuda"))
    assert not wants_channels_last(model, "auto", torch.device("cuda"), sharded=True)
    with pytest.raises(hap.HapError, match="shards of weights are contiguous"):
        wants_channels_last(model, True, torch.device("cuda"), sharded=True)
