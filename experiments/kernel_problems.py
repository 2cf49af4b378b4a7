"""The problems that kernels are judged by, with figures to reach, and the published kernels beside them."""

import dataclasses
import importlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pallas_kernels.static_cost import Case

SMALL_BUNDLES = 6000  # a program of fewer is kept beside a faster, longer one: no instruction fetch is estimated


@dataclasses.dataclass(frozen=True)
class Problem:
  """One row of the benchmark."""

  name: str
  case: str  # module:function
  arguments: Mapping[str, Any]
  bars: Mapping[str, float] = dataclasses.field(default_factory=dict)  # % by device
  candidates: Sequence[Mapping[str, Any]] = ()  # parameters to try

  def build(self) -> Case:
    """The call."""
    module, function = self.case.split(':')
    return getattr(importlib.import_module(module), function)(**self.arguments)


def _bars(v5e: float | None = None, v6e: float | None = None, v5p: float | None = None, tpu7x: float | None = None):
  bars = {'v5e': v5e, 'v6e': v6e, 'v5p': v5p, 'tpu7x': tpu7x}
  return {device: bar for device, bar in bars.items() if bar is not None}


def _decode(name: str, bars: Mapping[str, float], **arguments: Any) -> Problem:
  return Problem(name, 'pallas_kernels.cases:decode', arguments, bars, _DECODE_CANDIDATES)


_DECODE_CANDIDATES = [
  {'block_tokens': 2048, 'blocks': blocks, 'share': share, 'copy_tokens': 128}
  for blocks, share in itertools.product((1, 2, 4), (1, 2, 3, 4, 8))
]
_SMALL_HEADS = {'query_heads': 9, 'kv_heads': 3, 'head_dim': 64}

BARS = (
  *(_decode(f'decode 32/8, page {size}', _bars(100, 98, 100, 93), page_size=size) for size in (16, 64, 128)),
  _decode('decode 32/8, heads of 64', _bars(98, 95, 95, 75), head_dim=64),
  _decode('decode 9/3, heads of 64', _bars(95, 90, 95, 68), **_SMALL_HEADS),
  _decode('decode 32/8, int8 pages', _bars(97, 90, 95, 72), dtype='int8'),
)
