"""What a user reads afterwards: tables, plots and files of results."""

from hap.report.comparison import Comparison, Measured, Quantity, Row, table
from hap.report.figures import has_plots
from hap.report.sensitivities import Spectrum, sensitivity_plot, spectrum
from hap.report.targets import Aim, Reached, Target, reached
from hap.report.widths import LayerWidth, width_plot, widths

__all__ = [
    "Aim",
    "Comparison",
    "LayerWidth",
    "Measured",
    "Quantity",
    "Reached",
    "Row",
    "Spectrum",
    "Target",
    "has_plots",
    "reached",
    "sensitivity_plot",
    "spectrum",
    "table",
    "width_plot",
    "widths",
]
