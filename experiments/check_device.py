r"""Checks and measures pdjax on the accelerator at hand: one GPU, or TPUs (where nobody has run it yet).

python -m experiments.check_device --json=device.json
python -m experiments.check_device --platform=tpu --only=tokens

Runs, each in a process of its own: what transfers carry (`bench_transfer`), the golden tokens by every way of serving
(`check_tokens`), what handing a prompt over costs (`bench_handoff`). Workers share a device where there are too few.
Most of the time, ten minutes or so, goes into compiling; --compilation_cache keeps that for the next run. Writes what
the device is, how each command ended, and the figures. The exit status is 1 if any of them failed.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from pdjax.types.json_text import json_text

_PLATFORM = flags.DEFINE_enum('platform', 'gpu', ['cpu', 'gpu', 'tpu'], 'Devices to check.')
_ONLY = flags.DEFINE_list('only', None, 'Names of checks to run; all by default.')
_TIMEOUT_S = flags.DEFINE_float('timeout_s', 600, 'Most seconds of one check.', lower_bound=0.0)
_CACHE = flags.DEFINE_string('compilation_cache', None, 'Folder that keeps compiled programs from run to run.')
_JSON = flags.DEFINE_string('json', None, 'Write the result to this file, anew after each check.')

CHECKS: dict[str, tuple[str, ...]] = {
  'device_put': ('bench_transfer', '--transport=device_put'),
  'host_staged': ('bench_transfer', '--transport=host_staged'),
  'cross_process': ('bench_transfer', '--transport=cross_process'),
  'tokens': ('check_tokens', '--page_sizes=16'),
  'handoff': ('bench_handoff', '--rounds=5'),
}
_NOT_ON = {'tpu': ('cross_process',)}  # one process has all TPUs of a host
_MEASURING = ('bench_transfer', 'bench_handoff')  # commands that write rows
_END = 4000  # characters kept of what a command prints

_DESCRIBE = """
import json, sys, jax
first, *_ = devices = jax.devices(sys.argv[1])
print(json.dumps({'device': first.device_kind, 'count': len(devices), 'jax': jax.__version__}))
"""


def check(name: str, platform: str, timeout_s: float, cache: str | None = None) -> dict[str, Any]:
  """Run one command: its exit status (None: out of time), seconds, the end of what it printed, and its rows."""
  command, *arguments = CHECKS[name]
  with tempfile.TemporaryDirectory() as folder:
    rows = pathlib.Path(folder, 'rows.json')
    if command in _MEASURING:
      arguments.append(f'--json={rows}')
    begin = time.perf_counter()
    status: int | None = None
    try:
      done = subprocess.run(
        [sys.executable, '-m', f'experiments.{command}', f'--platform={platform}', *arguments],
        env=_environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s,
        check=False,
      )  # fmt: skip
      status, printed = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
      printed = bytes(expired.stdout or b'').decode(errors='replace')  # bytes, whatever text=True says
    return {
      'check': name,
      'status': status,
      'seconds': round(time.perf_counter() - begin, 1),
      'rows': json.loads(rows.read_text(encoding='utf-8')) if rows.exists() else [],
      'printed': printed[-_END:].splitlines(),
    }


def _environment(cache: str | None = None) -> dict[str, str]:
  """Two processes may share a device: none takes its memory beforehand. What the first compiles the next may take."""
  kept = {'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'} if cache else {}
  return os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} | kept


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  wanted = _ONLY.value or [name for name in CHECKS if name not in _NOT_ON.get(_PLATFORM.value, ())]
  if unknown := set(wanted) - set(CHECKS):
    raise app.UsageError(f'--only names {sorted(unknown)}; there are {", ".join(CHECKS)}.')
  described = subprocess.run(
    [sys.executable, '-c', _DESCRIBE, _PLATFORM.value], env=_environment(), capture_output=True, text=True, check=False
  )
  if described.returncode:
    sys.exit(f'no {_PLATFORM.value} was found:\n{described.stderr[-_END:]}')
  result: dict[str, Any] = {**json.loads(described.stdout.splitlines()[-1]), 'checks': []}
  print(f'{result["count"]} × {result["device"]}, jax {result["jax"]}', flush=True)
  for name in wanted:
    done = check(name, _PLATFORM.value, _TIMEOUT_S.value, _CACHE.value)
    ended = 'out of time' if done['status'] is None else f'status {done["status"]}'
    print(*done['printed'], f'{name}: {ended}, {done["seconds"]} s', sep='\n', flush=True)
    result['checks'].append(done)
    if _JSON.value:
      pathlib.Path(_JSON.value).write_text(json_text(result, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
  sys.exit(any(done['status'] != 0 for done in result['checks']))


if __name__ == '__main__':
  app.run(main)
