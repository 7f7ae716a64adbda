"""What each operator does to unit ids; an operator without a rule freezes what it touches.

To support another operator, write a rule for it in the file it belongs to.
"""

from hap.structure.rules import elementwise, indexing, layers, pooling, products, shapes
from hap.structure.rules.registry import RULES, Context, freeze_all

__all__ = ["RULES", "Context", "elementwise", "freeze_all", "indexing", "layers", "pooling", "products", "shapes"]
