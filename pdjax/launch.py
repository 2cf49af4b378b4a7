"""Run a config on the engine or the simulator: deploy it, serve, report."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

from pdjax.answers import Answers
from pdjax.config import ServingConfig
from pdjax.deployment import BackendName, Say, calibrated, deploy
from pdjax.metrics.run_log import LogName
from pdjax.opened_model import OpenedModel, open_model
from pdjax.recording import Recording, RunResult, Watch
from pdjax.run_folder import ANSWERS, RunFolder, open_folder
from pdjax.types.checked import checks_arguments

Folder = str | pathlib.Path | RunFolder


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
  log: LogName = 'full',
  keep_events: bool | None = None,
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
    log: The part of the log that `workdir` gets: 'full' is `events.jsonl` and the files of the report (`report.json`,
      `report.html`, `trace.json`, `metrics.prom`), 'summary' the report's alone, 'off' neither of them.
      `run.json`, `answers.jsonl` and `requests.jsonl` are written all the same, and the result has a report.
    keep_events: Keep all events in memory, as `RunResult.events`. None keeps those of fewer than 20,000 requests.

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
    with Recording(deployment, folder, answers, notes, watch, over, log, keep_events) as recording:
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
  log: LogName = 'full',
  keep_events: bool | None = None,
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
    log: The part of the log that `workdir` gets, as for `run`.
    keep_events: Keep all events in memory, as for `run`.

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
    with Recording(deployment, folder, answers, notes, watch, over, log, keep_events) as recording:
      recording.follow(arrivals)
    return recording.result()


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


def _answers(folder: RunFolder | None, has_text: bool) -> Answers:
  """The collector of a run's answers, in its folder if it has one."""
  if folder is None:
    return Answers(has_text)
  return Answers(has_text, folder.path / ANSWERS, folder.answered, closed=folder.write_requests)
