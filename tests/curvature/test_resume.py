from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hap.curvature import CRITERIA, Criterion, GateFisher, Scores, measure, sampling
from hap.curvature.saved import digest
from hap.curvature.sums import Sums
from hap.errors import HapError

RESUMABLE = sorted(name for name, criterion in CRITERIA.items() if criterion.resumable)
WORKER = Path(__file__).with_name("distributed_worker.py")


class Stop(Exception):
    """What ends a run in these tests."""


@pytest.fixture
def five(conv):
    """The convolutional network with five batches."""
    generator = torch.Generator().manual_seed(6)
    more = [
        (torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64), torch.randint(5, (n,), generator=generator))
        for n in (2, 5, 1)
    ]
    return replace(conv, batches=[*conv.batches, *more])


def stopped(batches, at):
    for number, batch in enumerate(batches):
        if number == at:
            raise Stop
        yield batch


def begin(case, state, at=3, **options):
    """Measures until batch `at`; what was added up before is saved."""
    with pytest.raises(Stop):
        measure(case.model, stopped(case.batches, at), None, case.structure, state=state, save_every=0, **options)
    assert state.exists()


def equal(a, b):
    gram = a.gram is b.gram is None or torch.equal(a.gram, b.gram)
    pairs = ((a.scores, b.scores), (a.stderr, b.stderr), (a.filters, b.filters), (a.filters_stderr, b.filters_stderr))
    values = all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)
    return gram and values and (a.samples, a.draws) == (b.samples, b.draws)


@pytest.mark.parametrize("criterion", RESUMABLE)
def test_goes_on_to_the_same_bits(five, tmp_path, criterion):
    options = {"criterion": criterion, "gram": CRITERIA[criterion].has_gram}
    undisturbed = measure(five.model, five.batches, None, five.structure, **options)
    state = tmp_path / "state"
    begin(five, state, 3, **options)
    read = set()
    hook = five.model.register_forward_pre_hook(lambda _, inputs: read.add(inputs[0].data_ptr()))
    again = measure(five.model, five.batches, None, five.structure, state=state, save_every=0, **options)
    hook.remove()
    assert equal(again, undisturbed)
    # The first batch may be read again, to see what the loss is.
    assert not read & {x.data_ptr() for x, _ in five.batches[1:3]}
    assert list(tmp_path.iterdir()) == []


def test_goes_on_from_a_state_that_has_seen_everything(five, tmp_path):
    undisturbed = measure(five.model, five.batches, None, five.structure)
    state = tmp_path / "state"

    def then_stop():
        yield from five.batches
        raise Stop

    with pytest.raises(Stop):
        measure(five.model, then_stop(), None, five.structure, state=state, save_every=0)
    assert equal(measure(five.model, five.batches, None, five.structure, state=state), undisturbed)


def test_may_be_interrupted_twice(five, tmp_path):
    begin(five, tmp_path / "state", 2, draws=2)
    begin(five, tmp_path / "state", 4, draws=2)
    (tmp_path / "state.tmp").write_bytes(b"half a state")
    again = measure(five.model, five.batches, None, five.structure, state=tmp_path / "state", draws=2)
    assert equal(again, measure(five.model, five.batches, None, five.structure, draws=2))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_looks(monkeypatch):
    """Chunks of 3, 3, 6, ... examples, blocks of 2, and a risk that is never reached."""
    monkeypatch.setattr(sampling, "FIRST", 3)
    monkeypatch.setattr(sampling, "BLOCK", 2)
    return {"samples": "auto", "risk": 1e-9, "cap": 12}


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("criterion", ["gate-fisher", "gate-ggn", "gate-gradient", "hessian-trace", "ggn-quadratic"])
def test_sampling_until_it_is_settled_goes_on_to_the_same_bits(five, tmp_path, small_looks, criterion, at):
    options = {"criterion": criterion, "gram": CRITERIA[criterion].has_gram, **small_looks}
    undisturbed = measure(five.model, five.batches, None, five.structure, **options)
    begin(five, tmp_path / "state", at, **options)
    again = measure(five.model, five.batches, None, five.structure, state=tmp_path / "state", **options)
    assert equal(again, undisturbed)
    assert list(tmp_path.iterdir()) == []


def test_chunks_that_are_done_are_not_measured_again(five, tmp_path, small_looks, monkeypatch):
    scored = []
    score = GateFisher.score
    monkeypatch.setattr(
        GateFisher, "score", lambda self, problem: scored.append(problem.samples) or score(self, problem)
    )
    measure(five.model, five.batches, None, five.structure, **small_looks)
    assert scored == [3, 3, 6]
    begin(five, tmp_path / "state", 3, **small_looks)
    scored.clear()
    measure(five.model, five.batches, None, five.structure, state=tmp_path / "state", **small_looks)
    assert scored == [6]


def test_a_look_comes_where_it_would_have_come(five, tmp_path, small_looks, caplog):
    options = {**small_looks, "criterion": "hessian-trace"}

    def looks(**state):
        caplog.clear()
        measure(five.model, five.batches, None, five.structure, **state, **options)
        return [record.message for record in caplog.records if record.name == "hap.curvature.sampling"]

    with caplog.at_level("INFO"):
        all_of_them = looks()
        begin(five, tmp_path / "state", 3, **options)
        again = looks(state=tmp_path / "state")
    assert again == all_of_them[2:]


def test_sampling_until_it_is_settled_refuses_another_run(five, tmp_path, small_looks):
    begin(five, tmp_path / "state", 3, **small_looks)
    for other in ({**small_looks, "cap": 11}, {**small_looks, "keep": 0.3}, {"samples": 12}):
        with pytest.raises(HapError, match="does not fit"):
            measure(five.model, five.batches, None, five.structure, state=tmp_path / "state", **other)
    with pytest.raises(HapError, match="does not fit") as caught:
        measure(five.model, five.batches[:1], None, five.structure, state=tmp_path / "state", **small_looks)
    assert "6 examples" in caught.value.expected


def test_other_data_in_chunks_that_are_done_are_refused(five, tmp_path, small_looks):
    begin(five, tmp_path / "state", 3, **small_looks)
    generator = torch.Generator().manual_seed(9)
    other = [(torch.randn(x.shape, generator=generator, dtype=x.dtype), y) for x, y in five.batches[:2]]
    with pytest.raises(HapError, match="does not fit") as caught:
        measure(five.model, [*other, *five.batches[2:]], None, five.structure, state=tmp_path / "state", **small_looks)
    assert "the first batch" in caught.value.expected


@pytest.mark.parametrize("at", [None, 2, 7])
def test_a_criterion_may_go_through_the_data_twice(five, tmp_path, at):
    class Twice(Criterion):
        name, resumable = "twice", True

        def score(self, problem):
            first, second = Sums(), Sums()
            for _, (x, _y) in problem.share("mean", first):
                first.add(total=x.sum(), count=x.numel())
            mean = first["total"] / first["count"]
            for _, (x, _y) in problem.share("variance", second):
                second.add(total=(x - mean).square().sum(), count=x.numel())
            scores = {f.name: torch.full((f.size,), float(second["total"])) for f in problem.structure.families}
            return Scores(1, 0, scores, {name: torch.zeros_like(value) for name, value in scores.items()})

    class Stopping(list):
        given = 0

        def __iter__(self):
            for batch in super().__iter__():
                if Stopping.given == at:
                    raise Stop
                Stopping.given += 1
                yield batch

    args = five.model, five.batches, None, five.structure
    undisturbed = measure(*args, criterion=Twice())
    options = {"criterion": Twice(), "state": tmp_path / "state", "save_every": 0}
    if at is not None:
        with pytest.raises(Stop):
            measure(five.model, Stopping(five.batches), None, five.structure, **options)
    assert equal(measure(*args, **options), undisturbed)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_loses_nothing(tmp_path):
    source = Path(sys.modules["hap"].__file__ or "").parent.parent
    env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    state = tmp_path / "state"
    killed = subprocess.run([sys.executable, str(WORKER), "killed", str(state)], env=env, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    # The worker's network is that of conftest.py with other batches, which the state holds a digest of.
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "from distributed_worker import SIZES, flat, make_conv, measure\n"
        "case, read = make_conv(SIZES), set()\n"
        "args = case.model, case.batches, None, case.structure\n"
        "case.model.register_forward_pre_hook(lambda _, inputs: read.add(inputs[0].data_ptr()))\n"
        "again = flat(measure(*args, state=sys.argv[2]))\n"
        "assert not read & {x.data_ptr() for x, _ in case.batches[1:3]}\n"
        "assert torch.equal(again, flat(measure(*args)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(WORKER.parent), str(state)], env=env, timeout=120, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert not state.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seed": 1}, "seed 0"),
        ({"draws": 2}, "draws 1"),
        ({"samples": 9}, "samples 512"),
        ({"gram": True}, "gram False"),
        ({"criterion": "gate-ggn"}, "criterion gate-fisher"),
        ({"max_memory": 10**6}, "max_memory None"),
        ({"autocast": torch.bfloat16}, "autocast None"),
    ],
)
def test_the_state_of_another_run_is_refused(five, tmp_path, options, expected):
    state = tmp_path / "state"
    begin(five, state)
    before = state.read_bytes()
    with pytest.raises(HapError, match="does not fit this run") as caught:
        measure(five.model, five.batches, None, five.structure, state=state, **options)
    assert expected in caught.value.expected
    assert state.read_bytes() == before


def test_the_state_of_other_weights_data_or_structure_is_refused(five, tmp_path):
    state = tmp_path / "state"
    begin(five, state)
    fewer = replace(five.structure, families=five.structure.families[:-1])
    with pytest.raises(HapError, match="does not fit") as caught:
        measure(five.model, five.batches, None, fewer, state=state)
    assert "structure" in caught.value.expected
    with pytest.raises(HapError, match="does not fit") as caught:
        measure(five.model, five.batches[::-1], None, five.structure, state=state)
    assert "same batches" in caught.value.expected
    with pytest.raises(HapError, match="does not fit") as caught:
        measure(five.model, five.batches[:2], None, five.structure, state=state)
    assert "3 batches" in caught.value.expected
    with torch.no_grad():
        five.model.fc.weight[0, 0] += 1
    with pytest.raises(HapError, match="does not fit") as caught:
        measure(five.model, five.batches, None, five.structure, state=state)
    assert "weights" in caught.value.expected


def test_a_file_that_is_no_state_is_refused(five, tmp_path):
    state = tmp_path / "state"
    state.write_bytes(b"something else")
    with pytest.raises(HapError, match="does not fit this run"):
        measure(five.model, five.batches, None, five.structure, state=state)
    assert state.read_bytes() == b"something else"


def test_what_cannot_be_interrupted_says_so(five, tmp_path):
    class Whole(Criterion):
        name = "whole"

        def score(self, problem):
            return Scores(0, 0, {}, {})

    for criterion in ("magnitude", Whole()):
        with pytest.raises(HapError, match="cannot be interrupted"):
            measure(five.model, five.batches, None, five.structure, criterion=criterion, state=tmp_path / "state")


def test_places_and_times_that_cannot_be(five, tmp_path):
    for state in (tmp_path / "no folder" / "state", tmp_path):
        with pytest.raises(HapError, match="the state cannot be saved there"):
            measure(five.model, five.batches, None, five.structure, state=state)
    with pytest.raises(HapError, match="save_every is out of range"):
        measure(five.model, five.batches, None, five.structure, state=tmp_path / "state", save_every=-1)


def test_saves_only_when_it_is_time(five, tmp_path):
    with pytest.raises(Stop):
        measure(five.model, stopped(five.batches, 4), None, five.structure, state=str(tmp_path / "state"))
    assert list(tmp_path.iterdir()) == []


def test_a_digest_tells_batches_apart():
    x = torch.arange(4.0)
    assert digest((x, None)) == digest([x.clone()])
    others = [x + 1, x.view(2, 2), x.double(), x.bfloat16(), torch.tensor(1.0)]
    assert len({digest([y]) for y in (x, *others)}) == 6
