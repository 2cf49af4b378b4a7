"""The loop: events come in, a policy answers with actions, a backend carries them out. Read this first."""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from pdjax.serving.messages import Action, Arrived, Event, Finished, Order, Started, Turn, Withdrawn
from pdjax.serving.state import ClusterState


class Arrivals(Protocol):
  """Where requests come from: a trace, a random source, a chat that answers, a queue that a person feeds."""

  @property
  def closed(self) -> bool:
    """Whether no request can come any more."""

  def next_s(self) -> float:
    """When the next known request comes; infinity if none is known."""

  def due(self, now_s: float, finished: Sequence[Finished]) -> Sequence[Arrived | Withdrawn]:
    """What came up to `now_s`, given the requests that ended this turn.

    It is asked again after each answer of the policy: a request withdrawn meanwhile may be named at once.
    """

  def output_len(self, request_id: str) -> int | None:
    """How many tokens a request really generates, where a trace says so: for backends, never for policies."""


class Policy(Protocol):
  """What to do next: a pure function of the state.

  A policy that never sends KV may say so with a class attribute `moves_kv = False`; then no ways between workers
  are prepared.
  """

  def decide(self, state: ClusterState) -> Sequence[Action]:
    """What to do now, in order; it is asked again, with that done, until it answers with nothing."""


class Backend(Protocol):
  """What carries orders out: the engine on devices, or the simulator.

  Every order ends once, with `Done` or `Failed`, or with `WorkerLost` of a worker that it names; what is told of it
  after that counts for nothing. An `AbandonOrder` ends well whatever its transfer does, and soon. Once a transfer is
  over, in any of these ways, none of its pages is read or written for it any more.
  """

  def submit(self, orders: Sequence[Order]) -> None:
    """Begin the orders that one action became: a pass comes together with the transfers that leave with it.

    Never raises and never waits; what goes wrong comes back as an event.
    """

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    """Wait until something happened or `until_s` has come; the time now, and all that ended up to it, in order."""


def serve(arrivals: Arrivals, policy: Policy, backend: Backend, state: ClusterState) -> Iterator[Event]:
  """Serve requests until none can come and none is left; yield all that happens, in order.

  The clock is read once a turn; the policy is asked until it wants nothing more. Before it, a turn does what must be
  done: refuse what can never run, end what was withdrawn, give up or try again what failed.

  Raises:
    PolicyError: if an action cannot be done.
    StuckError: if requests wait for what can never come.
  """
  while not arrivals.closed or state.unfinished:
    next_s = min(arrivals.next_s(), state.next_timer_s)
    if math.isinf(next_s):
      state.check_progress()
    now_s, events = backend.wait(next_s)
    yield Turn(now_s)
    for event in events:
      if state.apply(event, now_s):  # what comes too late, or twice, counts for nothing and is in no log
        yield event
    for event in state.timers_due(now_s):  # what has ended by now is not late
      if state.apply(event, now_s):
        yield event
    finished = state.take_finished()
    yield from finished
    for event in arrivals.due(now_s, finished):
      state.apply(event, now_s)
      yield event
    while actions := state.must() or policy.decide(state):
      for action in actions:
        orders = state.start(action)
        backend.submit(orders)
        for order in orders:
          yield Started(now_s, order)
      for event in arrivals.due(now_s, ()):  # whoever is withdrawn by now is not served on
        state.apply(event, now_s)
        yield event
    if occupancy := state.take_occupancy(now_s):
      yield occupancy
