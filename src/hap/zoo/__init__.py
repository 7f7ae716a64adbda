"""The paper's networks and the data sets to try them on.

>>> from hap import zoo
>>> model = zoo.build("resnet20")
>>> zoo.MODELS["resnet20"].input_shape
(3, 32, 32)
"""

from hap.zoo.data import DATASETS, Dataset, load_data
from hap.zoo.glue import TASKS, Task, load_texts, task_of
from hap.zoo.models import MODELS, Model, build
from hap.zoo.splits import DataSplits, Normalisation, Split

__all__ = [
    "DATASETS",
    "MODELS",
    "TASKS",
    "DataSplits",
    "Dataset",
    "Model",
    "Normalisation",
    "Split",
    "Task",
    "build",
    "load_data",
    "load_texts",
    "task_of",
]
