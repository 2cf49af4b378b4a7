"""The loop and its bookkeeping."""

from pdjax.serving.actions import ALL, Action, Cancel, Chunk, Reject, Step, Transfer
from pdjax.serving.checks import PolicyError
from pdjax.serving.events import Event
from pdjax.serving.loop import Arrivals, Backend, Policy, serve
from pdjax.serving.orders import Order
from pdjax.serving.place import WorkerState
from pdjax.serving.requests import Phase, RequestState
from pdjax.serving.state import ClusterState, StuckError
from pdjax.serving.view import ClusterView, Room

__all__ = [
  'ALL', 'Action', 'Arrivals', 'Backend', 'Cancel', 'Chunk', 'ClusterState', 'ClusterView', 'Event', 'Order', 'Phase',
  'Policy', 'PolicyError', 'Reject', 'RequestState', 'Room', 'Step', 'StuckError', 'Transfer', 'WorkerState', 'serve',
]  # fmt: skip
