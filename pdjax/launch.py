"""Run a config on the engine or the simulator: build a backend, serve, report."""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from pdjax.config import ServingConfig
from pdjax.cost.memory import size_pools
from pdjax.metrics import EventLog, Report
from pdjax.serving.loop import Arrivals, Backend, serve
from pdjax.serving.messages import Arrived, Done, Event, Finished, Turn
from pdjax.serving.state import ClusterState
from pdjax.simulator import Simulator
from pdjax.types.cluster import WorkerSpec, carve_devices, devices_needed
from pdjax.types.model import ModelSpec, mesh_shape
from pdjax.types.request import Completion, Request, SamplingParams
from pdjax.workload import Given, WorkloadContext

Say = Callable[[str], None]
Watch = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class RunResult:
  """What came of a run.

  Attributes:
    report: Every figure; print it, or read its fields.
    completions: What each request got, in the order of arrival.
    events: The log that the report was computed from.
    workers: The cluster as it ran, `num_pages` filled in.
    model: The model as it was served.
  """

  report: Report
  completions: tuple[Completion, ...]
  events: tuple[Event, ...]
  workers: tuple[WorkerSpec, ...]
  model: ModelSpec


def run(
  config: ServingConfig,
  *,
  workdir: str | pathlib.Path | None = None,
  say: Say = lambda line: None,
  watch: Watch = lambda event: None,
) -> RunResult:
  """Serve a config's workload on devices.

  Args:
    config: The run.
    workdir: Gets `events.jsonl` and `report.json`; None writes nothing.
    say: Told in a line what is being done before the clock runs.
    watch: Called with every event, for progress.

  Raises:
    ValueError: if the config does not fit the model, the devices or their memory, or has no workload.
    RuntimeError: if JAX has already started with too few CPU devices.
  """
  from pdjax.engine.build import build_engine  # JAX begins here
  from pdjax.model.checkpoint import RandomCheckpoint

  model, checkpoint = open_model(config)
  if checkpoint is None:
    if config.checkpoint != 'random' or config.model is None:
      raise ValueError("the engine needs weights: set checkpoint to a file, a folder, 'smollm2' or 'random'.")
    checkpoint = RandomCheckpoint(config.model)
  tokenizer = checkpoint.tokenizer()
  arrivals = _arrivals(config, model, tokenizer)

  def limit_of(request: Request) -> int:
    limit = min(request.sampling.max_tokens, model.context_len - request.prompt_len + 1)
    true_len = arrivals.output_len(request.id)
    return limit if true_len is None else min(limit, true_len)

  engine, workers, warm_up = build_engine(config, model, checkpoint, limit_of, say)
  state = ClusterState(model, workers, config.page_size)
  try:
    engine.start_clock()
    events = _serve(arrivals, config, engine, state, workdir, watch)
  finally:
    engine.close()
  completions = complete(events, tokenizer)
  report = _report(
    config, model, workers, events, completions, workdir, 'engine',
    warmup_s=warm_up.load_s + warm_up.compile_s,
    calibrated=True,
    measured={'chip': dataclasses.asdict(warm_up.chip), 'link': dataclasses.asdict(warm_up.link),
              'compile_s': warm_up.program_s},
    devices=_device_names(),
  )  # fmt: skip
  return RunResult(report, completions, events, workers, model)


def simulate(
  config: ServingConfig,
  *,
  workdir: str | pathlib.Path | None = None,
  watch: Watch = lambda event: None,
  calibrate: bool = False,
) -> RunResult:
  """Serve a config's workload in virtual time, with the same loop, policy and state as `run`.

  Args:
    config: The run; `config.cost` says how long things take.
    workdir: Gets `events.jsonl` and `report.json`; None writes nothing.
    watch: Called with every event, for progress.
    calibrate: Measure this machine first and use that for `config.cost` (loads JAX).

  Raises:
    ValueError: if the config does not fit the model or the memory, or has no workload.
  """
  if calibrate:
    config = calibrated(config)
  model, checkpoint = open_model(config)
  for worker in config.workers:
    mesh_shape(model, worker.tp)
  arrivals = _arrivals(config, model, checkpoint and checkpoint.tokenizer())
  carved = carve_devices(config.workers, devices_needed(config.workers))
  memory = config.cost.chip.memory_bytes * 0.9
  workers = size_pools(config.workers, carved, model, config.page_size, config.dtype_bytes, memory)
  cost = dataclasses.replace(config.cost, dtype_bytes=config.dtype_bytes)
  state = ClusterState(model, workers, config.page_size)
  simulator = Simulator(model, workers, config.page_size, cost, arrivals.output_len)
  events = _serve(arrivals, config, simulator, state, workdir, watch)
  completions = complete(events, None)
  report = _report(
    config, model, workers, events, completions, workdir, 'simulator',
    calibrated=cost.calibrated,
    measured={'chip': dataclasses.asdict(cost.chip), 'link': dataclasses.asdict(cost.link)},
  )  # fmt: skip
  return RunResult(report, completions, events, workers, model)


def generate(
  prompts: Sequence[str | Sequence[int]],
  config: ServingConfig,
  sampling: SamplingParams = SamplingParams(),
) -> list[Completion]:
  """Continue prompts: texts go through the chat template if there is one, token ids are taken as they are.

  Raises:
    ValueError: if a prompt cannot be served; the message says why.
  """
  _, checkpoint = open_model(config)
  tokenizer = checkpoint.tokenizer() if checkpoint else None
  requests = []
  for index, prompt in enumerate(prompts):
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else tuple(prompt)
    requests.append(Request(f'request-{index}', ids, sampling))
  completions = run(dataclasses.replace(config, workload=Given(tuple(requests)))).completions
  by_id = {completion.request.id: completion for completion in completions}
  for completion in completions:
    if completion.error:
      raise ValueError(f'prompt {completion.request.id.removeprefix("request-")}: {completion.error}')
  return [by_id[request.id] for request in requests]


def open_model(config: ServingConfig) -> tuple[ModelSpec, Any]:
  """The model as it is to be served, and its checkpoint if there is one.

  Raises:
    ValueError: if the checkpoint is damaged, or has another shape than `config.model`.
    FileNotFoundError: if it is not there.
  """
  from pdjax.model.checkpoint import open_checkpoint

  checkpoint = None if config.checkpoint in (None, 'random') else open_checkpoint(config.checkpoint)
  model = config.model
  if checkpoint is not None:
    found = checkpoint.spec
    if model is not None and dataclasses.replace(found, name=model.name) != model:
      raise ValueError(
        f'checkpoint {config.checkpoint!r} holds {found}, but the config asks for {model}; leave one out.'
      )
    model = model or found
  assert model is not None
  if config.max_context is not None:
    if config.max_context > model.context_len:
      raise ValueError(f'max_context is {config.max_context}, but the context of {model.name} is {model.context_len}.')
    model = dataclasses.replace(model, context_len=config.max_context)
  return model, checkpoint


def encode_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
  """A user's words as a prompt: through the chat template if the tokenizer has one, else as they are.

  Raises:
    ValueError: if there is no tokenizer.
  """
  if tokenizer is None:
    raise ValueError('the checkpoint has no tokenizer, so prompts must be token ids; use prompt_token_ids.')
  if tokenizer.chat_template is None:
    return tuple(tokenizer.encode(text))
  return tuple(tokenizer.apply_chat_template([{'role': 'user', 'content': text}]))


def calibrated(config: ServingConfig) -> ServingConfig:
  """The config with a roofline measured on this machine's first device."""
  import jax
  import jax.numpy as jnp

  from pdjax.engine.build import device_memory_bytes, prepare_devices
  from pdjax.engine.calibration import measure_chip, measure_link

  needed = devices_needed(config.workers)
  devices = prepare_devices(config.platform, needed)
  precision = 'highest' if config.dtype == 'float32' else 'default'
  chip = measure_chip(devices[0], jnp.dtype(config.dtype), precision)
  chip = dataclasses.replace(chip, memory_bytes=device_memory_bytes(devices[0], needed) / 0.9)
  link = measure_link(devices[0], devices[min(1, len(devices) - 1)])
  shared_host = jax.devices()[0].platform == 'cpu'
  cost = dataclasses.replace(config.cost, chip=chip, link=link, shared_host=shared_host)
  return dataclasses.replace(config, cost=cost)


# ---------------------------------------------------------------------------- serving


def _arrivals(config: ServingConfig, model: ModelSpec, tokenizer: Any) -> Arrivals:
  if config.workload is None:
    raise ValueError('the config has no workload; set one, e.g. workload=Poisson(requests_per_s=1, num_requests=16).')
  encode = None if tokenizer is None else lambda text: encode_prompt(tokenizer, text)
  return config.workload.arrivals(WorkloadContext(model.vocab_size, model.context_len, encode))


def _serve(
  arrivals: Arrivals,
  config: ServingConfig,
  backend: Backend,
  state: ClusterState,
  workdir: str | pathlib.Path | None,
  watch: Watch,
) -> tuple[Event, ...]:
  path = None if workdir is None else pathlib.Path(workdir) / 'events.jsonl'
  with EventLog(path) as log:
    for event in serve(arrivals, config.policy, backend, state):
      log.append(event)
      watch(event)
  return tuple(log)


def complete(events: Sequence[Event], tokenizer: Any) -> tuple[Completion, ...]:
  """What each request of a log got, in the order of arrival, as text too if there is a tokenizer."""
  requests: dict[str, Request] = {}
  times_s: dict[str, list[float]] = {}
  ends: dict[str, Finished] = {}
  now_s = 0.0
  for event in events:
    match event:
      case Turn(turn_s):
        now_s = turn_s
      case Arrived(request):
        requests[request.id] = request
        times_s[request.id] = []
      case Done():
        for result in event.results:
          times_s[result.request] += [now_s] * len(result.tokens)
      case Finished(_, name):
        ends[name] = event
  return tuple(
    Completion(
      request,
      ends[name].tokens,
      ends[name].finish_reason,
      ends[name].error,
      tokenizer.decode(ends[name].tokens) if tokenizer is not None else None,
      tuple(times_s[name][: len(ends[name].tokens)]),
    )
    for name, request in requests.items()
    if name in ends
  )


# ---------------------------------------------------------------------------- reporting


def _report(
  config: ServingConfig,
  model: ModelSpec,
  workers: tuple[WorkerSpec, ...],
  events: Sequence[Event],
  completions: Sequence[Completion],
  workdir: str | pathlib.Path | None,
  backend: str,
  *,
  calibrated: bool,
  measured: dict[str, Any],
  warmup_s: float | None = None,
  devices: list[str] | None = None,
) -> Report:
  workload = config.workload
  assert workload is not None
  report = Report.from_events(
    events,
    workers=workers,
    slo=config.slo,
    config=describe(config),
    environment=_environment(devices) | {'measured': measured},
    seed=getattr(workload, 'seed', None),
    request_rate=_or(workload.request_rate, float('inf')),
    burstiness=_or(workload.burstiness, 1.0),
    max_concurrency=workload.max_concurrency,
    model_id=model.name,
    tokenizer_id=config.checkpoint,
    backend=backend,
    warmup_s=warmup_s,
    calibrated=calibrated,
    generated_texts={one.request.id: one.text for one in completions if one.text is not None},
  )
  if workdir is not None:
    report.save(pathlib.Path(workdir))
  return report


def _or(value: float | None, default: float) -> float:
  return default if value is None else value


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


def _environment(devices: list[str] | None) -> dict[str, Any]:
  versions = {'python': platform.python_version()}
  for package in ('pdjax', 'jax', 'jaxlib', 'flax', 'numpy'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {'versions': versions, 'devices': devices, 'machine': platform.machine(), 'commit': _commit()}


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


def _device_names() -> list[str]:
  import jax

  return [f'{device.platform}:{device.id} {device.device_kind}' for device in jax.devices()]
