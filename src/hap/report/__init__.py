"""What a user reads afterwards: tables, plots and files of results."""

from hap.report.comparison import Comparison, Measured, Quantity, Row, markdown, table
from hap.report.files import write_json
from hap.report.sensitivities import Spectrum, sensitivity_plot, spectrum
from hap.report.widths import LayerWidth, width_plot, widths

__all__ = [
    "Comparison",
    "LayerWidth",
    "Measured",
    "Quantity",
    "Row",
    "Spectrum",
    "markdown",
    "sensitivity_plot",
    "spectrum",
    "table",
    "width_plot",
    "widths",
    "write_json",
]
