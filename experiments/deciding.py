"""Seconds of one decision of a policy, beside many requests that wait and many that decode."""

import dataclasses
import statistics
import time

from experiments.host_turns import NullBackend
from pdjax.cost import Roofline
from pdjax.policies import Disaggregated
from pdjax.serving import ClusterState, serve
from pdjax.serving.actions import Step
from pdjax.serving.events import Arrived
from pdjax.types import SLO, ChipSpec, ModelSpec, Request, Role, SamplingParams, decode_pool, prefill_pool
from pdjax.workload import Listed, RandomTokens

_PROMPT = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Decided:
  """The seconds of a decision.

  Attributes:
    idle_s: Median of one that starts nothing, as every worker has all the steps that it may have.
    starting_s: Median of one in which every prefill worker is given prompts.
    prompts: The number of prompts that it starts.
  """

  idle_s: float
  starting_s: float
  prompts: int


def decide_seconds(policy: Disaggregated, num_workers: int, waiting: int, running: int, repeats: int) -> Decided:
  """The seconds of decisions of a policy.

  Args:
    policy: The policy.
    num_workers: Half of them prefill, half decode; these may prefill too if the policy has a decider.
    waiting: Requests that wait.
    running: Requests that decode.
    repeats: Decisions of which the median counts.
  """
  half = num_workers // 2
  sizes = {'max_sequences': -(-running // half) + 64, 'num_pages': 200_000, 'max_chunks': 64, 'max_step_tokens': 512}
  decode = decode_pool(half, **sizes)
  if policy.decider is not None:
    decode = tuple(dataclasses.replace(one, role=Role.BOTH) for one in decode)
  workers = prefill_pool(half, **sizes) + decode
  cost = Roofline(ChipSpec.h100(), dtype_bytes=2)
  state = ClusterState(ModelSpec.smollm2_135m(), workers, 16, cost=cost)
  _let_decode(state, policy, running)
  state.order_waiting(policy)
  view, now_s = state.view, state.view.now_s
  for number in range(waiting):
    prompt = RandomTokens(_PROMPT + number % 7, 1000, number)
    request = Request(f'w{number}', prompt, SamplingParams(max_tokens=8), now_s, SLO(ttft_ms=1e7))
    state.apply(Arrived(request), now_s)
  starting_s, actions = _median(policy, view, repeats)
  prompts = sum(len(action.chunks) for action in actions if isinstance(action, Step))
  while actions := [*policy.decide(view)]:
    for action in actions:
      state.start(action)
  idle_s, _ = _median(policy, view, repeats)
  return Decided(idle_s, starting_s, prompts)


def _let_decode(state: ClusterState, policy: Disaggregated, running: int) -> None:
  """Serve until so many requests decode."""
  sampling = SamplingParams(max_tokens=4000, ignore_eos=True)
  requests = [Request(f'r{number}', RandomTokens(_PROMPT, 1000, number), sampling) for number in range(running)]
  plain = dataclasses.replace(policy, decider=None, admission=None)
  for _ in serve(Listed(requests), plain, NullBackend(), state):
    if sum(len(worker.decoding) for worker in state.view.decode_workers) == running:
      break


def _median(policy: Disaggregated, view, repeats: int) -> tuple[float, list]:
  seconds, actions = [], []
  for _ in range(repeats):
    begin = time.perf_counter()
    actions = [*policy.decide(view)]
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds), actions
