"""A run recorded while it is served: its log, its answers, and in the end, however it comes, its report."""

import dataclasses
from collections.abc import Callable, Sequence

from absl import logging

from pdjax.answers import Answers
from pdjax.deployment import Deployment
from pdjax.metrics import Report, RunLog
from pdjax.metrics.run_log import MOST_KEPT, LogName
from pdjax.reporting import save_report
from pdjax.run_folder import EVENTS, RunFolder
from pdjax.serving.events import Event
from pdjax.serving.loop import Arrivals
from pdjax.types.model import ModelSpec
from pdjax.types.request import Completion
from pdjax.types.worker import WorkerSpec

Watch = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class RunResult:
  """The outcome of a run.

  Attributes:
    report: Every figure; print it, or read its fields.
    completions: The completion of each request, in the order of arrival; of 20,000 or more each is made as it is read.
    events: The log that the report was computed from; empty if it was not kept in memory (`keep_events`), and then
      `events.jsonl` has it.
    workers: The cluster as it ran, `num_pages` filled in.
    model: The model as it was served.
    unwritten: The parts of answers and report that could not be written into the work directory, and why, in sentences.
  """

  report: Report
  completions: Sequence[Completion]
  events: tuple[Event, ...]
  workers: tuple[WorkerSpec, ...]
  model: ModelSpec
  unwritten: tuple[str, ...] = ()


class Recording:
  """Records a run while it is served: its log, its answers, and in the end, however it comes, its report."""

  def __init__(
    self,
    deployment: Deployment,
    folder: RunFolder | None,
    answers: Answers,
    notes: Sequence[str],
    watch: Watch,
    over: Callable[[], None],
    log: LogName = 'full',
    keep_events: bool | None = None,
  ):
    self._deployment = deployment
    self._folder = folder
    self._answers = answers
    self._notes = notes
    self._watch = watch
    self._over = over
    self._log_name = log
    self._keep_events = keep_events
    self._unwritten: tuple[str, ...] = ()

  def __enter__(self) -> 'Recording':
    try:
      if self._folder is not None:
        if not self._deployment.is_simulated:
          self._folder.settle({'dtype': self._deployment.built.dtype})
        if self._folder.resumed:
          self._folder.put_away()
      path = None if self._folder is None or self._log_name != 'full' else self._folder.path / EVENTS
      workload = self._deployment.config.workload
      self._log = RunLog(path, self._keep_events, None if workload is None else workload.num_requests)
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
        self._catch_up()
      self._answers.close()
    finally:
      self._deployment.close()
    if error is None:
      self._report = self._save(())
    elif self._folder is not None and self._log_name != 'off':
      try:
        self._save((_broken_off(error),))
      except Exception as failed:  # what ended the run is what is to be told
        logging.error('%s gets no report (%s: %s).', self._folder.path, type(failed).__name__, failed)

  def _catch_up(self) -> None:
    """Have the answers that an exception left out as it came in the middle of noting them."""
    if self._log.keeps_events:
      self._answers.catch_up(self._log.events)
    elif self._log.last is not None:
      self._answers.note_again(self._log.last)

  def _save(self, notes: Sequence[str]) -> Report:
    notes = (*notes, *self._notes, *self._answers.notes, *self._log.notes)
    completions = self._answers.completions if self._answers.has_text else ()
    report = self._deployment.report(self._log.timeline(), completions, notes)
    if self._folder is not None and self._log_name != 'off':
      self._unwritten = save_report(report, self._folder.path)
    return report

  def result(self) -> RunResult:
    """The outcome of a run that ended by itself."""
    answers, built = self._answers, self._deployment.built
    unwritten = (*answers.unwritten, *self._unwritten)
    model = self._deployment.opened.model
    completions: Sequence[Completion] = answers.completions
    if len(completions) < MOST_KEPT:
      completions = tuple(completions)
    return RunResult(self._report, completions, self._log.events, built.workers, model, unwritten)


def _broken_off(error: BaseException) -> str:
  what = str(error) or 'no more is known'
  return f'The run was broken off before its end ({type(error).__name__}: {what}).'
