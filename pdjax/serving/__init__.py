"""The loop and its bookkeeping."""

from pdjax.serving.checks import PolicyError
from pdjax.serving.loop import Arrivals, Backend, Policy, serve
from pdjax.serving.messages import ALL, Action, Cancel, Chunk, Event, Order, Reject, Step, Transfer
from pdjax.serving.state import ClusterState, StuckError
from pdjax.serving.view import ClusterView, Phase, RequestState, Room, WorkerState

__all__ = [
  'ALL', 'Action', 'Arrivals', 'Backend', 'Cancel', 'Chunk', 'ClusterState', 'ClusterView', 'Event', 'Order', 'Phase',
  'Policy', 'PolicyError', 'Reject', 'RequestState', 'Room', 'Step', 'StuckError', 'Transfer', 'WorkerState', 'serve',
]  # fmt: skip
