"""1P1D on one device beside a colocated worker there: a few prompts one by one, then all at once.

Both have a Llama of few layers with random weights in bfloat16, and are what `pdjax.deployment.deploy` makes, with the
loop and the policies. In bfloat16 the sum of a product depends on how many rows it has, so a token may differ where two
are nearly as likely, which with random weights they often are.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.device_check.context import Context
from experiments.device_check.drawn import DrawnCheckpoint
from experiments.few_buckets import with_few_buckets
from pdjax.config import ServingConfig
from pdjax.deployment import Deployment, deploy
from pdjax.metrics import Report
from pdjax.opened_model import OpenedModel
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import Policy
from pdjax.serving.events import Finished
from pdjax.types import Request, SamplingParams, WorkerSpec, colocated_pool, decode_pool, prefill_pool
from pdjax.workload import Listed, RandomTokens

COLOCATED = 'colocated'


@dataclasses.dataclass(frozen=True)
class Served:
  """The outcome of some requests: their report, seconds of hand-offs that nothing hid, and tokens by request."""

  report: Report
  exposed_s: float | None
  tokens: dict[str, tuple[int, ...]]


def run(context: Context) -> None:
  """Deploy one after the other, each alone on the device, and compare."""
  count, prompt_len, output_len = context.sizes.served
  sizes: dict[str, Any] = {
    'devices': (0,), 'max_step_tokens': prompt_len, 'max_chunks': 1, 'max_sequences': count, 'max_fused_steps': 1,
    'num_pages': count * -(-(prompt_len + output_len) // 16) + count,
  }  # fmt: skip
  ways: dict[str, tuple[tuple[WorkerSpec, ...], Policy]] = {
    COLOCATED: (colocated_pool(1, **sizes), Colocated(token_budget=prompt_len + count)),
    '1P1D': (prefill_pool(1, **sizes) + decode_pool(1, **sizes), Disaggregated(max_prefill_tokens=prompt_len)),
  }
  alone: dict[str, list[Served]] = {}
  together: dict[str, Served] = {}
  for name, (workers, policy) in ways.items():
    deployment = _deployed(context, workers, policy)
    warm_up = deployment.built.warm_up
    assert warm_up is not None
    print(f'{name} compiled in {warm_up.compile_s:.1f} s', flush=True)
    context.figures.compiled(warm_up.compile_s)
    try:
      requests = _requests(context)
      alone[name] = [_serve(deployment, [request]) for request in [requests[0], *requests]][1:]  # the first is slow
      together[name] = _serve(deployment, requests)
    finally:
      deployment.close()
    del deployment  # and with it the weights
    _say(context, name, alone, together)
  pairs = [
    (one.tokens[key], other.tokens[key])
    for one, other in zip([*alone[COLOCATED], together[COLOCATED]], [*alone['1P1D'], together['1P1D']], strict=True)
    for key in one.tokens
  ]
  equal = sum(mine == other for one, two in pairs for mine, other in zip(one, two, strict=True))
  total = sum(len(one) for one, _ in pairs)
  context.figures.add('tokens of 1P1D equal to those of colocated', 100 * equal / total, '%')
  first = sum(one[:1] == two[:1] for one, two in pairs)
  context.figures.add('first tokens of 1P1D equal to those of colocated', 100 * first / len(pairs), '%')


def _deployed(context: Context, workers: tuple[WorkerSpec, ...], policy: Policy) -> Deployment:
  sizes = context.sizes
  count, prompt_len, output_len = sizes.served
  longest = prompt_len + output_len
  model = dataclasses.replace(sizes.model, num_layers=sizes.few_layers, context_len=longest)
  config = ServingConfig(
    checkpoint='random',
    model=model,
    workers=with_few_buckets(workers, sorted({1, count})),
    policy=policy,
    dtype='bfloat16',
    platform=context.platform,
    compilation_cache=context.cache,
  )
  return deploy(config, OpenedModel(model, DrawnCheckpoint(model)))


def _requests(context: Context) -> list[Request]:
  count, prompt_len, output_len = context.sizes.served
  sampling = SamplingParams(max_tokens=output_len, ignore_eos=True)
  vocab_size = context.sizes.model.vocab_size
  return [Request(f'r{i}', tuple(RandomTokens(prompt_len, vocab_size, i)), sampling) for i in range(count)]


def _serve(deployment: Deployment, requests: Sequence[Request]) -> Served:
  """Serve requests that come all at once."""
  events = tuple(deployment.serve(Listed(list(requests))))
  report = Report.from_events(events, workers=deployment.built.workers)
  tokens = {event.request: event.tokens for event in events if isinstance(event, Finished)}
  if failed := [event for event in events if isinstance(event, Finished) and event.error]:
    raise RuntimeError(f'{len(failed)} requests failed, the first with {failed[0].error}')
  exposed_s = None
  if report.num_transfers:
    spans = report.timeline.spans
    computed_s = max(span.ended_s for span in spans if span.kind == 'prefill')
    exposed_s = max(0.0, max(span.ended_s for span in spans if span.kind == 'transfer') - computed_s)
  return Served(report, exposed_s, tokens)


def _say(context: Context, name: str, alone: dict[str, list[Served]], together: dict[str, Served]) -> None:
  """Hand over the figures of a way, beside those of the colocated worker where they are there."""
  count, prompt_len, _ = context.sizes.served
  title = f'{context.sizes.few_layers} layers, prompts of {prompt_len:,}'

  def one_by_one(way: str, figure: str) -> float | None:
    found = [getattr(served.report, figure).median_ms for served in alone[way]]
    return statistics.median(found) if None not in found else None

  def all_at_once(way: str, figure: str) -> float | None:
    return getattr(together[way].report, figure).median_ms

  for when, value in (('one by one', one_by_one), (f'{count} at once', all_at_once)):
    for figure, title_of in (('ttft', 'TTFT'), ('tpot', 'TPOT'), ('handoff', 'first to second token')):
      if (found := value(name, figure)) is not None:
        beside = value(COLOCATED, figure) if name != COLOCATED else None
        context.figures.add(
          f'{title_of} of {name}, {title}, {when}', found, 'ms',
          peer=None if beside is None else COLOCATED, peer_value=beside,
        )  # fmt: skip
  exposed = [served.exposed_s for served in alone[name] if served.exposed_s is not None]
  if exposed:
    context.figures.add(f'exposed hand-off of {name}, {title}, one by one', 1e3 * statistics.median(exposed), 'ms')
