"""The ceilings of a device, which all other figures are held against, beside what its maker says."""

from experiments.device_check.bounds import hand_over, measure_ceilings
from experiments.device_check.context import Context


def run(context: Context) -> None:
  """Measure."""
  hand_over(context.figures, measure_ceilings(context.sizes))
