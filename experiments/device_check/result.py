"""The result of a check of a device: what was measured on which device with which versions of what, and its table."""

import collections
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.device_check.figures import CHECKED, FAR, OVER
from pdjax.types.json_text import json_text

FORMAT = 2
ENDED_WELL = ('passed', 'passed over')
TOYS = 'DRY RUN: toy shapes on a CPU, the figures mean nothing'
MFU = 'mfu_of_data_sheet'  # an entry of the rows that have one
_RATIO = 'ratio: value over what is beside it; more is better per second and in %, less in s, ms, us and of errors'
_SAME = (
  'format', 'dry_run', 'device', 'count', 'platform', 'compute_capability', 'versions', 'sources', 'environment',
)  # fmt: skip
SETTINGS = (  # of the environment, that change what is compiled or how much memory there is
  'XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'XLA_PYTHON_CLIENT_PREALLOCATE', 'XLA_PYTHON_CLIENT_ALLOCATOR',
  'XLA_PYTHON_CLIENT_MEM_FRACTION', 'XLA_CLIENT_MEM_FRACTION', 'TF_GPU_ALLOCATOR', 'NVIDIA_TF32_OVERRIDE',
  'JAX_ENABLE_X64', 'JAX_DEFAULT_MATMUL_PRECISION', 'CUDA_VISIBLE_DEVICES', 'PALLAS_KERNELS_FORM',
  'PALLAS_KERNELS_WITHOUT',
)  # fmt: skip
_ROOT = pathlib.Path(__file__).parents[2]

# Run by a process of its own, so that the one that waits for the parts holds no device.
DESCRIBE = """
import importlib.metadata, json, platform, shutil, subprocess, sys
import jax

if sys.argv[1] == 'cpu':
  jax.config.update('jax_platforms', 'cpu')
first, *_ = devices = jax.devices(sys.argv[1])
client = ' '.join(str(getattr(first.client, 'platform_version', '')).split())
packages = {dist.metadata['Name'].lower(): dist.version for dist in importlib.metadata.distributions()}
cudnn = [version for name, version in packages.items() if name.startswith('nvidia-cudnn')]
driver = memory = None
if sys.argv[1] == 'gpu' and shutil.which('nvidia-smi'):
  ask = ['nvidia-smi', '--query-gpu=driver_version,memory.total', '--format=csv,noheader,nounits']
  said = subprocess.run(ask, capture_output=True, text=True).stdout.splitlines()
  if said and said[0].count(',') == 1:
    driver, mebibytes = said[0].split(', ')
    memory = int(mebibytes) << 20 if mebibytes.isdigit() else None
if memory is None:
  memory = (first.memory_stats() or {}).get('bytes_limit')
print(json.dumps({
  'device': first.device_kind, 'count': len(devices), 'platform': first.platform,
  'compute_capability': getattr(first, 'compute_capability', None), 'memory': memory,
  'versions': {
    'jax': jax.__version__, 'jaxlib': packages.get('jaxlib'), 'cudnn': cudnn[0] if cudnn else None,
    'cuda': client or None if first.platform == 'gpu' else None,
    'libtpu': client or None if first.platform == 'tpu' else None,
    'driver': driver, 'python': platform.python_version(),
  },
}))
"""


def commit(root: pathlib.Path = _ROOT) -> str | None:
  """The commit that is checked out; with changes, also a digest of these; None where there is no repository."""

  def git(*arguments: str) -> str | None:
    try:
      done = subprocess.run(['git', '-C', str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
      return None
    return done.stdout if done.returncode == 0 else None

  head = git('rev-parse', 'HEAD')
  if head is None:
    return None
  changed = hashlib.sha256((git('diff', 'HEAD') or '').encode())
  new = [
    name for name in (git('ls-files', '--others', '--exclude-standard', '-z') or '').split('\0') if name.endswith('.py')
  ]
  if not new and not git('status', '--porcelain', '--untracked-files=no'):
    return head.strip()
  for name in sorted(new):
    changed.update(name.encode() + b'\0' + (root / name).read_bytes())
  return f'{head.strip()}+changes {changed.hexdigest()[:12]}'


def sources(root: pathlib.Path = _ROOT) -> str:
  """A digest of all code that a part may run, which tells a version where there is no repository, too."""
  digest = hashlib.sha256()
  for folder in ('experiments', 'pallas_kernels', 'pdjax'):
    for path in sorted([*(root / folder).rglob('*.py'), *(root / folder).rglob('tuning.json')]):
      digest.update(str(path.relative_to(root)).encode() + b'\0' + path.read_bytes() + b'\0')
  return digest.hexdigest()[:12]


def settings() -> dict[str, str]:
  """Settings of programs and memory in the environment."""
  return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """In what two results are not of the same code, device, versions and settings, at the same shapes.

  The commit is not among them: where `sources` are equal, it differs in what no part runs.
  """
  return [name for name in _SAME if one.get(name) != other.get(name)]


def load(file: pathlib.Path) -> dict[str, Any] | None:
  """The content of a result's file, or None if it is damaged or of another format."""
  found = _read(file)
  return found if _whole(found) else None


def of_another_format(file: pathlib.Path) -> bool:
  """Whether a file says that it is of a format that is not this one."""
  found = _read(file).get('format')
  return isinstance(found, int) and found != FORMAT


_Kinds = dict[str, type | tuple[type, ...]]
_NUMBER = (int, float, str)  # JSON has words for those that are not finite
_MAYBE = (*_NUMBER, type(None))
_PART: _Kinds = {
  'part': str, 'status': str, 'reason': (str, type(None)), 'seconds': (int, float),
  'compile_s': (int, float, type(None)), 'date': str, 'rows': list, 'notes': list, 'printed': list,
}  # fmt: skip
_ROW: _Kinds = {
  'name': str, 'value': _NUMBER, 'unit': str, 'peer': (str, type(None)), 'peer_value': _MAYBE, 'ratio': _MAYBE,
  'floor_share': _MAYBE,
}  # fmt: skip


def _whole(found: Mapping[str, Any]) -> bool:
  """Whether all is there that is read of a result, and of its kind."""
  parts = found.get('parts')
  return (
    found.get('format') == FORMAT
    and all(name in found for name in _SAME)
    and isinstance(parts, list)
    and all(_has(part, _PART) and all(_has(row, _ROW) for row in part['rows']) for part in parts)
    and all(_readable(row) for part in parts for row in part['rows'])
  )


def _has(found: Any, kinds: _Kinds) -> bool:
  return isinstance(found, dict) and all(name in found and isinstance(found[name], kinds[name]) for name in kinds)


def _readable(row: Mapping[str, Any]) -> bool:
  """Whether its figures are numbers, or words of those that are not finite, and its note, if any, is text."""
  try:
    for name in ('value', 'peer_value', 'ratio', 'floor_share', MFU):
      float(row.get(name) or 0)
  except (TypeError, ValueError):
    return False
  return isinstance(row.get('note') or '', str)


def kept_before(folder: pathlib.Path, result: Mapping[str, Any]) -> pathlib.Path | None:
  """The newest of the results set aside in a folder that differs in nothing from this one, or None."""
  same = []
  for file in folder.glob('result-*.json'):
    found = load(file)
    if found is not None and not differences(found, result):
      same.append((str(found.get('date')), file))
  return max(same)[1] if same else None


def _read(file: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(file.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def set_aside(file: pathlib.Path) -> pathlib.Path:
  """Give a result's file another name that none has; which one.

  It is of the commit or else the date, and of a digest of all in which results differ; what is damaged is called so.
  """
  found = _read(file)
  called = 'damaged'
  if _whole(found) or of_another_format(file):
    called = re.sub(r'[^\w-]+', '-', str(found.get('commit') or found.get('date') or 'undated'))
    if (commit := re.fullmatch(r'([0-9a-f]{12})[0-9a-f]*(-changes-[0-9a-f]+)?', called)) is not None:
      called = commit[1] + (commit[2] or '')
    called = f'{called}-{_digest(found)}'
  names = (f'{file.stem}-{called}{number}.json' for number in itertools.chain([''], itertools.count(-2, -1)))
  kept = next(path for path in map(file.with_name, names) if not path.exists())
  return file.rename(kept)


def _digest(found: Mapping[str, Any]) -> str:
  """Eight digits of what `differences` looks at, the same for results that it finds equal."""
  text = json_text([found.get(name) for name in _SAME])
  return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()[:8]


def heading(result: Mapping[str, Any]) -> str:
  """The device, versions and code of a result, in a line."""
  versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items() if version)
  code = result['commit'] or f'no repository, sources {result["sources"]}'
  return f'{result["count"]} × {result["device"]}: {versions}; {code}{f". {TOYS}" if result["dry_run"] else ""}'


def save(file: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Write a result in place of the last one, whole at any time."""
  new = file.with_suffix('.new')
  new.write_text(json_text(result, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
  new.replace(file)


def show(console: Console, result: Mapping[str, Any]) -> None:
  """Print every figure by part, and last what failed and why."""
  console.print(heading(result), markup=False)
  console.print(_RATIO, markup=False)
  for part in result['parts']:
    if part['status'] == 'passed over':
      console.print(f'{part["part"]}: passed over, {part["reason"]}', markup=False)
      continue
    console.print(_title(part), markup=False)
    if part['rows']:
      console.print(_table(part['rows']))
    for note in part['notes']:
      console.print(f'  {note}', markup=False)
  failed = [part for part in result['parts'] if part['status'] not in ENDED_WELL]
  for part in failed:
    console.print(f'{part["part"]}: {part["status"]}, {part["reason"]}', markup=False)
  over = [row['name'] for part in result['parts'] for row in part['rows'] if OVER in (row.get('note') or '')]
  if over:
    console.print(f'{OVER}, so that what measured it is at fault: {"; ".join(over)}', markup=False)
  counts = collections.Counter(part['status'] for part in result['parts'])
  others = [f'{count} {status}' for status, count in counts.items() if status not in (*ENDED_WELL, 'failed')]
  passed = counts['passed']
  told = [f'{passed} part{"" if passed == 1 else "s"} passed', f'{counts["failed"]} failed', *others]
  if result['dry_run']:
    console.print(TOYS, markup=False)
  console.print(f'{", ".join(told)}, {counts["passed over"]} passed over')


def _title(part: Mapping[str, Any]) -> str:
  title = f'{part["part"]}: {part["status"]}, {part["seconds"]:.0f} s'
  if part['compile_s']:
    title += f', compiling {part["compile_s"]:.0f} s'
  if part['reason'] and not part['rows']:
    title += f', {part["reason"]}'
  return title


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
  table = Table(box=None, pad_edge=False)
  has_mfu = any(MFU in row for row in rows)
  table.add_column('figure')
  for column in ('value', 'beside', 'ratio', 'of ceiling'):
    table.add_column(column, justify='right')
  if has_mfu:
    table.add_column('MFU of data sheet', justify='right')
  for row, name in _shown(rows):
    beside = '' if row['peer_value'] is None else f'{row["peer"]}: {number(row["peer_value"])}'
    ratio = '' if row['ratio'] is None else f'{float(row["ratio"]):.3f}'
    share = '' if row['floor_share'] is None else f'{float(row["floor_share"]):.1%}'
    mfu = [f'{float(row[MFU]):.1%}' if MFU in row else ''] if has_mfu else []
    marked = f'{name} ({row["note"]})' if row.get('note') else name
    table.add_row(*map(escape, (marked, f'{number(row["value"])} {row["unit"]}', beside, ratio, share, *mfu)))
  return table


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
  """The rows of a table with their names: of answers that were checked, the worst of each kernel, way and dtype.

  Those of the far end of a pool and of weights in four bits have rows of their own.
  """
  alike: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    key, pieces = row['name'], row['name'].split(', ')
    if row['unit'] == CHECKED and not any(piece.startswith((FAR, 'int4')) for piece in pieces):
      key = ', '.join(pieces[:2])
    alike.setdefault(key, []).append(row)
  shown = []
  for several in alike.values():
    worst = max(several, key=badness)
    many = f', worst of {len(several)}' if len(several) > 1 and worst['unit'] == CHECKED else ''
    shown.append((worst, worst['name'] + many))
  return shown


def badness(row: Mapping[str, Any]) -> float:
  """The error of an answer as a share of what is allowed; NaN is worst."""
  ratio = float(row['value'] if row['ratio'] is None else row['ratio'])
  return math.inf if math.isnan(ratio) else ratio


def number(value: float | str) -> str:
  """A figure with four digits that count; a word as it is, which JSON has for what is not finite."""
  if isinstance(value, str):
    return value
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def ending(lines: Sequence[str], most: int = 4000) -> list[str]:
  """The last lines of what was printed, as many as have so many characters."""
  return '\n'.join(lines)[-most:].splitlines()
