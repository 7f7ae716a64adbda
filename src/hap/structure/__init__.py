"""A model -> families of units that must leave together.

Data flow: `export` (model -> ATen graph), `propagate` with `rules` (graph -> relations in `Units`),
`families` (relations -> `Family` and `Frozen` records), all composed by `trace`.
"""

from hap.structure.trace import trace

__all__ = ["trace"]
