"""The loop: events come in, a policy answers with actions, a backend carries them out. Read this first."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from pdjax.serving.actions import Action, WakeAt
from pdjax.serving.checks import ask, check_idle, check_policy
from pdjax.serving.events import Arrived, Event, Finished, Started, Turn, Withdrawn
from pdjax.serving.orders import Order
from pdjax.serving.state import ClusterState
from pdjax.serving.view import ClusterView
from pdjax.serving.waits import tell_of_long_wait


class Arrivals(Protocol):
  """The source of requests: a trace, a random process, a chat that answers, a queue that a person feeds."""

  @property
  def closed(self) -> bool:
    """Whether no request can come any more."""

  def next_s(self) -> float:
    """The time of the next known request; infinity if none is known."""

  def due(self, now_s: float, finished: Sequence[Finished]) -> Sequence[Arrived | Withdrawn]:
    """The arrivals and withdrawals up to `now_s`, given the requests that ended this turn.

    It is asked again after each answer of the policy: a request withdrawn meanwhile may be named at once.
    """

  def output_len(self, request_id: str) -> int | None:
    """The number of tokens a request really generates, where a trace says so: orders say it, policies never see it."""


class Policy(Protocol):
  """The rule that chooses what is done next, a pure function of the view.

  A policy that never sends KV may say so with a class attribute `moves_kv = False`; then no ways between workers
  are prepared. One that sends it between any two places says `moves_anywhere = True`. One that has a method
  `waiting_key(request) -> tuple` finds `view.waiting` in the order of that key, which is asked for once a request:
  ageing that is linear in the arrival is such a key.
  """

  def decide(self, view: ClusterView) -> Iterable[Action]:
    """The actions to start now, in order; it is asked again, with these started, until it wants nothing but `WakeAt`.

    It is asked where something may change its answer: at arrivals, at the end or failure of an order, where a sequence
    of a standing step ends or lacks a page, and when its `WakeAt` is due; never at a standing step between these.

    It may `yield` its actions; all are taken before the first is done.
    """


class Backend(Protocol):
  """The side that carries orders out: the engine on devices, or the simulator.

  Every order ends once, with `Done` or `Failed`, or with `WorkerLost` of a worker that it names; later news of it
  counts for nothing. An `AbandonOrder` ends well whatever its transfer does, and soon. Once a transfer is
  over, in any of these ways, none of its pages is read or written for it any more. A standing step tells of its steps
  one by one, the last with `to_come` 0; a backend with a method `leap`, see `Simulator.leap`, may tell several at once.
  """

  def submit(self, orders: Sequence[Order]) -> None:
    """Begin the orders that one action became: a step comes together with the transfers that leave with it.

    Never raises and never waits; what goes wrong comes back as an event.
    """

  def wait(self, until_s: float) -> tuple[float, Sequence[Event]]:
    """Wait until something happened or `until_s` has come; the time now, and all that ended up to it, in order."""


def serve(
  arrivals: Arrivals, policy: Policy, backend: Backend, state: ClusterState, *, waits: bool = True
) -> Iterator[Event]:
  """Serve requests until none can come and none is left; yield all that happens, in order.

  The clock is read once a turn; the policy is asked until it wants nothing more. Before it, a turn does what must be
  done: refuse what can never run, end what was withdrawn, give up or try again what failed. `Delivered`, what requests
  really got of a step, comes right behind its `Done`, and a request's end right behind what ended it.

  Args:
    arrivals: The source of the requests.
    policy: Decides.
    backend: Carries orders out.
    state: The cluster, with nothing begun.
    waits: Whether somebody waits while its clock runs, and is told where the next request is long in coming.

  Raises:
    PolicyError: if `policy` has no `decide` that takes a view, an action cannot be done, an answer is no sequence of
      actions, or answers start nothing without end.
    StuckError: if requests wait for what can never come.
  """
  check_policy(policy)
  state.expect(arrivals.output_len)
  state.catch_up_with(backend)
  state.order_waiting(policy)
  now_s, longest_s = 0.0, 0.0 if waits else math.inf  # of the waits that were told
  while not arrivals.closed or state.unfinished:
    arrives_s = arrivals.next_s()
    next_s = min(arrives_s, state.next_timer_s)
    if math.isinf(arrives_s) and state.check_progress():
      next_s = now_s
    if not state.unfinished and longest_s < arrives_s - now_s < math.inf and tell_of_long_wait(now_s, arrives_s):
      longest_s = arrives_s - now_s
    now_s, events = backend.wait(next_s)
    yield Turn(now_s)
    finished = [*state.take_finished()]  # whom the turn before ended by what it started
    yield from finished
    yield from _happened(events, now_s, state, finished)
    yield from _happened(state.timers_due(now_s), now_s, state, finished)  # what has ended by now is not late
    came = arrivals.due(now_s, finished)
    for event in came:
      state.apply(event, now_s)
      yield event
    num_idle = 0
    asks = state.take_wakes() or bool(came)
    while actions := state.must() or (ask(policy, state.view) if asks else []):
      asks = True
      num_started = 0
      for action in actions:
        orders = state.start(action)
        yield from state.take_told()
        backend.submit(orders)
        num_started += len(orders)
        for order in orders:
          yield Started(now_s, order)
      came = arrivals.due(now_s, ())
      for event in came:  # whoever is withdrawn by now is not served on
        state.apply(event, now_s)
        yield event
      if not num_started and not came and all(isinstance(action, WakeAt) for action in actions):
        break  # it wants nothing more until then
      num_idle += not num_started
      check_idle(policy, num_idle, actions)
    yield from state.take_told()  # of what it looked at
    if occupancy := state.take_occupancy(now_s):
      yield occupancy


def _happened(events: Sequence[Event], now_s: float, state: ClusterState, finished: list[Finished]) -> Iterator[Event]:
  """Apply events; those that count, each with what it delivered and ended behind it; ends go to `finished` too."""
  for event in events:
    if state.apply(event, now_s):  # what comes too late, or twice, counts for nothing and is in no log
      yield event
    yield from state.take_told()
    if ended := state.take_finished():
      finished += ended
      yield from ended
