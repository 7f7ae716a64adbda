from __future__ import annotations

import json

from hap.training import EpochRecord, History
from hap.types import Evaluation


def test_the_chosen_evaluation_and_json() -> None:
    start, after = Evaluation(2.0, 0.5, 10), Evaluation(1.0, None, 10)
    record = EpochRecord(epoch=1, train_loss=1.5, lr=0.1, seconds=2.0, samples=20, validation=after)
    assert History(start, (record,), chosen=0).validation is start
    assert History(start, (record,), chosen=1).validation is after
    assert json.loads(json.dumps(History(start, (record,), chosen=1).to_dict())) == {
        "start": {"loss": 2.0, "accuracy": 0.5, "samples": 10, "metrics": {}},
        "epochs": [
            {
                "epoch": 1,
                "train_loss": 1.5,
                "lr": 0.1,
                "seconds": 2.0,
                "samples": 20,
                "validation": {"loss": 1.0, "accuracy": None, "samples": 10, "metrics": {}},
            }
        ],
        "chosen": 1,
    }


def test_without_validation() -> None:
    assert History(None, (), chosen=0).to_dict() == {"start": None, "epochs": [], "chosen": 0}
