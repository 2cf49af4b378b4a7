"""The loop and its bookkeeping."""

from pdjax.serving.actions import ALL, STANDING, Action, Cancel, Chunk, Preempt, Reject, Step, Transfer, WakeAt
from pdjax.serving.checks import PolicyError
from pdjax.serving.events import Event
from pdjax.serving.loop import Arrivals, Backend, Policy, serve
from pdjax.serving.orders import Order
from pdjax.serving.state import ClusterState, StuckError
from pdjax.serving.view import ClusterView, Phase, RequestView, Room, WorkerView

__all__ = [
  'ALL', 'STANDING', 'Action', 'Arrivals', 'Backend', 'Cancel', 'Chunk', 'ClusterState', 'ClusterView', 'Event',
  'Order', 'Phase', 'Policy', 'PolicyError', 'Preempt', 'Reject', 'RequestView', 'Room', 'Step', 'StuckError',
  'Transfer', 'WakeAt', 'WorkerView', 'serve',
]  # fmt: skip
