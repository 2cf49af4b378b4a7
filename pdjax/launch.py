"""Run a config on the engine or the simulator: build a backend, serve, report. `generate` answers a list of prompts."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import operator
import pathlib
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from pdjax.answers import Answers
from pdjax.config import ServingConfig
from pdjax.cost.granularity import choose_granularity
from pdjax.cost.memory import ACCELERATOR_SHARE, size_pools
from pdjax.cost.roofline import Roofline
from pdjax.metrics import EventLog, Report, draw
from pdjax.metrics.counters import prometheus_text
from pdjax.metrics.saving import write_each
from pdjax.run_folder import ANSWERS, EVENTS, RunFolder
from pdjax.serving.events import Arrived, Event
from pdjax.serving.loop import Arrivals, serve
from pdjax.serving.state import ClusterState
from pdjax.simulator import Simulator
from pdjax.types.checks import check_text
from pdjax.types.cluster import DeviceError, WorkerSpec, carve_devices, decode_pool, devices_needed, prefill_pool
from pdjax.types.hardware import DeviceKind
from pdjax.types.model import ModelSpec, mesh_shape
from pdjax.types.request import MAX_STOP_TOKENS, Completion, Request, SamplingParams
from pdjax.workload import Given, Seeded, Workload, WorkloadContext

if TYPE_CHECKING:
  from pdjax.engine.built import Built
  from pdjax.model.checkpoint import Checkpoint
  from pdjax.model.end_tokens import EndTokens
  from pdjax.model.tokenizer import Tokenizer

Folder = str | pathlib.Path | RunFolder
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # a text, token ids, or the messages of a chat
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
    unwritten: What of answers and report could not be written into the work directory, and why, in sentences.
  """

  report: Report
  completions: tuple[Completion, ...]
  events: tuple[Event, ...]
  workers: tuple[WorkerSpec, ...]
  model: ModelSpec
  unwritten: tuple[str, ...] = ()


def run(
  config: ServingConfig,
  *,
  workdir: Folder | None = None,
  resume: bool = False,
  say: Say = lambda line: None,
  watch: Watch = lambda event: None,
  opened: 'OpenedModel | None' = None,
  notes: Sequence[str] = (),
  answers: Answers | None = None,
  over: Callable[[], None] = lambda: None,
) -> RunResult:
  """Serve a config's workload on devices.

  With `platform='cpu'` JAX is told, if it has not started, to look for no other devices in this process.

  Whatever ends the serving, an exception or Ctrl-C too, what was answered is in `answers.jsonl`, the report of what
  happened so far is written, and then the exception goes on.

  Args:
    config: The run.
    workdir: Gets `run.json`, `events.jsonl` and `answers.jsonl`, which grow as the run goes on, and the report; an
      earlier run in it is moved to the folder's name with a number, see `RunFolder`. None writes nothing.
    resume: Go on with the run in `workdir`: serve what has no answer there.
    say: Told in a line what is being done before the clock runs.
    watch: Called with every event, for progress.
    opened: What `open_model` answered, if it was asked before.
    notes: What a reader of the report should know besides, in sentences.
    answers: Collects what ends; None makes one, with the files `answers.jsonl` and in the end `requests.jsonl`.
    over: Called once the serving is over, well or not, before anything is closed or reported.

  Raises:
    ValueError: if the config does not fit the model, the devices or their memory, or has no workload, or if `workdir`
      cannot be used.
    DeviceError: if there are no devices of the platform, or JAX has already started with too few on CPU.
  """
  opened = opened or open_model(config)
  with _folder(workdir, config, 'engine', resume, say) as folder, contextlib.ExitStack() as own:
    if answers is None:
      answers = _answers(folder, opened.tokenizer is not None)
      own.callback(answers.give_up)
      if folder is not None and folder.resumed:
        expect(answers, config, opened)
    arrivals = answers.left(arrivals_of(config.workload, config, opened))
    if folder is not None and folder.resumed and arrivals.closed:
      folder = None  # nothing is left, and what is there is the run's
    deployment = deploy(config, opened, arrivals.output_len, say)
    engine = deployment.built.engine

    def report(events: Sequence[Event], notes: Sequence[str]) -> Report:
      return deployment.report(events, answers.completions, None, notes)

    settled = {'dtype': deployment.config.dtype}
    with _Serving(folder, answers, report, notes, watch, over, engine.close, settled) as serving:
      engine.start_clock()
      serving.follow(serve(arrivals, config.policy, engine, deployment.empty_state()))
    return serving.result(deployment.built.workers, opened.model)


def simulate(
  config: ServingConfig,
  *,
  workdir: Folder | None = None,
  say: Say = lambda line: None,
  watch: Watch = lambda event: None,
  calibrate: bool = False,
  opened: 'OpenedModel | None' = None,
  notes: Sequence[str] = (),
  answers: Answers | None = None,
  over: Callable[[], None] = lambda: None,
) -> RunResult:
  """Serve a config's workload in virtual time, with the same loop, policy and state as `run`.

  Args:
    config: The run; `config.cost` says how long things take.
    workdir: Gets `run.json`, `events.jsonl` and the report, as from `run`; None writes nothing.
    say: Told in a line where an earlier run in `workdir` has gone.
    watch: Called with every event, for progress.
    calibrate: Measure this machine first and use that for `config.cost` (loads JAX).
    opened: What `open_model` answered, if it was asked before.
    notes: What a reader of the report should know besides, in sentences.
    answers: Collects what ends; None makes one without a file, as tokens of a simulation say nothing.
    over: Called once the run is over, well or not, before anything is reported.

  Raises:
    ValueError: if the config does not fit the model or the memory, or has no workload, or if `workdir` cannot be used.
  """
  opened = opened or open_model(config)
  answers = answers or Answers(has_text=False)
  with _folder(workdir, config, 'simulator', False, say) as folder:
    if calibrate:
      config = calibrated(config)
    model, cost = opened.model, config.cost
    arrivals = answers.left(arrivals_of(config.workload, config, opened))
    workers, carved = size_simulated(config, model)
    if isinstance(cost, Roofline):
      cost = dataclasses.replace(cost, dtype_bytes=config.dtype_bytes)
    transfer = choose_granularity(config.transfer, model, workers, cost)
    config = dataclasses.replace(config, transfer=transfer, dtype=config.definite_dtype)
    state = ClusterState(model, workers, config.page_size, config.transfer, faults=config.faults)
    simulator = Simulator(model, workers, cost, arrivals.output_len)

    def report(events: Sequence[Event], notes: Sequence[str]) -> Report:
      return _report(
        config, opened, workers, events, answers.completions, 'simulator', notes,
        calibrated=getattr(cost, 'calibrated', False),
        environment={'devices': carved},
      )  # fmt: skip

    with _Serving(folder, answers, report, notes, watch, over) as serving:
      serving.follow(serve(arrivals, config.policy, simulator, state))
    return serving.result(workers, model)


def size_simulated(
  config: ServingConfig, model: ModelSpec
) -> tuple[tuple[WorkerSpec, ...], dict[str, tuple[int, ...]]]:
  """The workers that `simulate` would run, `num_pages` filled in, and the devices of each by its name.

  Raises:
    ValueError: if the memory that `config.cost` knows of does not hold them.
  """
  carved = carve_devices(config.workers, devices_needed(config.workers))
  chip = getattr(config.cost, 'chip', None)
  memory = chip.memory_bytes * ACCELERATOR_SHARE if chip is not None else math.inf
  workers = size_pools(
    config.cluster,
    carved,
    model,
    config.dtype_bytes,
    memory,
    one_memory=getattr(config.cost, 'shared_host', False),
    staging_bytes=config.staging_bytes,
  )
  return workers, carved


def generate(
  prompts: Sequence[Prompt],
  config: ServingConfig | None = None,
  sampling: SamplingParams | Sequence[SamplingParams] | None = None,
  *,
  checkpoint: str | None = None,
  seed: int | None = None,
) -> list[Completion]:
  """Answer prompts: texts and chats go through the chat template, token ids are taken as they are.

      for answer in pdjax.generate(['What do bees make?', 'Who wrote Hamlet?']):
        print(answer.text)

  Args:
    prompts: Each a text, the messages of a chat, or token ids.
    config: What serves them; None takes `default_config(checkpoint)`.
    sampling: For all prompts, or one for each; None takes the defaults.
    checkpoint: A model for the default config: a GGUF file, a folder with safetensors, or 'smollm2'.
    seed: What prompts whose sampling has no seed draw it from; None takes the config's.

  Returns:
    A completion for each prompt, in their order; with `SamplingParams.n` above 1, that many in a row.

  Raises:
    ValueError: if a prompt cannot be served; the message says which and why.
    FileNotFoundError: if the model is not there; the message says what to install.
  """
  if isinstance(prompts, str):
    raise ValueError(f'prompts is the text {prompts[:40]!r}, expected a list of prompts; write [{prompts[:40]!r}].')
  sampling = SamplingParams() if sampling is None else sampling
  each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
  if len(each) != len(prompts):
    raise ValueError(
      f'there are {len(each)} sampling parameters for {len(prompts)} prompts; give one, or one for each.'
    )
  config = choose_config(config, checkpoint, seed)
  opened = open_model(config)
  requests = []
  for index, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
    try:
      requests.append(opened.make_request(f'request-{index}', prompt, params))
    except ValueError as error:
      raise ValueError(f'prompt {index}: {error}') from error
  completions = run(dataclasses.replace(config, workload=Given(tuple(requests))), opened=opened).completions
  by_id = {completion.request.id: completion for completion in completions}
  answers = []
  for index, request in enumerate(requests):
    for sample in request.samples():
      answer = by_id[sample.id]
      if answer.error:
        raise ValueError(f'prompt {index}: {answer.error}')
      answers.append(answer)
  return answers


# ---------------------------------------------------------------------------- what serves


def choose_config(
  config: ServingConfig | None, checkpoint: str | None = None, seed: int | None = None
) -> ServingConfig:
  """The config, or else the default one for a checkpoint, with this seed if there is one.

  Raises:
    ValueError: if config and checkpoint are both given, or the seed is out of range.
  """
  if config is not None and checkpoint is not None:
    raise ValueError(
      f'a config and the checkpoint {checkpoint!r} are both given; set the checkpoint in the config '
      '(dataclasses.replace(config, checkpoint=...)) or leave the config out.'
    )
  config = default_config(checkpoint or 'smollm2') if config is None else config
  return config if seed is None else dataclasses.replace(config, seed=seed)


def default_config(checkpoint: str = 'smollm2') -> ServingConfig:
  """One prefill worker and one decode worker, in float32: a device for each, or the one device there is for both.

  On CPU two virtual devices are made, unless JAX has started with one. Each worker has pages for 16,384 tokens.
  """
  from pdjax.engine.build import prepare_devices

  try:
    devices = prepare_devices(None, 2)
  except DeviceError:
    devices = prepare_devices(None, 1)
  place = {'num_pages': 1024, 'devices': (0,) if len(devices) == 1 else None}
  return ServingConfig(checkpoint=checkpoint, workers=prefill_pool(1, **place) + decode_pool(1, **place))


@dataclasses.dataclass(frozen=True)
class Deployment:
  """A config's cluster on devices, loaded and compiled, and what a report says of it. Close its engine in the end."""

  config: ServingConfig
  opened: 'OpenedModel'
  built: 'Built'

  def empty_state(self) -> ClusterState:
    """The state of the cluster before anything arrives."""
    config, built = self.config, self.built
    state = ClusterState(
      self.opened.model,
      built.workers,
      config.page_size,
      built.transfer,
      finds_stops=self.opened.tokenizer is not None,
      faults=config.faults,
    )
    for name, worker in built.engine.workers.items():
      state.workers[name].incarnation = worker.incarnation
    return state

  def report(
    self,
    events: Sequence[Event],
    completions: Sequence[Completion],
    workdir: str | pathlib.Path | None,
    notes: Sequence[str] = (),
  ) -> Report:
    """The report of what was served here, with these notes among its own; `workdir` gets it, see `save_report`."""
    built, warm_up = self.built, self.built.warm_up
    config = dataclasses.replace(self.config, transfer=built.transfer, dtype=built.dtype)
    report = _report(
      config, self.opened, built.workers, events, completions, 'engine', notes,
      warmup_s=warm_up.load_s + warm_up.compile_s + warm_up.measure_s,
      calibrated=True,
      environment={'devices': built.devices, 'warm_up': dataclasses.asdict(warm_up)},
    )  # fmt: skip
    if workdir is not None:
      save_report(report, workdir)
    return report


def deploy(
  config: ServingConfig,
  opened: 'OpenedModel',
  output_len: Callable[[str], int | None] = lambda request_id: None,
  say: Say = lambda line: None,
) -> Deployment:
  """Load and compile all that a config needs to serve a model on devices.

  Args:
    config: The run.
    opened: What `open_model` answered.
    output_len: How many tokens a request really generates, where that is known, by its id.
    say: Told in a line what is being done.

  Raises:
    ValueError: if there are no weights, or the config does not fit the devices or their memory.
    DeviceError: if there are no devices of the platform, or JAX has already started with too few on CPU.
  """
  model = opened.model
  if opened.checkpoint is None and config.checkpoint != 'random':
    raise ValueError("the engine needs weights: set checkpoint to a file, a folder, 'smollm2' or 'random'.")
  if config.processes is not None:
    return Deployment(config, opened, _build_processes(config, model, output_len, say))
  from pdjax.engine.build import build_engine  # JAX begins here
  from pdjax.model.checkpoint import RandomCheckpoint

  checkpoint = RandomCheckpoint(model) if opened.checkpoint is None else opened.checkpoint

  def limit_of(request: Request) -> int:
    return request.token_limit(model.context_len, output_len)

  return Deployment(config, opened, build_engine(config, model, checkpoint, limit_of, say, opened.tokenizer))


def _build_processes(
  config: ServingConfig, model: ModelSpec, output_len: Callable[[str], int | None], say: Say
) -> 'Built':
  """As `deploy`, each worker in a process of its own; this one holds no devices."""
  from pdjax.engine.process_engine import ProcessEngine
  from pdjax.engine.processes import build_processes
  from pdjax.engine.ray_workers import RayProcesses

  assert config.processes is not None
  with _sigterm_kept():
    processes = RayProcesses(config.processes, config.workers, config.platform, say)

  def close() -> None:
    with _sigterm_kept():
      processes.close()

  try:
    built = build_processes(config, model, processes.peers, output_len, say, closed=close)
    assert isinstance(built.engine, ProcessEngine)
    processes.when_lost(built.engine.fail)
    return built
  except BaseException:
    close()
    raise


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
  """What handles SIGTERM does so afterwards too: Ray puts its own handler there as it begins, and none as it ends."""
  handler = signal.getsignal(signal.SIGTERM)
  try:
    yield
  finally:
    if callable(handler) and threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, handler)


@dataclasses.dataclass(frozen=True)
class OpenedModel:
  """A config's model as it is to be served, with its checkpoint and tokenizer where there are any."""

  model: ModelSpec
  checkpoint: 'Checkpoint | None' = None
  tokenizer: 'Tokenizer | None' = None

  @functools.cached_property
  def end_tokens(self) -> 'EndTokens':
    """The tokens that end a sequence, and who says so."""
    if self.checkpoint is not None:
      return self.checkpoint.end_tokens()
    from pdjax.model.end_tokens import EndTokens

    turn = () if self.tokenizer is None else self.tokenizer.turn_end_ids
    return EndTokens((('config.model', self.model.eos_token_ids),), turn)

  @property
  def chat_end_ids(self) -> tuple[int, ...]:
    """Tokens that end an answer in a chat, besides the model's own: what the chat template puts behind one."""
    return self.end_tokens.turn

  def make_request(self, name: str, prompt: Prompt, sampling: SamplingParams = SamplingParams()) -> Request:
    """A request for a prompt, see `encode_prompt`; in a chat it also ends as the template ends an answer.

    Raises:
      ValueError: as `encode_prompt` and `Request` do.
    """
    return Request(name, self.encode_prompt(prompt), sampling, end_token_ids=self.end_ids_of(prompt))

  def end_ids_of(self, prompt: Prompt) -> tuple[int, ...]:
    """Tokens that end the answer to a prompt, besides the model's own: none for token ids."""
    is_chat = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
    return self.chat_end_ids if is_chat else ()

  def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
    """A prompt as token ids: a text goes through the chat template if there is one, and so do the messages of a chat.

    Raises:
      ValueError: if the prompt is empty, none of these, or words although there is no tokenizer.
    """
    if isinstance(prompt, Mapping):
      raise ValueError(f'the prompt is the message {prompt!r:.80}, expected a chat, a list of them; write [{{...}}].')
    if isinstance(prompt, bytes | bytearray) or not hasattr(prompt, '__getitem__') or not _has_length(prompt):
      raise ValueError(f'the prompt is {prompt!r:.80}, expected a text, messages or token ids.')
    if len(prompt) == 0:
      raise ValueError('the prompt is empty, expected some text, messages or token ids.')
    if isinstance(prompt, str):
      check_text(prompt, 'the prompt')
    elif not isinstance(prompt[0], Mapping):
      try:
        return tuple(map(operator.index, prompt))  # type: ignore[arg-type]
      except TypeError:
        raise ValueError(f'the prompt is {prompt!r:.80}, expected a text, messages or token ids.') from None
    if self.tokenizer is None:
      raise ValueError('the checkpoint has no tokenizer, so prompts must be token ids; use prompt_token_ids.')
    if not isinstance(prompt, str):
      return tuple(self.tokenizer.apply_chat_template(prompt))  # type: ignore[arg-type]
    if self.tokenizer.chat_template is None:
      return tuple(self.tokenizer.encode(prompt))
    return tuple(self.tokenizer.apply_chat_template([{'role': 'user', 'content': prompt}]))


def _has_length(value: object) -> bool:
  try:
    len(value)  # type: ignore[arg-type]
  except TypeError:  # as of an array without axes
    return False
  return True


def open_model(config: ServingConfig) -> OpenedModel:
  """Open a config's checkpoint, if it has one, and see that the workers fit the model.

  Raises:
    ValueError: if the checkpoint is damaged or has another shape than `config.model`, or a worker's `tp` does not fit.
    FileNotFoundError: if it is not there.
  """
  from pdjax.model.checkpoint import open_checkpoint

  checkpoint = None if config.checkpoint in (None, 'random') else open_checkpoint(config.checkpoint)
  model = config.model
  if checkpoint is not None:
    found = checkpoint.spec
    if model is not None:
      found = dataclasses.replace(found, name=model.name)  # which tokens end a sequence, the checkpoint knows best
      if dataclasses.replace(found, eos_token_ids=model.eos_token_ids) != model:
        raise ValueError(
          f'checkpoint {config.checkpoint!r} holds {found}, but the config asks for {model}; leave one out.'
        )
    model = found
  assert model is not None
  if config.max_context is not None:
    if config.max_context > model.context_len:
      raise ValueError(f'max_context is {config.max_context}, but the context of {model.name} is {model.context_len}.')
    model = dataclasses.replace(model, context_len=config.max_context)
  for worker in config.workers:
    mesh_shape(model, worker.tp)
  opened = OpenedModel(model, checkpoint, None if checkpoint is None else checkpoint.tokenizer())
  if len(opened.end_tokens.chat_ids) > MAX_STOP_TOKENS:
    raise ValueError(
      f'{model.name} names {len(opened.end_tokens.chat_ids)} tokens as an end of sequence '
      f'({opened.end_tokens.by_source()}), but at most {MAX_STOP_TOKENS} are kept; name fewer in its configuration.'
    )
  return opened


def calibrated(config: ServingConfig) -> ServingConfig:
  """The config with a roofline measured on this machine's first device, and with the dtype that it takes for 'auto'."""
  import jax.numpy as jnp

  from pdjax.engine.build import device_memory_bytes, prepare_devices
  from pdjax.engine.calibration import measure_chip, measure_link
  from pdjax.engine.dtypes import settle_dtype

  devices = prepare_devices(config.platform, devices_needed(config.workers))
  config = settle_dtype(config, {worker.name: [DeviceKind.of(devices[0])] for worker in config.workers})
  chip = measure_chip(devices[0], jnp.dtype(config.dtype), config.precision)
  chip = dataclasses.replace(chip, memory_bytes=device_memory_bytes(devices[0]) / ACCELERATOR_SHARE)
  link = measure_link(devices[0], devices[min(1, len(devices) - 1)])
  return dataclasses.replace(config, cost=Roofline(chip, link, shared_host=devices[0].platform == 'cpu'))


# ---------------------------------------------------------------------------- serving


def open_folder(
  workdir: str | pathlib.Path,
  config: ServingConfig | None,
  backend: str,
  *,
  resume: bool = False,
  serves: str = "the config's workload",
  more: Mapping[str, Any] | None = None,
  say: Say = lambda line: None,
) -> RunFolder:
  """The work directory of a run, which nobody else writes into until it is closed.

  Args:
    workdir: The folder.
    config: The run; None if it is not known yet.
    backend: What runs it.
    resume: Go on with the run that is there.
    serves: What it serves, in words; a workload of another kind than the config's own is not compared by its fields.
    more: What else a new run's `run.json` is to say.
    say: Told in a line where an earlier run has gone.

  Raises:
    ValueError: if the folder cannot be used, or to resume, if its run is another one; see `RunFolder`.
  """
  if config is not None and isinstance(config.workload, Given):
    config = dataclasses.replace(config, workload=None)  # its requests are known by their own answers
  about = {'backend': backend, 'serves': serves, 'config': describe(config)}
  if resume:
    return RunFolder.resume(workdir, about)
  return RunFolder.begin(workdir, about | dict(more or {}), say)


@contextlib.contextmanager
def _folder(
  workdir: Folder | None, config: ServingConfig, backend: str, resume: bool, say: Say
) -> Iterator[RunFolder | None]:
  """The work directory as a run takes it; one that was opened before stays open."""
  if workdir is None or isinstance(workdir, RunFolder):
    if resume:
      raise ValueError(f'resume goes with the folder of a run, and workdir is {workdir!r}; name one.')
    yield workdir
    return
  with contextlib.closing(open_folder(workdir, config, backend, resume=resume, say=say)) as folder:
    yield folder


def expect(answers: Answers, config: ServingConfig, opened: OpenedModel) -> None:
  """Tell answers which requests come, and in which order, as far as the workload knows before anything is answered."""
  known = arrivals_of(config.workload, config, opened).due(math.inf, ())
  answers.expect(event.request for event in known if isinstance(event, Arrived))


def arrivals_of(workload: Workload | None, config: ServingConfig, opened: OpenedModel) -> Arrivals:
  """The requests of a workload as a model serves them, each with a seed.

  Raises:
    ValueError: if there is no workload, or it does not fit the model.
  """
  if workload is None:
    raise ValueError('the config has no workload; set one, e.g. workload=Poisson(requests_per_s=1, num_requests=16).')
  model = opened.model
  encode = None if opened.tokenizer is None else opened.encode_prompt
  context = WorkloadContext(model.vocab_size, model.context_len, encode, opened.chat_end_ids)
  return Seeded(workload.arrivals(context), config.seed)


class _Serving:
  """Follows a run while it is served: its log, its answers, and in the end, however it comes, its report."""

  def __init__(
    self,
    folder: RunFolder | None,
    answers: Answers,
    report: Callable[[Sequence[Event], Sequence[str]], Report],
    notes: Sequence[str],
    watch: Watch,
    over: Callable[[], None],
    close: Callable[[], None] = lambda: None,
    settled: Mapping[str, Any] | None = None,
  ):
    self._folder = folder
    self._answers = answers
    self._make_report = report
    self._notes = notes
    self._watch = watch
    self._over = over
    self._close = close
    self._settled = settled
    self._unwritten: tuple[str, ...] = ()

  def __enter__(self) -> '_Serving':
    try:
      if self._folder is not None:
        if self._settled is not None:
          self._folder.settle(self._settled)
        if self._folder.resumed:
          self._folder.put_away()
      self._log = EventLog(None if self._folder is None else self._folder.path / EVENTS)
    except BaseException:
      self._close()
      raise
    return self

  def follow(self, events: Iterator[Event]) -> None:
    """Take notice of all that happens."""
    for event in events:
      self._log.append(event)
      self._answers.note(event)
      self._watch(event)

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
    try:
      self._over()
      self._log.close()
      if error is not None:
        self._answers.catch_up(self._log)
      self._answers.close()
    finally:
      self._close()
    self._events = tuple(self._log)
    if error is None:
      self._report = self._save(())
    elif self._folder is not None:
      try:
        self._save((_broken_off(error),))
      except Exception as failed:  # what ended the run is what is to be told
        logging.error('%s gets no report (%s: %s).', self._folder.path, type(failed).__name__, failed)

  def _save(self, notes: Sequence[str]) -> Report:
    report = self._make_report(self._events, (*notes, *self._notes, *self._answers.notes, *self._log.notes))
    if self._folder is not None:
      self._unwritten = save_report(report, self._folder.path)
    return report

  def result(self, workers: tuple[WorkerSpec, ...], model: ModelSpec) -> RunResult:
    """What came of a run that ended by itself."""
    unwritten = (*self._answers.unwritten, *self._unwritten)
    return RunResult(self._report, self._answers.completions, self._events, workers, model, unwritten)


def _answers(folder: RunFolder | None, has_text: bool) -> Answers:
  """What collects a run's answers, in its folder if it has one."""
  if folder is None:
    return Answers(has_text)
  return Answers(has_text, folder.path / ANSWERS, folder.answered, closed=folder.write_requests)


def _broken_off(error: BaseException) -> str:
  what = str(error) or 'no more is known'
  return f'The run was broken off before its end ({type(error).__name__}: {what}).'


def complete(events: Iterable[Event], has_text: bool) -> tuple[Completion, ...]:
  """What each sample of each request of a log got, in the order of arrival; as text too if there was a tokenizer."""
  answers = Answers(has_text)
  for event in events:
    answers.note(event)
  return answers.completions


# ---------------------------------------------------------------------------- reporting


def _report(
  config: ServingConfig,
  opened: OpenedModel,
  workers: tuple[WorkerSpec, ...],
  events: Sequence[Event],
  completions: Sequence[Completion],
  backend: str,
  notes: Sequence[str],
  *,
  calibrated: bool,
  environment: dict[str, Any],
  warmup_s: float | None = None,
) -> Report:
  workload = config.workload
  assert workload is not None
  return Report.from_events(
    events,
    workers=workers,
    slo=config.slo,
    notes=notes,
    config=describe(dataclasses.replace(config, workers=workers)),
    environment=_environment() | {'end_tokens': opened.end_tokens.by_source()} | environment,
    seed=getattr(workload, 'seed', config.seed),
    request_rate=math.inf if workload.request_rate is None else workload.request_rate,
    burstiness=workload.burstiness,
    max_concurrency=workload.max_concurrency,
    model_id=opened.model.name,
    tokenizer_id=None if opened.tokenizer is None else config.checkpoint,
    backend=backend,
    warmup_s=warmup_s,
    calibrated=calibrated,
    generated_texts={one.request.id: one.text for one in completions if one.text is not None},
  )


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
