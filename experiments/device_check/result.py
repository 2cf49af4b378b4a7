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
from rich.table import Table

from experiments.device_check.figures import CHECKED, OVER
from pdjax.types.json_text import json_text

FORMAT = 2
ENDED_WELL = ('passed', 'passed over')
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
    'cuda': client or None, 'driver': driver, 'python': platform.python_version(),
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
  """What the environment says about programs and memory."""
  return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """In what two results are not of the same code, device, versions and settings, at the same shapes.

  The commit is not among them: where `sources` are equal, it differs in what no part runs.
  """
  return [name for name in _SAME if one.get(name) != other.get(name)]


def load(file: pathlib.Path) -> dict[str, Any] | None:
  """What a result's file holds, or None if it holds no result of this format."""
  found = _read(file)
  whole = found.get('format') == FORMAT and isinstance(found.get('parts'), list)
  return found if whole else None


def _read(file: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(file.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def set_aside(file: pathlib.Path) -> pathlib.Path:
  """Give a result's file another name, by its commit or else its date, that none has; which one."""
  found = _read(file)
  called = re.sub(r'[^\w-]+', '-', str(found.get('commit') or found.get('date') or 'damaged'))
  if (commit := re.fullmatch(r'([0-9a-f]{12})[0-9a-f]*(-changes-[0-9a-f]+)?', called)) is not None:
    called = commit[1] + (commit[2] or '')
  names = (f'{file.stem}-{called}{number}.json' for number in itertools.chain([''], itertools.count(-2, -1)))
  kept = next(path for path in map(file.with_name, names) if not path.exists())
  return file.rename(kept)


def save(file: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Write a result in place of the last one, whole at any time."""
  new = file.with_suffix('.new')
  new.write_text(json_text(result, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
  new.replace(file)


def show(console: Console, result: Mapping[str, Any]) -> None:
  """Print every figure by part, and last what failed and why."""
  versions = ', '.join(f'{name} {version}' for name, version in result['versions'].items() if version)
  console.print(f'{result["count"]} × {result["device"]}: {versions}; {result["commit"]}', markup=False)
  for part in result['parts']:
    if part['status'] == 'passed over':
      console.print(f'{part["part"]}: passed over, {part["reason"]}', markup=False)
      continue
    console.print(_table(part))
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
  told = [f'{counts["passed"]} parts passed', f'{counts["failed"]} failed', *others]
  console.print(f'{", ".join(told)}, {counts["passed over"]} passed over')


def _table(part: Mapping[str, Any]) -> Table:
  title = f'{part["part"]}: {part["status"]}, {part["seconds"]:.0f} s'
  if part['compile_s']:
    title += f', compiling {part["compile_s"]:.0f} s'
  table = Table(title=title, title_justify='left', box=None, pad_edge=False)
  if not part['rows']:
    return table
  table.add_column('figure')
  for column in ('value', 'beside', 'ratio', 'of ceiling'):
    table.add_column(column, justify='right')
  for row in _shown(part['rows']):
    beside = '' if row['peer_value'] is None else f'{row["peer"]}: {number(row["peer_value"])}'
    ratio = '' if row['ratio'] is None else f'{row["ratio"]:.3f}'
    share = '' if row['floor_share'] is None else f'{row["floor_share"]:.1%}'
    marked = f'{row["name"]} ({row["note"]})' if row.get('note') else row['name']
    table.add_row(marked, f'{number(row["value"])} {row["unit"]}', beside, ratio, share)
  return table


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The rows of a table: of answers that were checked, the worst of each kernel in each way and dtype."""
  worst: dict[str, Mapping[str, Any]] = {}
  for row in rows:
    key = row['name']
    if row['unit'] == CHECKED:
      key = ', '.join(row['name'].split(', ')[:2])
    if key not in worst or badness(row) > badness(worst[key]):
      worst[key] = row
  return list(worst.values())


def badness(row: Mapping[str, Any]) -> float:
  """How much of what is allowed an answer misses; NaN is worst."""
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
