"""A run on Ray whose workers are killed or stopped, as a command of its own, which prints as JSON what came of it."""

import contextlib
import dataclasses
import functools
import glob
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import psutil

from configs import smollm2_cpu, smollm2_ray
from pdjax import launch
from pdjax.config import KEEP_NO_PROGRAMS, ServingConfig
from pdjax.serving.events import Delivered
from pdjax.types import RayCluster
from pdjax.types.cluster import DeviceError
from tests.controller.ray_run import _is_alive
from tests.tiny import config


def kill_both(facts: dict, cache: str | None = None) -> None:
  """Serve the demo; both workers are killed when some tokens have come."""
  workers: dict[str, int] = {}
  delivered = []

  def say(line: str) -> None:
    name, _, rest = line.partition(': ')
    if ' of process ' in rest:
      workers[name] = int(rest.rpartition(' of process ')[2].split(',')[0])

  def watch(event) -> None:
    if isinstance(event, Delivered):
      delivered.append(event)
    if len(delivered) == 60 and 'killed' not in facts:
      facts['killed'] = list(workers)
      for pid in workers.values():
        os.kill(pid, signal.SIGKILL)

  facts |= _served(dataclasses.replace(smollm2_ray.get_config(), compilation_cache=cache), say, watch)
  facts['undisturbed'] = _served(smollm2_cpu.get_config())['tokens']


def _served(run: ServingConfig, say=lambda line: None, watch=lambda event: None) -> dict:
  result = launch.run(run, say=say, watch=watch)
  return {
    'tokens': {one.request.id: one.token_ids for one in result.completions},
    'errors': [one.error for one in result.completions if one.error],
    'returns': [one.to_json() for one in result.report.returns],
    'warmup_s': result.report.warmup_s,
    'compile_s': result.report.environment['warm_up']['compile_s'],
  }


def stop_one(facts: dict) -> None:
  """Begin a tiny run; one of its processes is stopped once it has loaded JAX."""

  def stop() -> None:
    while True:
      for process in psutil.Process().children(recursive=True):
        if process.name() == 'ray::RayWorker' and process.cpu_times().user > 2.0:
          process.send_signal(signal.SIGSTOP)
          return
      time.sleep(0.05)

  _begin_tiny(facts, stop)


def stop_all_early(facts: dict) -> None:
  """Begin a tiny run; whatever could become a process of its workers is stopped before it is one."""

  def stop() -> None:
    while True:
      for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
          if process.name() == 'ray::IDLE' or any(part.endswith('default_worker.py') for part in process.cmdline()):
            process.send_signal(signal.SIGSTOP)
      time.sleep(0.01)

  _begin_tiny(facts, stop)


def _begin_tiny(facts: dict, stop: Callable[[], None]) -> None:
  run = dataclasses.replace(config('1P1D'), processes=RayCluster(silence_s=3.0, start_s=8.0, cpus=0.5))
  facts['stopped'], facts['errors'] = [], []
  threading.Thread(target=stop, daemon=True).start()
  try:
    launch.run(run)
  except DeviceError as error:
    facts['errors'].append(str(error))
    facts['stopped'] = [name for name in ('prefill0', 'decode0') if repr(name) in str(error)]


WAYS = {
  'kill both': kill_both,
  'kill both, and keep no programs': functools.partial(kill_both, cache=KEEP_NO_PROGRAMS),
  'stop one at the start': stop_one,
  'stop all before they are there': stop_all_early,
}


if __name__ == '__main__':
  found: dict = {}
  WAYS[sys.argv[1]](found)
  found['left'] = [one.name() for one in psutil.Process().children(recursive=True) if _is_alive(one)]
  found['folders'] = glob.glob(os.path.join(tempfile.gettempdir(), 'pdjax-programs-*'))
  print(json.dumps(found))
