"""The parts of `experiments.check_device`: what is checked and measured on an accelerator, each part by itself."""

from experiments.device_check.parts import PARTS, Part
from experiments.device_check.sizes import Sizes

__all__ = ['PARTS', 'Part', 'Sizes']
