"""The requests of a run and their times: synthetic arrivals and lengths, request files, closed loops and chats."""

from pdjax.workload.arrivals import Chat, Chats, ChatTurn, ClosedLoop, Listed
from pdjax.workload.lengths import Empirical, Fixed, Length, Lognormal, Uniform
from pdjax.workload.live import Live
from pdjax.workload.requests_file import (
  Refused,
  Row,
  completion_row,
  outcomes,
  read_requests,
  read_rows,
  write_completions,
)
from pdjax.workload.seeds import Seeded
from pdjax.workload.synthetic import Bursty, ClosedLoopWorkload, Constant, MultiTurn, Poisson
from pdjax.workload.tokens import RandomTokens
from pdjax.workload.workload import Given, Submitted, Workload, WorkloadContext

__all__ = [
  'Bursty', 'Chat', 'ChatTurn', 'Chats', 'ClosedLoop', 'ClosedLoopWorkload', 'Constant', 'Empirical', 'Fixed',
  'Given', 'Length', 'Listed', 'Live', 'Lognormal', 'MultiTurn', 'Poisson', 'RandomTokens', 'Refused', 'Row', 'Seeded',
  'Submitted', 'Uniform', 'Workload', 'WorkloadContext', 'completion_row', 'outcomes', 'read_requests', 'read_rows',
  'write_completions',
]  # fmt: skip
