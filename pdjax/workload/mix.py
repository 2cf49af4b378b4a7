"""Traffic of several kinds at once: workloads that share one rate, each with its class."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from pdjax.serving.events import Arrived
from pdjax.serving.loop import Arrivals
from pdjax.types.checked import SOME, Count, Index, Positive, check_fields
from pdjax.types.checks import check_text
from pdjax.types.fitting import Must
from pdjax.types.request import Name, Priority
from pdjax.workload.arrivals import Listed
from pdjax.workload.parts import AnyWorkload, Merged, Placed, has_field, repeats, with_fields, with_own_seed
from pdjax.workload.phases import Phases
from pdjax.workload.synthetic import BurstOf, Bursty, ClosedLoopWorkload, Constant, MultiTurn, Poisson, RateOf
from pdjax.workload.workload import Workload, WorkloadContext

_CLASS = Must(lambda text: text != '' and '/' not in text, "a text that is not empty, without '/'; ids begin with it")
_ORDER = 5  # the stream of random numbers that mixes the parts, beside those of `synthetic`


@dataclasses.dataclass(frozen=True)
class Share:
  """A part of a `Mix`: a workload, its share of all requests, and their class.

  Attributes:
    workload: The workload. Its requests count, not their times.
    share: Its part of all requests, in proportion to the shares of the others.
    class_name: The class of its requests, with which their ids begin: `chat/request-0`.
    priority: The priority of its requests; None leaves them as they are.
    deadline_s: The deadline of its requests, from arrival to last token; None leaves them as they are.
    tenant: The tenant of its requests; None leaves them as they are.

  Raises:
    ValueError: if its requests wait for others, so that no share of a rate can be theirs.
  """

  workload: AnyWorkload
  share: Positive
  class_name: Annotated[str, _CLASS]
  priority: Priority | None = None
  deadline_s: Positive | None = None
  tenant: Name | None = None

  def __post_init__(self):
    check_fields(self)
    check_text(self.class_name, 'the class_name of a Share')
    kind = type(self.workload).__name__
    if isinstance(self.workload, Mix | Phases):
      raise ValueError(f'Share has workload={kind}(...), expected a single workload; a Mix may be a part of Phases.')
    if isinstance(self.workload, ClosedLoopWorkload):
      raise ValueError(
        f'Share has workload={kind}(...), whose users wait for answers, so that no share of a rate can be theirs; use '
        'Poisson, or MultiTurn(max_concurrency=None).'
      )
    if isinstance(self.workload, MultiTurn) and self.workload.max_concurrency is not None:
      raise ValueError(
        f'Share has workload=MultiTurn(max_concurrency={self.workload.max_concurrency}), but chats of a Mix begin at '
        'its rate, whoever else there is; set max_concurrency=None.'
      )

  @property
  def name(self) -> str:
    """Its name in overrides: `--set=workload.parts.chat.share=0.5`."""
    return self.class_name

  @property
  def fields(self) -> dict[str, Any]:
    """The fields that it sets in its requests."""
    set_here = {name: getattr(self, name) for name in ('class_name', 'priority', 'deadline_s', 'tenant')}
    return {name: value for name, value in set_here.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Mix:
  """Several workloads at once, at one rate: each has its share of the requests, in an order drawn at random.

      Mix((Share(Poisson(), 0.7, 'chat'), Share(Poisson(prompt=Fixed(4000)), 0.3, 'code')), requests_per_s=8)

  Shares are kept to the request. The arrivals are those of the mix; what a part says of its own times, rate and
  number does not count. Ready requests and recorded traces give the first of theirs, as many as their share is. Of a
  `MultiTurn` part, chats begin with the arrivals and their later turns follow when they do; its share, and the rate,
  are of all turns, of which the last chat may be cut short. At another rate come the same requests.

  Attributes:
    parts: The workloads with their shares and classes.
    requests_per_s: Mean rate of all requests together; infinite if all come at once.
    num_requests: Requests that come in all, fewer if chats are cut short.
    burstiness: Shape of the gaps between arrivals, see `Bursty`; 1 is a Poisson process.
    seed: Fixes, with the seeds of the parts, everything; parts with equal seeds have no equal prompts.

  Raises:
    ValueError: if there is no part, or two have one class.
  """

  parts: Annotated[tuple[Share, ...], SOME]
  _: dataclasses.KW_ONLY
  requests_per_s: RateOf = 1.0
  num_requests: Count = 64
  burstiness: BurstOf = 1.0
  seed: Index = 0
  max_concurrency: ClassVar[None] = None

  def __post_init__(self):
    check_fields(self)
    names = [part.class_name for part in self.parts]
    if twice := [name for name in names if names.count(name) > 1]:
      raise ValueError(f'Mix has several parts of class_name={twice[0]!r}, expected one of each; rename the others.')

  @property
  def request_rate(self) -> float:
    return self.requests_per_s

  @property
  def repeats(self) -> bool:
    """Whether prompts of any part may begin alike."""
    return repeats([part.workload for part in self.parts])

  def arrivals(self, context: WorkloadContext) -> Merged:
    """A fresh source of these requests.

    Raises:
      ValueError: if a part has fewer requests than its share, or they come in answer to others.
    """
    parts = [
      _Begun.of(with_own_seed(part.workload, self.seed, number), count)
      for number, (part, count) in enumerate(zip(self.parts, self._counts(), strict=True))
    ]
    num_starts = [one.num_starts for one in parts]
    times_s = np.array(self._process(sum(num_starts) / self.num_requests).times_s(sum(num_starts)))
    owners = np.repeat(np.arange(len(parts)), num_starts)
    np.random.default_rng((self.seed, _ORDER)).shuffle(owners)
    sources = []
    for number, (part, begun) in enumerate(zip(self.parts, parts, strict=True)):
      if begun.num_starts:
        apart = 0 if has_field(begun.workload, 'seed') else number
        source = begun.arrivals(context, times_s[owners == number].tolist(), part.class_name)
        sources.append(Placed(source, f'{part.class_name}/', part.fields, number=apart))
    return Merged(sources)

  def lasting(self, seconds: float) -> 'Mix':
    """The same with as many requests as come in so many seconds, or a few more if there are chats among them."""
    count = self._process(1.0).lasting(seconds).num_requests
    has_chats = any(isinstance(part.workload, MultiTurn) for part in self.parts)
    return dataclasses.replace(self, num_requests=count + count // 4 + 1 if has_chats else count)

  def _process(self, scale: float) -> Bursty:
    """A workload whose times are those of the mix, at a multiple of its rate."""
    rate = self.requests_per_s * scale
    return Bursty(requests_per_s=rate, burstiness=self.burstiness, num_requests=self.num_requests, seed=self.seed)

  def _counts(self) -> list[int]:
    """Requests of each part: its share to the request, where what is left over goes to the largest remainders."""
    whole = math.fsum(part.share for part in self.parts)
    exact = [self.num_requests * (part.share / whole) for part in self.parts]
    counts = [int(one) for one in exact]
    behind = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in behind[: self.num_requests - sum(counts)]:
      counts[number] += 1
    return counts


@dataclasses.dataclass(frozen=True)
class _Begun:
  """A part with the number of its requests, and the turns of its chats if it has any."""

  workload: Any
  count: int
  turn_counts: tuple[int, ...] = ()

  @classmethod
  def of(cls, workload: Workload, count: int) -> '_Begun':
    if isinstance(workload, MultiTurn) and count:
      return cls(workload, count, _chats_of(workload, count))
    return cls(workload, count)

  @property
  def num_starts(self) -> int:
    """The number of times that it wants of the mix."""
    return len(self.turn_counts) or self.count

  def arrivals(self, context: WorkloadContext, times_s: Sequence[float], class_name: str) -> Arrivals:
    """Its requests, begun at these times."""
    workload = self.workload
    if isinstance(workload, MultiTurn):
      return workload.chats(context, times_s, self.turn_counts)
    if isinstance(workload, Poisson | Bursty | Constant):
      return with_fields(workload, num_requests=self.count).listed(context, times_s)
    source = workload.arrivals(context)
    if not isinstance(source, Listed):
      raise ValueError(
        f'the part {class_name!r} of the mix is a {type(workload).__name__}, whose requests come in answer to others, '
        'expected ones that come at times of their own; use Poisson, or MultiTurn(max_concurrency=None).'
      )
    requests = [event.request for event in source.due(math.inf) if isinstance(event, Arrived)][: self.count]
    if len(requests) < self.count:
      raise ValueError(
        f'the part {class_name!r} of the mix has {len(requests)} requests, but its share is {self.count} of them; '
        'lower num_requests or its share.'
      )
    lengths = {one.id: length for one in requests if (length := source.output_len(one.id)) is not None}
    at_times = zip(requests, times_s, strict=True)
    return Listed([dataclasses.replace(one, arrival_s=time_s) for one, time_s in at_times], lengths)


def _chats_of(workload: MultiTurn, count: int) -> tuple[int, ...]:
  """The turns of as many chats as have so many together, of which the last is cut short."""
  ends = np.cumsum(with_fields(workload, num_chats=count).turn_counts())
  last = int(np.searchsorted(ends, count))
  turns = np.diff(np.minimum(ends[: last + 1], count), prepend=0)
  return tuple(turns.tolist())
