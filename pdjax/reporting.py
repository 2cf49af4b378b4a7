"""The report of a deployment's run: its figures with its config, model and machine, and its files."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

from pdjax.config import ServingConfig
from pdjax.cost import as_cost
from pdjax.metrics import Report, Timeline, draw
from pdjax.metrics.bill import Chips
from pdjax.metrics.counters import prometheus_text
from pdjax.metrics.saving import write_each
from pdjax.opened_model import OpenedModel
from pdjax.serving.built import Built
from pdjax.serving.events import Event
from pdjax.types.hardware import ChipSpec
from pdjax.types.model import ModelSpec
from pdjax.types.prefix_cache import PrefixCache
from pdjax.types.request import Completion
from pdjax.workload import Given


def make_report(
  events: Iterable[Event] | Timeline,
  completions: Sequence[Completion],
  config: ServingConfig,
  opened: OpenedModel,
  built: Built,
  notes: Sequence[str] = (),
) -> Report:
  """Every figure of a log.

  Args:
    events: The log, or the timeline of one that was followed.
    completions: The completions of its requests, whose texts the report has.
    config: The run, its workload too.
    opened: The model.
    built: The cluster that served it.
    notes: Sentences for the report, beside its own.
  """
  workload, warm_up = config.workload, built.warm_up
  assert workload is not None
  cache = config.cache_of(opened.model)
  served = dataclasses.replace(
    config, workers=built.workers, transfer=built.transfer, dtype=built.dtype, prefix_cache=cache
  )
  environment = _environment() | {'end_tokens': opened.end_tokens.by_source(), 'devices': built.devices}
  if warm_up is not None:
    environment['warm_up'] = dataclasses.asdict(warm_up)
  return Report.from_events(
    events,
    workers=built.workers,
    places=built.places,
    chips=_chips(config, built),
    slo=config.slo,
    notes=(*notes, *_rate_notes(config, built), *_cache_notes(config, cache, opened.model)),
    config=describe(served),
    environment=environment,
    seed=config.seed if workload.seed is None else workload.seed,
    request_rate=math.inf if workload.request_rate is None else workload.request_rate,
    burstiness=workload.burstiness,
    max_concurrency=workload.max_concurrency,
    model_id=opened.model.name,
    tokenizer_id=None if opened.tokenizer is None else config.checkpoint,
    backend='simulator' if warm_up is None else 'engine',
    warmup_s=None if warm_up is None else warm_up.load_s + warm_up.compile_s + warm_up.measure_s,
    calibrated=warm_up is not None or as_cost(config.cost).is_calibrated(built.workers),
    generated_texts={one.request.id: one.text for one in completions if one.text is not None},
  )


def _chips(config: ServingConfig, built: Built) -> Chips:
  """The chips of the workers: simulated ones, and of real ones what users say of them, by prices or by name."""
  cost = as_cost(config.cost)
  said = cost.chip
  if built.warm_up is not None and said is not None and said.dollars_per_hour is None and said.watts is None:
    said = None  # the default of a cost model, which need not be what there is
  chips = {worker.name: worker.chip or said for worker in built.workers}
  one_cpu = built.warm_up is None and cost.shared_host  # of virtual devices
  return Chips.of(chips, {name: [0] if one_cpu else built.devices[name] for name in chips})


def _rate_notes(config: ServingConfig, built: Built) -> list[str]:
  """A sentence for each chip that simulated workers compute on in another dtype than that of its rates."""
  cost = as_cost(config.cost)
  others: dict[ChipSpec, list[str]] = {}
  for worker in built.workers if built.warm_up is None else ():
    chip = cost.chip_of(worker)
    if chip is not None and worker.weights not in (None, chip.dtype):
      others.setdefault(chip, []).append(f'{worker.name} {worker.weights}')
  return [
    f'The rates of {chip.name} are those of {chip.dtype}, but workers have other weights ({", ".join(own)}).'
    for chip, own in others.items()
  ]


def _cache_notes(config: ServingConfig, cache: PrefixCache | None, model: ModelSpec) -> list[str]:
  """A sentence if prompts may have used what was computed in another way, or if their pages kept nothing."""
  auto = PrefixCache()
  sizes = [worker.page_size or config.page_size for worker in config.workers]
  if config.prefix_cache == 'auto' and cache is None and auto.fits(model, [auto.block_tokens]):
    if not auto.fits(model, sizes) and getattr(config.workload, 'repeats', True):
      return [
        f'No prefixes were kept, as pages of {", ".join(map(str, sorted({*sizes})))} tokens are no whole blocks of '
        f'{auto.block_tokens}; prefix_cache=PrefixCache(block_tokens=...) keeps them in smaller ones.'
      ]
    return []
  if cache is None or not cache.lossy:
    return []
  return ['The prefix cache took blocks of other weights and dtypes (lossy=True), so tokens may differ.']


def save_report(report: Report, workdir: str | pathlib.Path) -> tuple[str, ...]:
  """Write a report into a folder: figures, page, trace and counters; what could not be written, in sentences.

  Nothing is raised: by now there are answers, which are worth more. A file that is written in part is taken away.
  """
  folder = pathlib.Path(workdir)
  counters = prometheus_text(report.timeline)
  unwritten = write_each(
    {
      folder / 'report.json': report.save,
      folder / 'metrics.prom': lambda path: path.write_text(counters, encoding='utf-8'),
    }
  )
  draw(report, folder)
  return unwritten


def describe(config: Any) -> Any:
  """A config as plain JSON data, each object with its class under `kind`."""
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    if isinstance(config, Given):
      return {'kind': 'Given', 'num_requests': config.num_requests}
    fields = {field.name: describe(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return {'kind': type(config).__name__, **fields}
  if isinstance(config, tuple | list):
    return [describe(item) for item in config]
  return config if isinstance(config, str | int | float | bool | None) else repr(config)


def _environment() -> dict[str, Any]:
  versions = {'python': platform.python_version()}
  for package in ('pdjax', 'jax', 'jaxlib', 'flax', 'numpy'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {'versions': versions, 'machine': platform.machine(), 'commit': _commit()}


@functools.cache
def _commit() -> str | None:
  """The commit of the source tree that runs, if it is one."""
  root = pathlib.Path(__file__).parents[1]
  if not (root / '.git').exists():
    return None
  try:
    answer = subprocess.run(
      ['git', 'describe', '--always', '--dirty', '--abbrev=12'], cwd=root, capture_output=True, text=True, timeout=10
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return answer.stdout.strip() or None
