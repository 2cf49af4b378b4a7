"""Users of a session: each submits, reads delta by delta in a thread or in asyncio, cancels or goes on with a chat."""

import asyncio
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence

from experiments.soaking.requests import Visit
from pdjax.session import Delta, RequestError, Session, SessionError, Stream
from pdjax.types import Completion


@dataclasses.dataclass(eq=False)
class Reading:
  """A stream as a user sees it.

  Attributes:
    visit: The user's visit.
    stream: The stream.
    deltas: Deltas that came, in order.
    completions: The completion of each sample, once all have ended.
    cancelled: The kind of fault as which the user has cancelled, if they have.
    raised: The error that the stream raised in the end, if any.
    over: Whether the user is done with it.
  """

  visit: Visit
  stream: Stream
  deltas: list[Delta] = dataclasses.field(default_factory=list)
  completions: tuple[Completion, ...] = ()
  cancelled: str | None = None
  raised: Exception | None = None
  over: bool = False

  def maybe_cancel(self) -> None:
    """Cancel if it is time to."""
    if self.visit.cancels_after is not None and len(self.deltas) >= self.visit.cancels_after:
      self.cancel('cancels')

  def cancel(self, kind: str) -> None:
    """From any thread: want no more."""
    if self.cancelled is None:
      self.cancelled = kind
      self.stream.cancel()

  def take(self, delta: Delta) -> None:
    """Read a delta."""
    self.deltas.append(delta)
    self.maybe_cancel()

  def end(self, raised: Exception | None) -> None:
    """The stream has ended."""
    self.raised = raised
    if not isinstance(raised, SessionError):
      self.completions = self.stream.results(0.0)
    self.over = True

  @property
  def next_visit(self) -> Visit | None:
    """The next visit of the user, if there is one."""
    if self.cancelled or len(self.completions) != 1:
      return None
    return self.visit.next_turn(self.completions[0])


class Readers:
  """All users of one wave.

  Attributes:
    readings: A reading of each stream; the list grows while they read.
    errors: Errors of the readers themselves.
  """

  def __init__(self, session: Session, visits: Sequence[Visit], going_on: Callable[[], None]):
    """Let them come, in threads of their own; `going_on` is called with every delta and every end."""
    self.readings: list[Reading] = []
    self.errors: list[BaseException] = []
    self._session = session
    self._going_on = going_on
    waiting = [visit for visit in visits if visit.in_asyncio]
    jobs: list[Callable[[], None]] = [functools.partial(self._read, visit) for visit in visits if not visit.in_asyncio]
    if waiting:
      jobs.append(lambda: asyncio.run(self._read_all(waiting)))
    self._threads = [threading.Thread(target=self._run, args=(job,), name='soak-reader', daemon=True) for job in jobs]
    for thread in self._threads:
      thread.start()

  def join(self) -> None:
    """Wait until all have seen the end."""
    for thread in self._threads:
      thread.join()

  def _run(self, job: Callable[[], None]) -> None:
    try:
      job()
    except BaseException as error:  # such as of whoever comes when the session has broken down
      self.errors.append(error)

  def _begin(self, visit: Visit) -> Reading:
    reading = Reading(visit, self._session.submit(visit.request))
    self.readings.append(reading)
    reading.maybe_cancel()
    return reading

  def _end(self, reading: Reading, raised: Exception | None) -> Visit | None:
    reading.end(raised)
    self._going_on()
    return reading.next_visit

  def _read(self, visit: Visit | None) -> None:
    while visit is not None:
      time.sleep(visit.after_s)
      reading = self._begin(visit)
      raised: Exception | None = None
      try:
        for delta in reading.stream:
          reading.take(delta)
          self._going_on()
      except (RequestError, SessionError) as error:
        raised = error
      visit = self._end(reading, raised)

  async def _read_all(self, visits: Sequence[Visit]) -> None:
    await asyncio.gather(*map(self._read_in_asyncio, visits))

  async def _read_in_asyncio(self, visit: Visit | None) -> None:
    while visit is not None:
      await asyncio.sleep(visit.after_s)
      reading = self._begin(visit)
      raised: Exception | None = None
      try:
        async for delta in reading.stream:
          reading.take(delta)
          self._going_on()
      except (RequestError, SessionError) as error:
        raised = error
      visit = self._end(reading, raised)
