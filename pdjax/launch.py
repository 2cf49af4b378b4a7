"""Run a config on the engine or the simulator: deploy it, serve, report. `generate` answers a list of prompts."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from absl import logging

from pdjax.answers import Answers
from pdjax.config import ServingConfig
from pdjax.deployment import BackendName, Deployment, Say, calibrated, choose_config, deploy
from pdjax.metrics import EventLog, Report
from pdjax.opened_model import OpenedModel, Prompt, open_model
from pdjax.reporting import save_report
from pdjax.run_folder import ANSWERS, EVENTS, RunFolder, open_folder
from pdjax.serving.events import Event
from pdjax.serving.loop import Arrivals
from pdjax.types.checked import Seed, checks_arguments
from pdjax.types.fitting import shown
from pdjax.types.model import ModelSpec
from pdjax.types.request import Completion, SamplingParams
from pdjax.types.worker import WorkerSpec
from pdjax.workload import Given

Folder = str | pathlib.Path | RunFolder
Watch = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class RunResult:
  """The outcome of a run.

  Attributes:
    report: Every figure; print it, or read its fields.
    completions: The completion of each request, in the order of arrival.
    events: The log that the report was computed from.
    workers: The cluster as it ran, `num_pages` filled in.
    model: The model as it was served.
    unwritten: The parts of answers and report that could not be written into the work directory, and why, in sentences.
  """

  report: Report
  completions: tuple[Completion, ...]
  events: tuple[Event, ...]
  workers: tuple[WorkerSpec, ...]
  model: ModelSpec
  unwritten: tuple[str, ...] = ()


@checks_arguments()
def run(
  config: ServingConfig,
  *,
  workdir: Folder | None = None,
  resume: bool = False,
  say: Say = lambda line: None,
  watch: Watch = lambda event: None,
  opened: OpenedModel | None = None,
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
    opened: The answer of `open_model`, if it was asked before.
    notes: Sentences for the report, beside its own.
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
        answers.expect(opened.known_requests(config))
    arrivals = answers.left(opened.arrivals(config))
    if folder is not None and folder.resumed and arrivals.closed:
      folder = None  # nothing is left, and what is there is the run's
    deployment = deploy(config, opened, 'engine', say)
    with _Recording(deployment, folder, answers, notes, watch, over) as recording:
      recording.follow(arrivals)
    return recording.result()


@checks_arguments()
def simulate(
  config: ServingConfig,
  *,
  workdir: Folder | None = None,
  say: Say = lambda line: None,
  watch: Watch = lambda event: None,
  calibrate: bool = False,
  opened: OpenedModel | None = None,
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
    opened: The answer of `open_model`, if it was asked before.
    notes: Sentences for the report, beside its own.
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
    arrivals = answers.left(opened.arrivals(config))
    deployment = deploy(config, opened, 'simulator', say)
    with _Recording(deployment, folder, answers, notes, watch, over) as recording:
      recording.follow(arrivals)
    return recording.result()


@checks_arguments('prompts')
def generate(
  prompts: Sequence[Prompt],
  config: ServingConfig | None = None,
  sampling: SamplingParams | Sequence[SamplingParams] | None = None,
  *,
  checkpoint: str | None = None,
  seed: Seed | None = None,
) -> list[Completion]:
  """Answer prompts: texts and chats go through the chat template, token ids are taken as they are.

      for answer in pdjax.generate(['What do bees make?', 'Who wrote Hamlet?']):
        print(answer.text)

  Args:
    prompts: Each a text, the messages of a chat, or token ids.
    config: The config that serves them; None takes `default_config(checkpoint)`.
    sampling: For all prompts, or one for each; None takes the defaults.
    checkpoint: A model for the default config: a GGUF file, a folder with safetensors, or 'smollm2'.
    seed: The seed from which prompts whose sampling has none draw theirs; None takes the config's.

  Returns:
    A completion for each prompt, in their order; with `SamplingParams.n` above 1, that many in a row.

  Raises:
    ValueError: if a prompt cannot be served; the message says which and why.
    FileNotFoundError: if the model is not there; the message says what to install.
  """
  if isinstance(prompts, str):
    raise ValueError(f'prompts is the text {prompts[:40]!r}, expected a list of prompts; write [{prompts[:40]!r}].')
  if isinstance(prompts, bytes | Mapping | Set | type) or not hasattr(prompts, '__getitem__'):
    raise ValueError(f'prompts is {shown(prompts)}, expected a list of prompts.')
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


# ---------------------------------------------------------------------------- serving


@contextlib.contextmanager
def _folder(
  workdir: Folder | None, config: ServingConfig, backend: BackendName, resume: bool, say: Say
) -> Iterator[RunFolder | None]:
  """The work directory as a run takes it; one that was opened before stays open."""
  if workdir is None or isinstance(workdir, RunFolder):
    if resume:
      raise ValueError(f'resume goes with the folder of a run, and workdir is {workdir!r}; name one.')
    yield workdir
    return
  with contextlib.closing(open_folder(workdir, config, backend, resume=resume, say=say)) as folder:
    yield folder


class _Recording:
  """Records a run while it is served: its log, its answers, and in the end, however it comes, its report."""

  def __init__(
    self,
    deployment: Deployment,
    folder: RunFolder | None,
    answers: Answers,
    notes: Sequence[str],
    watch: Watch,
    over: Callable[[], None],
  ):
    self._deployment = deployment
    self._folder = folder
    self._answers = answers
    self._notes = notes
    self._watch = watch
    self._over = over
    self._unwritten: tuple[str, ...] = ()

  def __enter__(self) -> '_Recording':
    try:
      if self._folder is not None:
        if not self._deployment.is_simulated:
          self._folder.settle({'dtype': self._deployment.built.dtype})
        if self._folder.resumed:
          self._folder.put_away()
      self._log = EventLog(None if self._folder is None else self._folder.path / EVENTS)
    except BaseException:
      self._deployment.close()
      raise
    return self

  def follow(self, arrivals: Arrivals) -> None:
    """Serve, and take notice of all events."""
    for event in self._deployment.serve(arrivals, self._log):
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
      self._deployment.close()
    self._events = tuple(self._log)
    if error is None:
      self._report = self._save(())
    elif self._folder is not None:
      try:
        self._save((_broken_off(error),))
      except Exception as failed:  # what ended the run is what is to be told
        logging.error('%s gets no report (%s: %s).', self._folder.path, type(failed).__name__, failed)

  def _save(self, notes: Sequence[str]) -> Report:
    notes = (*notes, *self._notes, *self._answers.notes, *self._log.notes)
    report = self._deployment.report(self._events, self._answers.completions, notes)
    if self._folder is not None:
      self._unwritten = save_report(report, self._folder.path)
    return report

  def result(self) -> RunResult:
    """The outcome of a run that ended by itself."""
    answers, built = self._answers, self._deployment.built
    unwritten = (*answers.unwritten, *self._unwritten)
    model = self._deployment.opened.model
    return RunResult(self._report, answers.completions, self._events, built.workers, model, unwritten)


def _answers(folder: RunFolder | None, has_text: bool) -> Answers:
  """The collector of a run's answers, in its folder if it has one."""
  if folder is None:
    return Answers(has_text)
  return Answers(has_text, folder.path / ANSWERS, folder.answered, closed=folder.write_requests)


def _broken_off(error: BaseException) -> str:
  what = str(error) or 'no more is known'
  return f'The run was broken off before its end ({type(error).__name__}: {what}).'
