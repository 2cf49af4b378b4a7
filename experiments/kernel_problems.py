"""The problems that kernels are judged by, with figures to reach, and the published kernels beside them."""

import dataclasses
import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
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
  beside: str = ''  # the row of ours that a published kernel is shown with

  def build(self) -> Case:
    """The call."""
    module, function = self.case.split(':')
    return getattr(importlib.import_module(module), function)(**self.arguments)

  def to_time(self) -> 'Problem':
    """The same where a device is here to time it: whole, and reading what an estimate has to know beforehand."""
    if self.beside:
      kept = {name: value for name, value in self.arguments.items() if name not in ('static', 'kv_heads')}
      return dataclasses.replace(self, arguments=kept)
    read = {
      'pallas_kernels.cases:decode': {'static': False},
      'pallas_kernels.cases:prefill': {'static': False, 'tokens': self.arguments.get('context', 4096)},
    }
    return dataclasses.replace(self, arguments={**self.arguments, **read.get(self.case, {})})


def _bars(v5e: float | None = None, v6e: float | None = None, v5p: float | None = None, tpu7x: float | None = None):
  bars = {'v5e': v5e, 'v6e': v6e, 'v5p': v5p, 'tpu7x': tpu7x}
  return {device: bar for device, bar in bars.items() if bar is not None}


def _decode(
  name: str, bars: Mapping[str, float], cuts: Sequence[tuple[int, ...]] = ((1024, 2, 4), (2048, 1, 4)), **arguments: Any
) -> Problem:
  """A row of decode; cuts are tokens a block, blocks a step, columns that share a product and maybe blocks that do."""
  names = ('block_tokens', 'blocks', 'share', 'joined')
  configs: list[dict[str, Any]] = [dict(zip(names, cut, strict=False)) for cut in cuts]
  return Problem(name, 'pallas_kernels.cases:decode', arguments, bars, configs)


_SMALL_HEADS: Mapping[str, Any] = {'query_heads': 9, 'kv_heads': 3, 'head_dim': 64}
_FEW_HEADS = ((2048, 4, 4), (2048, 4, 4, 2))


def _prefill(name: str, bars: Mapping[str, float], **arguments: Any) -> Problem:
  configs: list[dict[str, Any]] = [
    {'ahead': ahead, 'heads_at_once': heads, 'edge_heads_at_once': edges}
    for ahead, heads, edges in ((4, 2, 8), (4, 8, 8), (2, 1, 4))
  ]
  short = {'heads_at_once': 1, 'outer_heads_at_once': 2}
  configs.append({'ahead': 4, 'edge_heads_at_once': 1, 'block_tokens': 256, **short})
  configs.extend({'ahead': 6, 'edge_heads_at_once': 2, 'join_results': join, **short} for join in (False, True))
  return Problem(name, 'pallas_kernels.cases:prefill', arguments, bars, configs)


def _int4(grouped: bool, block_n: int, lead_n: int, by_bytes: bool) -> dict[str, Any]:
  return {
    'block_n': block_n,
    'depth': 4,
    'lead_n': lead_n,
    'copies': 2,
    'lead_copies': 8,
    'last_n': 256,
    'tile_k': 128 if grouped else 256,
    'by_bytes': by_bytes,
    'correction': 'sums' if grouped and by_bytes else 'products',
  }


def _matmul(name: str, bars: Mapping[str, float], **arguments: Any) -> Problem:
  grouped = 'group_size' in arguments
  candidates = _INT4_CANDIDATES[grouped] if arguments.get('kind', 'int4') == 'int4' else _INT8_CANDIDATES
  return Problem(name, 'pallas_kernels.cases:matmul', arguments, bars, candidates)


def _append(tokens: int) -> Problem:
  candidates = [
    {'tile_rows': 16, 'block_tokens': min(tokens, 256), 'slots': 2 * ahead, 'ahead': ahead} for ahead in (4, 8, 16, 32)
  ]
  name = f'append {tokens} tokens, page 16'
  return Problem(name, 'pallas_kernels.cases:append', {'batch': tokens}, candidates=candidates)


def _copy(function: str) -> Problem:
  candidates: list[dict[str, Any]] = [*({'units_in_flight': units} for units in (32, 64)), {'direct': False}]
  return Problem(f'{function} 128 pages of 16', f'pallas_kernels.cases:{function}', {}, candidates=candidates)


_INT4_CUTS = (
  *((2048, 1024, False), (1536, 512, False), (1024, 512, False), (768, 512, False), (512, 256, False)),
  *((2048, 1024, True), (2048, 512, True), (1024, 256, True)),
)
_INT8_CANDIDATES = [{'block_n': 512, 'depth': 4, 'copies': 2, 'lead_copies': 8, 'last_n': 256}]
_INT4_CANDIDATES = {grouped: [_int4(grouped, *cut) for cut in _INT4_CUTS] for grouped in (False, True)}


def _anchor(beside: str, name: str, function: str, **arguments: Any) -> Problem:
  return Problem(name, f'experiments.kernel_anchors:{function}', arguments, beside=beside)


def _splash(block_q: int, block_kv: int, compute: int) -> Problem:
  name = f'JAX splash, blocks of {block_q} × {block_kv}, {compute} at once, one kv head'
  sizes = {'block_q': block_q, 'block_kv': block_kv, 'compute': compute}
  return _anchor(_PREFILL, name, 'splash_prefill', **sizes, kv_heads=1, static=True)


def _paged(page_size: int, block_tokens: int) -> Problem:
  name = f'JAX paged, page {page_size}, {block_tokens} tokens a block, one kv head'
  sizes = {'page_size': page_size, 'block_tokens': block_tokens}
  return _anchor(f'decode 32/8, page {page_size}', name, 'paged_decode', **sizes, kv_heads=1, static=True)


_PREFILL = 'prefill 32/8, 4096 tokens'
_NONE: Mapping[str, float] = {}
BARS = (
  _prefill(_PREFILL, _bars(80, 45, 80, 45)),
  *(_decode(f'decode 32/8, page {size}', _bars(100, 98, 100, 93), page_size=size) for size in (16, 64, 128)),
  _decode('decode 32/8, heads of 64', _bars(98, 95, 95, 75), ((2048, 2, 4), (2048, 2, 2)), head_dim=64),
  _decode('decode 9/3, heads of 64', _bars(95, 90, 95, 68), _FEW_HEADS, flat=True, **_SMALL_HEADS),
  _decode('decode 8/1', _NONE, _FEW_HEADS, query_heads=8, kv_heads=1),
  _decode('decode 32/8, int8 pages', _bars(97, 90, 95, 72), ((2048, 1, 4), (2048, 2, 4)), dtype='int8'),
  _matmul('matmul int4, one scale a column', _bars(95, 90)),
  _matmul('matmul int4, groups of 128', _bars(95, 90), group_size=128),
  _matmul('matmul int8', _NONE, kind='int8'),
  _matmul('matmul w8a8', _NONE, kind='w8a8'),
  *map(_append, (16, 64, 512)),
  *map(_copy, ('gather', 'scatter')),
)

ANCHORS = (
  _anchor(_PREFILL, 'JAX flash, as it comes', 'flash_prefill'),
  *(_anchor(_PREFILL, f'JAX flash, blocks of {block}', 'flash_prefill', block=block) for block in (512, 1024)),
  _splash(1024, 1024, 512),
  _splash(256, 2048, 1024),
  _anchor(_PREFILL, 'tokamax', 'tokamax_prefill'),
  *(_paged(page_size, tokens) for page_size in (16, 64, 128) for tokens in (512, 2048)),
  *(
    _anchor(
      f'decode 32/8, page {size}',
      f'JAX ragged paged, page {size}, 2048 tokens a block',
      'ragged_decode',
      page_size=size,
      static=True,
    )
    for size in (16, 64, 128)
  ),
  *(
    _anchor(f'matmul {kind}', f'XLA {kind[:4]}', 'xla_matmul', kind=kind[:4])
    for kind in ('int4, one scale a column', 'int8')
  ),
)

# Small enough for the tests, and one of each kernel: what they cost must not grow unnoticed.
CANARIES = (
  (_decode('decode 32/8, 4 sequences', _NONE, batch=4), 'v6e'),
  (_decode('decode 9/3, 8 sequences', _NONE, batch=8, **_SMALL_HEADS), 'tpu7x'),
  (_decode('decode 32/8, int8, 4 sequences', _NONE, batch=4, dtype='int8'), 'v5e'),
  (_prefill('prefill 16/4, 512 tokens', _NONE, context=512, query_heads=16, kv_heads=4), 'v6e'),
  (_matmul('matmul int4 of 2048 columns', _NONE, n=2048), 'v5e'),
  (Problem('append, gather and scatter', 'pallas_kernels.cases:copy', {'batch': 8}), 'v6e'),
)

_SIZES: Mapping[str, Sequence[Any]] = {
  'heads': ((9, 3), (32, 8), (64, 8), (16, 16)),
  'head_dim': (64, 128, 256),
  'page_size': (16, 32, 64, 128),
  'dtype': ('bfloat16', 'float32'),
  'batch': (1, 7, 64),
  'context': (2048, 131_072),
}


def shapes() -> Iterator[Problem]:
  """Every kernel at every shape that it has to compile for."""
  for function in ('prefill', 'decode', 'copy', 'matmul_of_heads'):
    for values in itertools.product(*_SIZES.values()):
      sizes: dict[str, Any] = dict(zip(_SIZES, values, strict=True))
      sizes['query_heads'], sizes['kv_heads'] = sizes.pop('heads')
      name = ' '.join([function, *map(str, values)])
      yield Problem(name, f'pallas_kernels.cases:{function}', sizes | {'static': False})
