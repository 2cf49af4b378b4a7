"""A run on Ray as a command of its own, which prints as JSON what a test wants to know of it."""

import dataclasses
import json
import sys

import psutil

from pdjax import launch
from pdjax.types import RayCluster, TransferSpec
from tests.tiny import config


def run(cache: str, split: str, decode_tp: int) -> dict:
  """Serve the tiny workload; the cluster is gone when this returns."""
  run = dataclasses.replace(
    config(split, 1, decode_tp),
    transfer=TransferSpec(granularity='chunk', piece_bytes=4096, checksums=True),
    processes=RayCluster(),
    compilation_cache=cache,
  )
  facts: dict = {'said': []}

  def listening() -> None:
    """Note the addresses at which each process listens, while the workers are up."""
    heard: dict[str, list[str]] = {}
    for process in psutil.Process().children(recursive=True):
      for one in process.net_connections('tcp'):
        if one.status == psutil.CONN_LISTEN:
          heard.setdefault(str(process.pid), []).append(f'{one.laddr.ip}:{one.laddr.port}')
    facts['listening'] = heard

  def say(line: str) -> None:
    facts['said'].append(line)
    if line.startswith('warm-up'):
      listening()

  result = launch.run(run, say=say)
  facts['tokens'] = {one.request.id: one.token_ids for one in result.completions}
  facts['errors'] = [one.error for one in result.completions if one.error]
  facts['moved'] = result.report.wire_bytes
  facts['transfers'] = result.report.num_transfers
  facts['jax'] = sorted({'jax', 'jaxlib', 'flax'} & sys.modules.keys())
  facts['left'] = [process.name() for process in psutil.Process().children(recursive=True) if _is_alive(process)]
  return facts


def _is_alive(process: psutil.Process) -> bool:
  try:
    return process.status() != psutil.STATUS_ZOMBIE
  except psutil.NoSuchProcess:
    return False


if __name__ == '__main__':
  print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
