"""The loop and its bookkeeping."""

from pdjax.serving.actions import (
  ALL,
  STANDING,
  Action,
  Cancel,
  Chunk,
  Preempt,
  Reject,
  Step,
  SwitchRole,
  Transfer,
  WakeAt,
)
from pdjax.serving.checks import PolicyError
from pdjax.serving.events import Event
from pdjax.serving.loop import Arrivals, Backend, Policy, serve
from pdjax.serving.orders import Order
from pdjax.serving.progress import StuckError
from pdjax.serving.state import ClusterState
from pdjax.serving.view import ClusterView, Phase, RequestView, Room, WorkerView

__all__ = [
  'ALL', 'STANDING', 'Action', 'Arrivals', 'Backend', 'Cancel', 'Chunk', 'ClusterState', 'ClusterView', 'Event',
  'Order', 'Phase', 'Policy', 'PolicyError', 'Preempt', 'Reject', 'RequestView', 'Room', 'Step', 'StuckError',
  'SwitchRole', 'Transfer', 'WakeAt', 'WorkerView', 'serve',
]  # fmt: skip
