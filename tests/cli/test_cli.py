"""The command line, in this process; and one real interrupt of a real process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import hap
from hap import zoo
from hap.cli import app
from hap.cli.jobs import Job, _dense_spec, _prepared, open_job, same_inputs
from hap.cli.sources import image_size, load_model, normalisation, parts
from hap.pretrained import name_labels_, save_dense
from hap.zoo.splits import IMAGENET


def invoke(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and everything printed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    save_file(zoo.build("digits-cnn").state_dict(), path)
    return path


def digits(out: Path, weights: Path, *more: str, latency: str = "--any-latency") -> tuple[int, str]:
    """A quick `hap prune` on digits; without times, which differ from run to run."""
    common = ("--model", "zoo:digits-cnn", "--data", "digits", "--weights", weights, "--out", out)
    return invoke("prune", *common, "--samples", "64", "--limit", "128", latency, *more)


@pytest.mark.parametrize("budget", ["--keep-params", "--keep-macs"])
def test_prune(tmp_path: Path, weights: Path, budget: str) -> None:
    code, text = digits(tmp_path / "run", weights, budget, "0.5", "--epochs", "1")
    assert code == 0, text
    for word in ("parameters", "MACs", "latency", "accuracy", "file size", "verified", "run directory"):
        assert word in text
    small, plan = hap.load(tmp_path / "run", zoo.build("digits-cnn"))
    kept = plan.small.params / plan.dense.params if budget == "--keep-params" else plan.small.macs / plan.dense.macs
    assert 0.495 <= kept <= 0.5
    assert plan.implants


def test_the_planners_options(tmp_path: Path, weights: Path) -> None:
    """All at once: two rounds, the best plan for a latency and a size, and bounds on widths."""
    code, text = digits(
        tmp_path / "run", weights, "--keep-params", "0.5", "--latency-batch", "8",
        "--latency-cache", str(tmp_path / "latency.json"), "--mode", "optimal", "--no-joint", "--iterations", "2",
        "--min-width", "conv1=8", "--max-width", "layer*=0.9", "--protect", "linear", "--epochs", "0",
        latency="--keep-latency=1",
    )  # fmt: skip
    assert code == 0, text
    assert "round 2: rise of the loss by the cut: predicted" in text
    plan = hap.load(tmp_path / "run", zoo.build("digits-cnn"))[1]
    assert plan.options["mode"] == "optimal" and not plan.options["joint"] and plan.options["iterations"] == 2
    assert plan.small.latency is not None and plan.budget == hap.Budget(params=0.5, latency=1.0)
    assert len(plan.decisions["conv1"].keep) >= 8
    assert (tmp_path / "latency.json").exists()


def test_training_options(tmp_path: Path, weights: Path) -> None:
    """The dense model teaches, in half precision, and TensorBoard is told."""
    pytest.importorskip("tensorboard")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, text = digits(
        tmp_path / "run", weights, "--keep-params", "0.7", "--epochs", "1", "--distill", "0.5", "--temperature", "3",
        "--label-smoothing", "0.1", "--accumulate", "2", "--precision", "bf16", "--log-to", "tensorboard",
    )  # fmt: skip
    assert code == 0, text
    training = json.loads((tmp_path / "run" / "report.json").read_text())["options"]["training"]
    expected = {"distill": 0.5, "temperature": 3.0, "label_smoothing": 0.1, "accumulate": 2, "precision": "bf16"}
    assert {name: training[name] for name in expected} == expected
    found = reader.EventAccumulator(str(tmp_path / "logs" / "run"))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"train/epoch_loss", "train/lr", "validation/loss", "seconds/finetune", "test/accuracy"} <= tags


def test_another_model_teaches(tmp_path: Path, weights: Path) -> None:
    common = ("finetune", "--model", "zoo:digits-cnn", "--data", "digits", "--limit", "64", "--epochs", "1")
    taught = ("--teacher", "zoo:digits-cnn", "--teacher-weights", weights)
    code, text = invoke(*common, *taught, "--distill", "1", "--out", tmp_path / "x")
    assert code == 0 and "warning" not in text, text
    code, text = invoke(*common, *taught[:2], "--distill", "1", "--out", tmp_path / "z")
    assert code == 0 and "warning: --teacher zoo:digits-cnn has random weights" in text
    record = json.loads((tmp_path / "x" / "finetune.json").read_text())
    expected = {"teacher": "zoo:digits-cnn", "distill": 1.0, "temperature": 2.0, "optimizer": "sgd"}
    assert expected.items() <= record["options"].items()
    code, text = invoke(*common, "--distill", "1", "--out", tmp_path / "y")
    assert code == 2 and "give --distill and --teacher" in text
    assert not (tmp_path / "y").exists()


def test_an_unknown_tracker_is_named(tmp_path: Path, weights: Path) -> None:
    code, text = digits(tmp_path / "run", weights, "--keep-params", "0.7", "--log-to", "tensorbord")
    assert code == 2 and "did you mean 'tensorboard'?" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("criterion", "rise"), [("gate-fisher", "rise of the loss by the cut: predicted"), ("l1", "by the cut: measured")]
)
def test_no_epochs_skips_fine_tuning(tmp_path: Path, weights: Path, criterion: str, rise: str) -> None:
    """A criterion whose scores are no losses predicts none."""
    options = ("--keep-params", "0.6", "--epochs", "0", "--implant-ratio", "0", "--criterion", criterion)
    code, text = digits(tmp_path / "run", weights, *options)
    assert code == 0 and "no fine-tuning" in text and rise in text
    assert not hap.load(tmp_path / "run", zoo.build("digits-cnn"))[1].implants


@pytest.mark.parametrize("ratio, limit", [("0.1", 1.0), ("0", None)])
def test_implants_do_not_slow_the_model_down_unasked(tmp_path: Path, weights: Path, ratio: str, limit: float) -> None:
    """Where there may be implants the dense model's time is a limit; without them nothing is timed."""
    cache = tmp_path / "latency.json"
    options = ("--keep-params", "0.6", "--epochs", "0", "--implant-ratio", ratio)
    code, text = digits(tmp_path / "run", weights, *options, latency=f"--latency-cache={cache}")
    assert code == 0, text
    plan = hap.load(tmp_path / "run", zoo.build("digits-cnn"))[1]
    assert plan.budget == hap.Budget(params=0.6, latency=limit) and cache.exists() == (limit is not None)
    assert plan.options.get("latency_batch") == (None if limit is None else 1)
    assert limit is None or plan.small.latency <= plan.dense.latency


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-params", "1.5"], "--keep-params is out of range"),
        ([], "the budget is empty"),
        (["--keep-params", "0.0001"], "expected: --keep-params >= 0."),
        (["--keep-params", "0.5", "--criterion", "gate-fischer"], "did you mean 'gate-fisher'"),
        (["--keep-params", "0.5", "--optimizer", "adam"], "did you mean 'adamw'"),
        (["--keep-params", "0.5", "--recover", "refitt"], "did you mean 'refit'"),
        (["--keep-params", "0.5", "--model", "zoo:digit-cnn"], "did you mean 'digits-cnn'"),
        (["--keep-params", "0.5", "--model", "somewhere"], "names no model"),
        (["--keep-params", "0.5", "--data", "digit"], "did you mean 'digits'"),
        (["--keep-params", "0.5", "--data", "cifar10:/nowhere"], "/nowhere"),
        (["--keep-params", "0.5", "--weights", "/nowhere.safetensors"], "no weights at"),
        (["--keep-params", "0.5", "--model", "zoo:resnet20"], "do not fit"),
        (["--keep-params", "0.5", "--ignore", "conv9"], "unknown module to ignore"),
        (["--keep-params", "0.5", "--device", "tpu9"], "no device"),
        (["--keep-latency", "0"], "--keep-latency is out of range"),
        (["--keep-heads", "0.5"], "see `hap inspect --frozen`"),
        (["--keep-params", "0.5", "--keep-latency", "1"], "give --keep-latency or --any-latency"),
        (["--keep-params", "0.5", "--mode", "optimum"], "did you mean 'optimal'"),
        (["--keep-params", "0.5", "--mode", "paper", "--joint"], "ranks units one by one"),
        (["--keep-params", "0.5", "--min-width", "conv1"], "give FAMILY=8 or FAMILY=0.5"),
        (["--keep-params", "0.5", "--min-width", "8"], "give FAMILY=8 or FAMILY=0.5"),
        (["--keep-params", "0.5", "--max-width", "cnv1=8"], "did you mean 'conv1'"),
        (["--keep-params", "0.5", "--protect", "convolution"], "unknown module to protect"),
        (["--keep-params", "0.5", "--iterations", "0"], "--iterations is out of range"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(
    tmp_path: Path, weights: Path, arguments: list[str], message: str
) -> None:
    code, text = digits(tmp_path / "run", weights, *arguments)
    assert code == 2, text
    assert message in " ".join(text.split())
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_needs_overwrite(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    code, text = digits(tmp_path, weights, "--keep-params", "0.5", "--epochs", "0")
    assert code == 2 and "--overwrite" in text
    code, text = digits(tmp_path, weights, "--keep-params", "0.5", "--epochs", "0", "--overwrite")
    assert code == 2 and "was not written by hap" in text
    assert (tmp_path / "old.txt").read_text() == "old"
    (tmp_path / "plan.json").write_text("{}")
    code, text = digits(tmp_path, weights, "--keep-params", "0.5", "--epochs", "0", "--overwrite")
    assert code == 0, text
    assert not (tmp_path / "old.txt").exists() and (tmp_path / "plan.json").exists()


def test_a_users_own_model(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),\n"
        "                         nn.Flatten(), nn.Linear(128, 10))\n"
    )
    model = f"{tmp_path / 'mine.py'}:build"
    code, text = invoke(
        "prune",
        "--model",
        model,
        "--data",
        "digits",
        "--keep-params",
        "0.5",
        "--epochs",
        "0",
        "--any-latency",
        "--out",
        tmp_path / "run",
    )
    assert code == 0, text
    code, text = invoke("prune", "--model", f"{tmp_path / 'mine.py'}:other", "--data", "digits", "--out", "x")
    assert code == 2 and "other" in text or "budget" in text


def test_a_pruned_model_of_images_is_trained_on(tmp_path: Path, weights: Path) -> None:
    """From what `hap prune` wrote, and again from what `hap finetune` wrote."""
    code, text = digits(tmp_path / "run", weights, "--keep-params", "0.6", "--epochs", "0")
    assert code == 0, text
    _, plan = hap.load(tmp_path / "run", zoo.build("digits-cnn"))
    training = ("--optimizer", "sgd", "--lr", "0.05", "--epochs", "4", "--clip", "5")
    common = ("finetune", "--data", "digits", "--limit", "256", "--device", "cpu", *training)
    for start, end in (("run", "tuned"), ("tuned", "again")):
        code, text = invoke(*common, "--model", f"hap:{tmp_path / start}", "--out", tmp_path / end)
        assert code == 0, text
        before, after = (hap.load(tmp_path / place, zoo.build("digits-cnn")) for place in (start, end))
        assert after[1] == plan
        record = json.loads((tmp_path / end / "finetune.json").read_text())
        assert record["options"]["dense"] == "zoo:digits-cnn"
        card = (tmp_path / end / "README.md").read_text()
        assert 'zoo.build("digits-cnn", classes=10)' in card and "random weights" not in card
        assert "at most 256 examples" in card and "note: at most 256 examples" in text
        trained = not torch.equal(before[0].linear.weight, after[0].linear.weight)
        assert trained == (record["history"]["chosen"] > 0) and (trained or start == "tuned")
    (tmp_path / "run" / "report.json").unlink()
    code, text = invoke(*common, "--model", f"hap:{tmp_path / 'run'}", "--out", tmp_path / "x")
    assert code == 2 and "does not say what its dense model is" in " ".join(text.split())
    code, text = invoke(*common, "--model", "hap:run", "--weights", weights, "--out", tmp_path / "x")
    assert code == 2 and "in the model's own directory" in text


def test_inspect() -> None:
    code, text = invoke("inspect", "--model", "zoo:resnet20", "--frozen")
    assert code == 0
    assert "layer1.0.conv1" in text and "269,722 parameters" in text and "the model's output" in " ".join(text.split())
    assert invoke("inspect", "--model", "zoo:resnet20", "--input-shape", "big")[0] == 2
    for of_others in (("--max-length", "9"), ("--task", "glue/rte", "--input-shape", "3,32,32")):
        assert invoke("inspect", "--model", "zoo:resnet20", *of_others)[0] == 2


@pytest.mark.parametrize(("package", "extra"), [("timm", "models"), ("torchvision", "vision")])
def test_a_missing_package_is_named(package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    code, text = invoke("inspect", "--model", f"{package}:resnet18")
    assert code == 2 and f"pip install 'torch-hap[{extra}]'" in text


def test_help_names_every_option() -> None:
    code, text = invoke("inspect", "--help")
    assert code == 0 and all(source in text for source in ("zoo:", "torchvision:", "timm:", "hf:"))
    code, text = invoke("prune", "--help")
    assert code == 0
    for option in ("--model", "--keep-params", "--keep-macs", "--implant-ratio", "--epochs", "--out", "--criterion",
                   "--keep-latency", "--any-latency", "--mode", "--joint", "--min-width", "--protect",
                   "--iterations"):  # fmt: skip
        assert option in text


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_leaves_a_message_and_no_file(tmp_path: Path, weights: Path) -> None:
    """A real SIGINT in the middle of fine-tuning."""
    command = [sys.executable, "-m", "hap", "prune", "--model", "zoo:digits-cnn", "--weights", str(weights)]
    command += ["--data", "digits", "--keep-params", "0.5", "--samples", "64", "--epochs", "100000"]
    command += ["--any-latency"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=_heed_interrupts,
    )
    errors = _interrupted(process)
    assert process.returncode == 130, errors
    assert "interrupted: nothing was written" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupted(process: subprocess.Popen[str]) -> str:
    """What the process says after SIGINT; again, where a busy machine was still importing and lost the first."""
    time.sleep(15)
    for _ in range(6):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=20)[1]
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    return process.communicate()[1]


def test_the_library_never_seeds_the_callers_generator(tmp_path: Path, weights: Path) -> None:
    before = torch.get_rng_state()
    digits(tmp_path / "run", weights, "--keep-params", "0.6", "--epochs", "1")
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_is_a_number_or_auto(tmp_path: Path, weights: Path) -> None:
    common = ("--keep-params", "0.6", "--epochs", "0", "--samples")
    code, text = digits(tmp_path / "run", weights, *common, "auto")
    assert code == 0, text
    code, text = digits(tmp_path / "other", weights, *common, "many")
    assert code == 2 and "give a number or auto" in text
    assert not (tmp_path / "other").exists()


def test_help_groups_the_options() -> None:
    """Each verb with many options names panels, and only --help stands alone."""
    panels = {
        "prune": ("Model and data", "Budget", "What may leave", "Method", "Fine-tuning", "Output"),
        "finetune": ("Model and data", "Fine-tuning", "A teacher", "Output"),
        "run": ("Recipe and data", "Output"),
    }
    for verb, names in panels.items():
        text = invoke(verb, "--help")[1]
        places = [text.index(f"─ {name}") for name in names]
        assert places == sorted(places), verb
        alone = text[text.index("─ Options") : places[0]]
        assert alone.count("--") == 1 and "--help" in alone, verb


def test_small_numbers_are_called_so(tmp_path: Path, weights: Path) -> None:
    code, text = digits(tmp_path / "run", weights, "--keep-params", "0.6", "--epochs", "0")
    assert code == 0 and "accuracy and loss: of 128 test examples" in text
    assert "note: at most 128 examples of each split were read" in text and "warning" not in text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test_examples"] == 128 and "mean little" in report["notes"][0]
    assert report["notes"][0] in (tmp_path / "run" / "README.md").read_text()


def test_random_weights_are_warned_of(tmp_path: Path) -> None:
    """Before anything is measured, and again with the numbers."""
    common = ("--model", "zoo:digits-cnn", "--data", "digits", "--any-latency", "--epochs", "0", "--samples", "64")
    code, text = invoke("prune", *common, "--keep-params", "0.6", "--out", tmp_path / "run")
    assert code == 0, text
    warning, note = "warning: zoo:digits-cnn has random weights", "note: zoo:digits-cnn has random weights"
    assert text.index(warning) < text.index("tracing") < text.index(note) and "--weights FILE" in text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["notes"]) == 1 and report["test_examples"] == 360


def test_the_code_in_the_card_loads_the_model(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = digits(tmp_path / "run", weights, "--keep-params", "0.6", "--epochs", "0")
    assert code == 0, text
    card = (tmp_path / "run" / "README.md").read_text()
    for fact in (
        "`zoo:digits-cnn`, a DigitsCNN, weights `digits.safetensors`",
        "`gate-fisher`",
        "`optimal`",
        "| seed | 0 |",
    ):
        assert fact in card
    scope: dict[str, object] = {}
    monkeypatch.chdir(tmp_path / "run")
    exec(card.split("```python")[1].split("```")[0], scope)
    small, _ = hap.load(tmp_path / "run", zoo.build("digits-cnn"))
    assert all(torch.equal(p, q) for p, q in zip(scope["small"].parameters(), small.parameters(), strict=True))
    assert str(small.eval()(torch.zeros(1, 1, 8, 8))) in capsys.readouterr().out


def test_no_control_characters_where_nobody_watches(tmp_path: Path, weights: Path) -> None:
    code, text = digits(tmp_path / "run", weights, "--keep-params", "0.6", "--epochs", "0")
    assert code == 0 and "] tracing" in text
    assert not [character for character in text if ord(character) < 32 and character != "\n"]


def test_inspect_groups_frozen_axes_by_their_reason() -> None:
    text = invoke("inspect", "--model", "zoo:resnet20", "--frozen")[1]
    assert text.count("a constant number of channels is padded by pad") == 1
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["3", "layer2.*.bn2.weight,", "axis", "0"] in rows and "linear.weight, axis 1" in text
    assert "39 frozen axes" in text
    counts = [int(row[-4]) for row in rows if len(row) > 3 and row[-2] == "axis"]
    assert sum(counts) == 39


def test_inspect_knows_the_zoos_shapes() -> None:
    assert "MACs per sample of 1 x 8 x 8" in invoke("inspect", "--model", "zoo:digits-cnn")[1]
    assert (
        "MACs per sample of 1 x 16 x 16"
        in invoke("inspect", "--model", "zoo:digits-cnn", "--input-shape", "1,16,16")[1]
    )


def test_nothing_is_logged_of_a_command_that_cannot_start(tmp_path: Path, weights: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    code, text = digits(tmp_path / "run", weights, "--keep-params", "0.7", "--log-to", "tensorboard")
    assert code == 2 and "exists already" in text
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_batch_of_none_is_refused(tmp_path: Path, weights: Path) -> None:
    code, text = digits(tmp_path / "run", weights, "--keep-params", "0.7", "--batch-size", "0")
    assert code == 2 and "batch_size is too small" in text.replace("--batch-size", "batch_size")


def test_a_model_s_own_code_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def needs(width):\n    pass\n\ndef fails():\n    raise RuntimeError('no')\n")
    for function, message in (("needs", "TypeError: needs() missing"), ("fails", "fails failed in line 5")):
        code, text = invoke("inspect", "--model", f"{path}:{function}")
        assert code == 2 and message in " ".join(text.split()), text


def test_texts_without_a_task_are_told_of_it(tmp_path: Path) -> None:
    code, text = invoke(
        "prune", "--model", "zoo:digits-cnn", "--data", "/data/glue", "--keep-params", "0.5", "--out", tmp_path / "x"
    )
    assert code == 2 and "--task glue/mrpc" in text


@pytest.mark.parametrize("source", ["torchvision", "file"])
def test_random_weights_are_those_of_the_seed(tmp_path: Path, source: str) -> None:
    spec = "torchvision:squeezenet1_1"
    if source == "file":
        (tmp_path / "net.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(3, 2)\n")
        spec = f"{tmp_path / 'net.py'}:make"
    else:
        pytest.importorskip("torchvision")
    one, two, other = (load_model(spec, None, 2, seed=seed) for seed in (0, 0, 1))
    weights = [next(iter(model.parameters())) for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_images_are_normalised_as_the_model_was_trained_with(tmp_path: Path) -> None:
    """By its own files: vision transformers often have 0.5, and not ImageNet's usual constants."""
    pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    half = zoo.Normalisation(255, (0.5,) * 3, (0.5,) * 3)
    assert normalisation("timm:vit_tiny_patch16_224") == half
    transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    assert normalisation(f"hf:{tmp_path}") is None
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert normalisation(f"hf:{tmp_path}") == half
    assert normalisation("zoo:resnet50") is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
    assert normalisation(f"hf:{tmp_path}") == zoo.Normalisation(255, (0.0,) * 3, (1.0,) * 3)
    scaled = {**settings, "rescale_factor": 1 / 127.5, "rescale_offset": True}  # to -1 ... 1, as EfficientNet's
    for changed, expected in (
        (scaled, zoo.Normalisation(127.5, (1.5,) * 3, (0.5,) * 3)),
        ({**settings, "do_rescale": False}, zoo.Normalisation(1, (0.5,) * 3, (0.5,) * 3)),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))
        assert normalisation(f"hf:{tmp_path}") == expected
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "do_flip_channel_order": True}))
    with pytest.raises(hap.HapError, match="BGR"):
        normalisation(f"hf:{tmp_path}")


def test_how_images_are_normalised_is_written_with_the_model(tmp_path: Path) -> None:
    """Also of one that was pruned, and trained on twice."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    dense, trained = tmp_path / "dense", tmp_path / "trained"
    transformers.ViTForImageClassification(config).save_pretrained(dense)
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (dense / "preprocessor_config.json").write_text(json.dumps(settings))
    trained.mkdir()
    expected = zoo.Normalisation(255, (0.5,) * 3, (0.25,) * 3)
    save_dense(load_model(f"hf:{dense}", None, 3), trained)
    assert normalisation(f"hf:{trained}") == expected
    for name, options in (("a", {"model": f"hf:{trained}"}), ("b", {"model": f"hap:{tmp_path / 'a'}", "dense": None})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "finetune.json").write_text(json.dumps({"options": options}))
    assert _dense_spec(tmp_path / "b") == f"hf:{trained}"
    model = load_model(f"hf:{trained}", None, 3)
    structure = hap.trace(model, (torch.zeros(1, 3, 8, 8),))
    sensitivity = hap.measure(model, None, None, structure, criterion="random")
    plan = hap.decide(structure, sensitivity, hap.Budget(params=0.9), implant_ratio=0)
    hap.save(hap.apply(model, plan), plan, tmp_path / "pruned")
    hap.save(hap.load(tmp_path / "pruned")[0], plan, tmp_path / "again")
    shutil.rmtree(dense)
    shutil.rmtree(trained)
    assert _prepared(f"hap:{tmp_path / 'again'}") == (expected, 8)


def test_a_teacher_reads_what_the_student_reads() -> None:
    data = zoo.load_data("digits", limit=20)
    student = Job(torch.nn.Linear(2, 2), data)
    same_inputs(student, Job(torch.nn.Linear(2, 2), data, normalisation=IMAGENET))
    with pytest.raises(hap.HapError, match="images are normalised otherwise"):
        same_inputs(student, Job(torch.nn.Linear(2, 2), data, normalisation=zoo.Normalisation(255, (0.5,), (0.5,))))
    words = [SimpleNamespace(get_vocab=lambda v=v: v) for v in ({"a": 0}, {"b": 0})]
    with pytest.raises(hap.HapError, match="tokens are others"):
        same_inputs(*(Job(torch.nn.Linear(2, 2), data, tokenizer=found) for found in words))


def test_a_users_file_is_like_any_script(tmp_path: Path) -> None:
    """With dataclasses, and imports of what lies beside it, also late ones."""
    (tmp_path / "beside_it.py").write_text("WIDTH = 3\n")
    (tmp_path / "my_net.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\nfrom torch import nn\n\n"
        "@dataclass\nclass Config:\n    width: int = 3\n\n"
        "def build():\n    from beside_it import WIDTH\n    return nn.Linear(Config().width, WIDTH)\n"
    )
    before = list(sys.path)
    assert load_model(f"{tmp_path / 'my_net.py'}:build", None, 3).out_features == 3
    assert sys.path == before


def test_images_have_the_size_that_the_model_was_made_for(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    assert image_size("timm:vit_base_patch16_384") == 384 and image_size("zoo:resnet20") is None
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(2):
                image.new("RGB", (20, 20)).save(tmp_path / "data" / part / name / f"{i}.png")
    job = open_job(f"hf:{tmp_path / 'vit'}", f"imagefolder:{tmp_path / 'data'}", seed=0, batch_size=2)
    assert job.data.input_shape == (3, 8, 8)
    assert job.model.config.id2label == {0: "a", 1: "b"}
    own = open_job(f"hf:{tmp_path / 'vit'}", f"imagefolder:{tmp_path / 'data'}", seed=0, batch_size=2, image_size=12)
    assert own.data.input_shape == (3, 12, 12)


def test_labels_of_image_models_in_another_order_are_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}", None, 2)
    with pytest.raises(hap.HapError, match="labels in another order"):
        name_labels_(model, ("cat", "dog"), tmp_path)
    name_labels_(model, ("dog", "cat"), tmp_path)


def test_words_that_name_models() -> None:
    assert parts(r"C:\models\net.py:make") == (r"C:\models\net.py", "make")
    assert parts(r"hf:C:\models\vit") == ("hf", r"C:\models\vit")
    pytest.importorskip("timm")
    with pytest.raises(hap.HapError, match="unknown timm model .vit_base_patch16_224.no_such"):
        load_model("timm:vit_base_patch16_224.no_such", None, 10)
