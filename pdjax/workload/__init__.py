"""The requests of a run and their times: synthetic arrivals and lengths, mixes and phases, traces, files, chats."""

from pdjax.workload.arrivals import Chat, Chats, ChatTurn, ClosedLoop, Listed
from pdjax.workload.lengths import Empirical, Fixed, Length, Lognormal, Uniform
from pdjax.workload.live import Live
from pdjax.workload.mix import Mix, Share
from pdjax.workload.phases import Phase, Phases
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
from pdjax.workload.tokens import BlockTokens, RandomTokens
from pdjax.workload.trace_workload import TraceWorkload
from pdjax.workload.traces import Trace, TraceFormat, read_trace
from pdjax.workload.workload import Given, Submitted, Workload, WorkloadContext

__all__ = [
  'BlockTokens', 'Bursty', 'Chat', 'ChatTurn', 'Chats', 'ClosedLoop', 'ClosedLoopWorkload', 'Constant', 'Empirical',
  'Fixed', 'Given', 'Length', 'Listed', 'Live', 'Lognormal', 'Mix', 'MultiTurn', 'Phase', 'Phases', 'Poisson',
  'RandomTokens', 'Refused', 'Row', 'Seeded', 'Share', 'Submitted', 'Trace', 'TraceFormat', 'TraceWorkload',
  'Uniform', 'Workload', 'WorkloadContext', 'completion_row', 'outcomes', 'read_requests', 'read_rows', 'read_trace',
  'write_completions',
]  # fmt: skip
