"""A model -> families of units that must leave together.

Data flow: `export` (model -> ATen graph), `propagate` with `rules` (graph -> relations in `Units`),
`families` (relations -> `Family` and `Frozen` records), `trial` (does the code bear it?), all composed by `trace`.
"""

from hap.structure.attributes import mirrors
from hap.structure.trace import trace

__all__ = ["mirrors", "trace"]
