"""Runs every system of a comparison at every rate, on the engine or in simulation."""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from pdjax.comparison.contest import Case, Outcomes
from pdjax.comparison.systems import System, at_rate, baselines, by_cluster, disaggregated_systems, with_split
from pdjax.comparison.verdict import Comparison, case_json, places
from pdjax.config import ServingConfig
from pdjax.deployment import BackendName, Say, calibrated, deploy
from pdjax.metrics import Report, RunLog, Timeline
from pdjax.metrics.event_log import EventLog
from pdjax.metrics.lines_file import LinesFile
from pdjax.metrics.saving import write_each
from pdjax.metrics.wording import number, per_second, short
from pdjax.opened_model import OpenedModel, open_model
from pdjax.run_folder import CASES, EVENTS
from pdjax.serving.events import Event
from pdjax.types.checked import Count, checks_arguments, fit_argument
from pdjax.types.json_text import json_text
from pdjax.types.worker import Role
from pdjax.workload import Workload

Run = tuple[System, Workload, Report, tuple[Event, ...]]


class DoesNotFit(ValueError):
  """A system that cannot be started here: the devices or their memory do not hold it."""


@checks_arguments()
def compare(
  config: ServingConfig,
  *,
  backend: BackendName = 'simulator',
  rates: Iterable[float] | None = None,
  splits: Iterable[str] | None = None,
  budgets: Sequence[Count] | None = None,
  workdir: str | os.PathLike | None = None,
  say: Say = lambda line: None,
  calibrate: bool = False,
  opened: OpenedModel | None = None,
  over: Callable[[], None] = lambda: None,
  log: Literal['full', 'summary'] = 'full',
) -> Comparison:
  """Serve a workload disaggregated and colocated, on the same devices and with the same KV memory.

      comparison = pdjax.compare(config, rates=(1, 2, 4), splits=('2P1D', '1P2D'))
      print(comparison)  # who wins where; comparison.chart() draws it

  Both sides are tried with the same sizes of a step, and each shows its best. On the engine, each cluster is loaded and
  compiled once and serves every rate and size in turn.

  Args:
    config: The run; its workers say how large a worker of either role is.
    backend: Devices, or the simulator.
    rates: Requests per second to try; None takes the workload as it is.
    splits: Splits to try instead of the config's own, see `with_split`. Each is compared with the baseline on as many
      devices as it takes.
    budgets: Tokens of one step to try, on both sides; see `colocated_systems`.
    workdir: Gets the files of `Comparison.save`, and the event logs of the two runs it shows, see `log`; `cases.jsonl`
      gets the figures of each case as it ends, and has them whatever becomes of the others.
    say: Told in a line what is being done.
    calibrate: Measure this machine first and simulate with that (loads JAX).
    opened: The answer of `open_model`, if it was asked before.
    over: Called once the last case has ended, before anything is written but `cases.jsonl`.
    log: With 'full' the two runs shown leave their `events.jsonl`, if they have fewer than 20,000 requests: all cases
      are over before it is known which these are, and until then their events are in memory.

  Raises:
    ValueError: if a rate or split is not one, the workload has no rate, the config is colocated and there are no
      splits, no division of the devices fits, or as `run` and `simulate` raise.
  """
  if config.workload is None:
    raise ValueError('the config has no workload; set one, e.g. workload=Poisson(requests_per_s=1, num_requests=16).')
  if rates is not None and not (rates := sorted(set(fit_argument(compare, 'rates', rates, tuple[float, ...])))):
    raise ValueError('rates is empty; give at least one rate, or leave it out to take the workload as it is.')
  whole = config.workload
  workloads = [whole] if rates is None else [at_rate(whole, rate) for rate in rates]
  if calibrate and backend == 'simulator':
    config = calibrated(config)
  opened = opened or open_model(config)
  ours = _disaggregated(config, splits, budgets)
  theirs, missing = baselines(ours, opened.model, budgets)
  own = _rate(whole)
  shown = min(workloads, key=lambda workload: _distance(_rate(workload), own))
  keeps = log == 'full' and workdir is not None
  cases: list[Case] = []
  full: dict[tuple[bool, int], tuple[int, Case, tuple[Event, ...]]] = {}  # the best of a side and number of devices
  with contextlib.ExitStack() as stack:
    ended = None if workdir is None else stack.enter_context(contextlib.closing(LinesFile(places(workdir)[0] / CASES)))
    for cluster in by_cluster([*ours, *theirs]):
      try:
        for system, workload, report, events in _run_cluster(cluster, workloads, backend, opened, say, keeps):
          case = Case(system, _rate(workload), report, Outcomes.of(report))
          say(f'{system.name}{_at(case.rate)}: {_line(case)}')
          if ended is not None:
            ended.add(json_text(case_json(case)))
          side = system.colocated, system.devices
          if workload is shown and (side not in full or case.merit > full[side][1].merit):
            full[side] = len(cases), case, events
          cases.append(dataclasses.replace(case, report=dataclasses.replace(report, timeline=Timeline())))
      except DoesNotFit as error:
        division = cluster[0].division
        if not cluster[0].colocated:
          raise
        missing[division] = str(error)
        say(f'{division} cannot be: {error}')
  over()
  _check_baselines(cases, missing)
  for index, case, _ in full.values():
    cases[index] = case
  comparison = Comparison(backend, tuple(cases), _rate(shown), missing)
  if workdir is None:
    return comparison
  unwritten = list(comparison.save(workdir))
  for case, folder in zip(comparison.pair(_rate(shown)), places(workdir), strict=True):
    events = full[case.system.colocated, case.system.devices][2]
    if not events:
      continue
    unwritten += write_each({folder / EVENTS: functools.partial(_write_log, events)})
  return dataclasses.replace(comparison, unwritten=tuple(unwritten))


def _write_log(events: Iterable[Event], path: pathlib.Path) -> None:
  with EventLog(path) as log:
    for event in events:
      log.append(event)
  if log.notes:
    raise OSError(log.notes[0])


def _disaggregated(config: ServingConfig, splits: Iterable[str] | None, budgets: Sequence[int] | None) -> list[System]:
  """The systems to hold against the baseline."""
  if splits is None:
    if all(worker.roles == (Role.BOTH,) for worker in config.workers):
      raise ValueError(
        f'the config is the colocated baseline itself ({config.split}); give splits to compare it with, e.g. 1P1D.'
      )
    configs = [config]
  else:
    configs = [with_split(config, split) for split in dict.fromkeys(split.strip().upper() for split in splits)]
  if not configs:
    raise ValueError("splits is empty; give at least one, such as '2P1D', or leave it out.")
  return [system for one in configs for system in disaggregated_systems(one, budgets)]


def _check_baselines(cases: Sequence[Case], missing: dict[str, str]) -> None:
  systems = [case.system for case in cases]
  for devices in {system.devices for system in systems if not system.colocated}:
    if not any(system.colocated and system.devices == devices for system in systems):
      reasons = '; '.join(f'{name}: {reason}' for name, reason in missing.items())
      raise ValueError(
        f'no equal division of {devices} devices makes a colocated baseline ({reasons}); change the number of devices '
        'or the memory of the workers.'
      )


def _run_cluster(
  cluster: Sequence[System],
  workloads: Sequence[Workload],
  backend: BackendName,
  opened: OpenedModel,
  say: Say,
  keeps: bool = True,
) -> Iterator[Run]:
  """Serve every workload with every policy of a cluster, which is built once; of short runs the events may be kept."""
  try:
    one = deployment = deploy(cluster[0].config, opened, backend, say)
  except ValueError as error:
    raise DoesNotFit(str(error)) from error
  try:
    for workload in workloads:
      for system in cluster:
        one = dataclasses.replace(deployment, config=dataclasses.replace(system.config, workload=workload))
        log = RunLog(keep_events=None if keeps else False, expected=workload.num_requests)
        for event in one.serve(opened.arrivals(one.config)):
          log.append(event)
        yield system, workload, one.report(log.timeline()), log.events
  finally:
    deployment.close()
    del deployment, one
    gc.collect()  # the next cluster wants the memory, and an engine stands in a ring of references


def _rate(workload: Workload) -> float:
  return math.inf if workload.request_rate is None else workload.request_rate


def _distance(rate: float, own: float) -> float:
  """The distance of two rates, as the logarithm of their ratio."""
  return 0.0 if rate == own else math.inf if math.isinf(own) or math.isinf(rate) else abs(math.log(rate / own))


def _at(rate: float) -> str:
  return '' if math.isinf(rate) else f' at {per_second(rate)}'


def _line(case: Case) -> str:
  report = case.report
  goodput = '' if report.request_goodput is None else f'goodput {number(report.request_goodput, 2)} req/s, '
  tails = f'TTFT p99 {short(report.ttft.p99_ms)} ms, TPOT p99 {short(report.tpot.p99_ms)} ms'
  return f'{goodput}{tails}'
