"""Session after session, wave after wave: requests are served while everything fails, and each answer is looked at."""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import random
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from experiments.faults.full_disk import can_fill_disk, fill_disk
from experiments.faults.hostile import Hostile
from experiments.faults.kinds import KINDS, TOO_LATE, Dice
from experiments.faults.leaks import engine_leaks, leaks
from experiments.soaking.answers import Answers
from experiments.soaking.clusters import DEADLINE_S, FEW_PAGES, Alone, FaultyCluster, Watched
from experiments.soaking.logs import judge_log
from experiments.soaking.readers import Readers, Reading
from experiments.soaking.requests import Wish, cut_short, draw_visits, draw_wish
from experiments.soaking.resources import Resources
from experiments.soaking.settings import Setting, draw_setting
from experiments.soaking.verdicts import Problem, judge, judge_after_the_end
from pdjax.serving import ClusterState, ClusterView
from pdjax.serving.orders import AbandonOrder, Order
from pdjax.session import Session, SessionError

_WISHES = 96  # known at one time
_NEW_WISHES = 12  # of each session
_WAVES = 3  # of each session
_STORM = 0.15  # share of waves
_FULL = 0.3  # share of sessions with small pools
_MOST_TOLD = 30  # problems of a kind that are told in full


@dataclasses.dataclass
class Tally:
  """The tally of a soak so far.

  Attributes:
    sessions: Sessions begun.
    requests: Streams that ended.
    tokens: Tokens delivered.
    ends: Samples by finish reason.
    faults: Faults that acted, by kind.
    late: Transfers that were late although nobody made them so, as on a machine that is busy.
    counts: Problems, by kind.
    problems: The first of each kind, in full.
  """

  sessions: int = 0
  requests: int = 0
  tokens: int = 0
  ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  late: int = 0
  counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  problems: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  @property
  def well(self) -> bool:
    """Whether nothing was wrong."""
    return not self.counts


@dataclasses.dataclass
class _Now:
  """The session that is going on."""

  name: str
  cluster: FaultyCluster
  setting: Setting
  dice: Dice
  deployment: Watched
  hostile: Hostile
  session: Session
  small: str | None  # the kind of fault by which pools are small
  was_full: bool = False  # such a pool
  late: int = 0
  wave: int = 0
  readers: Readers | None = None

  @property
  def where(self) -> str:
    return f'in {self.name}, wave {self.wave}'

  @property
  def state(self) -> ClusterState | None:
    return self.deployment.states[-1] if self.deployment.states else None


class Soak:
  """Serves for as long as it is asked to.

  Attributes:
    tally: The tally so far.
    injected: Faults that acted in the session that is served, by kind; they count in the tally when it is over.
    moved_s: The last time at which anything happened, by `time.monotonic`.
  """

  def __init__(
    self,
    clusters: Sequence[FaultyCluster],
    alone: Alone,
    seed: int,
    kinds: Collection[str] = tuple(KINDS),
    say: Callable[[str], None] = lambda line: None,
    quiet_s: float = 10.0,
  ):
    """Begin with nothing served.

    Args:
      clusters: Clusters that serve, one session after another.
      alone: The cluster that answers undisturbed.
      seed: Of all that is drawn.
      kinds: Names of the faults that are wanted.
      say: Called with a line on each problem, as soon as it is found.
      quiet_s: Seconds after the last end by which everything must be free.
    """
    self.tally = Tally()
    self.injected: collections.Counter[str] = collections.Counter()
    self.moved_s = time.monotonic()
    self._clusters = clusters
    self._answers = Answers(alone, going_on=self._going_on)
    self._seed = seed
    self._kinds = [kind for kind in kinds if kind != 'log_full' or can_fill_disk()]
    self._say = say
    self._quiet_s = quiet_s
    self._wishes: collections.deque[Wish] = collections.deque(maxlen=_WISHES)
    self._resources = Resources(settled=len(clusters))
    self._now: _Now | None = None

  def run(self, until: Callable[[], bool]) -> None:
    """Serve one session after another until this is true, which is asked between two waves."""
    while not until():
      self._serve_session(until)
      where = f'before session {self.tally.sessions}'
      self._wrong(where, [Problem('leak', one) for one in self._resources.grown(self._quiet_s)])

  # -------------------------------------------------------------------------- sessions

  def _serve_session(self, until: Callable[[], bool]) -> None:
    number, self.tally.sessions = self.tally.sessions, self.tally.sessions + 1
    rng = random.Random(f'{self._seed}/{number}')
    cluster = self._clusters[number % len(self._clusters)]
    setting, share = draw_setting(rng)
    self._renew_wishes(rng)
    injected = self.injected = collections.Counter()
    before = set(threading.enumerate())
    readings: list[Reading] = []
    name = f'session {number} ({cluster.name}, {setting.name}, share {share:g})'
    with tempfile.TemporaryDirectory() as folder, cluster.fresh() as engine:
      dice = Dice(random.Random(f'{self._seed}/{number}/faults'), share, self._kinds, injected)
      hostile = Hostile(engine, dice, random.Random(f'{self._seed}/{number}/workers'), late_s=1.5 * DEADLINE_S)
      pools = [kind for kind in FEW_PAGES if kind in self._kinds]
      small = rng.choice(pools) if pools and rng.random() < _FULL else None
      deployment = cluster.deployed(hostile, FEW_PAGES[small] if small else {}, faults=setting.faults)
      logs, keeps = rng.random() < 0.5, rng.random() < 0.5
      session = Session(deployment, workdir=folder if logs else None, keep_events=keeps)
      self._now = now = _Now(name, cluster, setting, dice, deployment, hostile, session, small)
      hostile.submitting, hostile.withdraw = functools.partial(self._look, now), functools.partial(self._withdraw, now)
      fills_in = rng.randrange(_WAVES) if logs and 'log_full' in self._kinds and rng.random() < 0.5 else None
      try:
        session.start()
        for now.wave in range(_WAVES):
          seen = self._serve_wave(now, rng, injected, folder if now.wave == fills_in else None)
          readings += seen
          self._judge(now, seen, injected)
          if self._broke_down(now) or not self._is_quiet(now) or until():
            break
        self._going_on()
        session.close()
      except SessionError as error:
        self._wrong(now.where, [Problem('breakdown', str(error))])
      finally:
        with contextlib.suppress(SessionError):
          session.close(cancel=True)
      if session._open:
        self._wrong(now.where, [Problem('leak', f'the session still has {", ".join(session._open)}.')])
      if logs:
        self._judge_log(now, pathlib.Path(folder), keeps, was_filled=fills_in is not None and fills_in <= now.wave)
    for reading in readings:
      self._wrong(now.where, judge_after_the_end(reading))
    left = [one.name for one in set(threading.enumerate()) - before if one.name.startswith('pdjax')]
    if left:
      self._wrong(now.where, [Problem('leak', f'the threads {", ".join(left)} are left.')])
    self.tally.faults += injected
    self.tally.late += now.late
    self._now = None

  def _renew_wishes(self, rng: random.Random) -> None:
    """Draw new wishes, a third of them cut short by what they are answered."""
    for _ in range(_NEW_WISHES):
      wish = draw_wish(rng)
      self._wishes.append(wish)
      if rng.random() < 0.5:
        (first, *_) = wish.request('wish').samples()
        self._answers.learn([first])
        self._wishes.append(cut_short(rng, wish, self._answers.of(first)))

  def _serve_wave(
    self, now: _Now, rng: random.Random, injected: collections.Counter[str], folder_to_fill: str | None
  ) -> list[Reading]:
    """Let users come, and wait until all have seen the end."""
    storm = 'storm' in self._kinds and rng.random() < _STORM
    cancelling = (0.8 if storm else 0.2) if 'cancels' in self._kinds or storm else 0.0
    count = 60 if storm else rng.choice((6, 12, 24))
    visits = draw_visits(rng, f'{self.tally.sessions - 1}-{now.wave}', list(self._wishes), count, cancelling)
    injected['storm'] += storm
    fills_after_s = rng.uniform(0.0, 0.2)
    now.readers = readers = Readers(now.session, visits, self._going_on)
    if folder_to_fill is not None:
      time.sleep(fills_after_s)
      fill_disk(pathlib.Path(folder_to_fill))
    readers.join()
    for reading in readers.readings:
      if reading.cancelled is not None and any(one.finish_reason == 'cancelled' for one in reading.completions):
        injected[reading.cancelled] += 1
    for error in readers.errors:
      if not isinstance(error, SessionError):
        self._wrong(now.where, [Problem('breakdown', f'a reader ended with {type(error).__name__}: {error}')])
    now.readers = None
    return readers.readings

  def _broke_down(self, now: _Now) -> bool:
    """Whether the session did, which its readers were told."""
    if now.session._cause is None:
      return False
    cause = now.session._cause
    self._wrong(now.where, [Problem('breakdown', f'the session broke down: {type(cause).__name__}: {cause}')])
    return True

  # -------------------------------------------------------------------------- what is looked at

  def _judge(self, now: _Now, readings: Sequence[Reading], injected: collections.Counter[str]) -> None:
    self._answers.learn(reading.visit.request for reading in readings)

    def may_fail(error: str) -> bool:
      return now.setting.allows(error, injected, late=now.late > 0)

    for reading in readings:
      self.tally.requests += 1
      self.tally.tokens += sum(len(delta.tokens) for delta in reading.deltas)
      self.tally.ends.update(one.finish_reason for one in reading.completions)
      self._wrong(now.where, judge(reading, self._answers, may_fail))

  def _judge_log(self, now: _Now, folder: pathlib.Path, keeps: bool, was_filled: bool) -> None:
    """Look at the log of a session that is closed."""
    notes = list(now.session._log.notes)
    now.dice.counts['log_full'] += bool(notes)
    self._wrong(now.where, judge_log(folder, now.session.events if keeps else None, notes, was_filled))
    if keeps and not set(notes) <= set(json.loads((folder / 'report.json').read_text(encoding='utf-8'))['notes']):
      self._wrong(now.where, [Problem('log', f'the report does not say: {" ".join(notes)}')])

  def _is_quiet(self, now: _Now) -> bool:
    """Whether all is free soon after the last end."""
    deadline_s = time.monotonic() + self._quiet_s
    while True:
      found = self._held(now)
      if not found:
        return True
      if time.monotonic() >= deadline_s:
        self._wrong(now.where, [Problem('leak', one) for one in found])
        return False
      time.sleep(0.005)

  def _held(self, now: _Now) -> list[str]:
    """Everything that is not free, in sentences, with the loop going on meanwhile."""
    if now.state is None:
      return ['the session has not begun.']
    try:
      away = [f'worker {name} is not back.' for name, worker in now.state.workers.items() if not worker.up]
      return [*away, *leaks(now.state), *engine_leaks(now.hostile.engine)]
    except RuntimeError as error:  # a dict that grew as it was walked
      return [f'the books change: {error}.']

  def _wrong(self, where: str, problems: Sequence[Problem]) -> None:
    for problem in problems:
      self.tally.counts[problem.kind] += problem.count
      told = self.tally.problems.setdefault(problem.kind, [])
      if len(told) < _MOST_TOLD:
        told.append(f'{problem.kind.upper()} {where}, seed {self._seed}: {problem.what}')
        self._say(told[-1])

  # -------------------------------------------------------------------------- on the session's thread

  def _look(self, now: _Now, orders: Sequence[Order]) -> None:
    """Count what only the books tell: small pools that are full, and transfers that nobody made late."""
    state = now.state
    assert state is not None
    for order in orders:
      if isinstance(order, AbandonOrder) and order.transfer not in now.hostile.made_late:
        attempt = state.books.transfers.get(order.transfer)
        if attempt is not None and TOO_LATE[0] in attempt.error:
          now.late += 1
          if self.tally.late + now.late <= _MOST_TOLD:
            self._say(f'late by itself {now.where}, seed {self._seed}: try {attempt.number} at {attempt.order!r:.200}')
    if now.small is not None and not now.was_full and _is_full(state.view):
      now.was_full = True
      now.dice.count(now.small)

  def _withdraw(self, now: _Now, sample: str) -> None:
    """Have whoever asked for a sample want no more of it."""
    for reading in list(now.readers.readings) if now.readers is not None else ():
      if sample in [one.id for one in reading.visit.request.samples()]:
        reading.cancel('cancels_in_hand_off')

  # -------------------------------------------------------------------------- for whoever watches

  def _going_on(self) -> None:
    self.moved_s = time.monotonic()

  @property
  def where(self) -> str:
    """The session that is being served, in words."""
    return 'between two sessions' if self._now is None else self._now.name

  def describe_open(self) -> str:
    """Everything that is not over, in lines."""
    return '\n'.join(self._open_lines())

  def _open_lines(self) -> Iterator[str]:
    now = self._now
    yield f'{self.where}, seed {self._seed}:'
    if now is None:
      return
    for reading in list(now.readers.readings) if now.readers is not None else ():
      if not reading.over:
        tokens = sum(len(delta.tokens) for delta in reading.deltas)
        yield f'  {reading.visit.name} has {tokens} tokens{", was cancelled" if reading.cancelled else ""}.'
    if now.state is not None:
      for name, entry in list(now.state.books.requests.items()):
        yield f'  {name} is {entry.phase.value}, begun {entry.attempts} times; {entry.transfers} transfers.'
      for order in list(now.state.books.in_flight.values()):
        yield f'  under way: {order!r:.300}'
    for one in self._held(now):
      yield f'  {one}'


def _is_full(view: ClusterView) -> bool:
  """Whether somebody waits for pages that no worker has free."""
  room = view.room()
  sides = (view.waiting, view.prefill_workers, False), (view.prefilled, view.decode_workers, True)
  return any(
    all(view.pages_needed(name, worker.name, decodes=decodes) > room.pages(worker.name) for worker in workers)
    for queue, workers, decodes in sides
    for name in queue
  )
