"""The order in which prompts are served: a key of each request, asked for once, so that ageing is linear in time."""

import dataclasses
from typing import Annotated, Protocol

from pdjax.types.checked import Rate, check_fields
from pdjax.types.fitting import Must
from pdjax.types.request import Request

_Weight = Annotated[float, Must(lambda value: value >= 0, '0 (no ageing) or more')]


class Order(Protocol):
  """The order of requests that wait; None, where a policy takes one, is that of their arrival."""

  def key(self, request: Request) -> tuple[float, ...]:
    """The key of a request: the least goes first, and of equals the one that came first."""


@dataclasses.dataclass(frozen=True)
class ShortestFirst:
  """The shortest prompt first, aged: mean waiting falls, as with shortest processing time (Smith 1956).

  A second of waiting weighs as much as `tokens_per_s` tokens. So a prompt of T tokens is overtaken only by those that
  come within T ÷ `tokens_per_s` seconds, however many are shorter.

  Attributes:
    tokens_per_s: The weight of a second; 0 is no ageing, and a long prompt may then wait for ever.
  """

  tokens_per_s: _Weight = 500.0

  def __post_init__(self):
    check_fields(self)

  def key(self, request: Request) -> tuple[float, ...]:
    return (request.prompt_len + self.tokens_per_s * request.arrival_s,)


@dataclasses.dataclass(frozen=True)
class EarliestDeadline:
  """The request that is due soonest first (Liu and Layland 1973).

  It is due its `deadline_s` after its arrival; one without, its limit of TTFT; one with neither, `default_s`.

  Attributes:
    default_s: Seconds that requests without deadline and limit have.
  """

  default_s: Rate = 10.0

  def __post_init__(self):
    check_fields(self)

  def key(self, request: Request) -> tuple[float, ...]:
    return (request.arrival_s + self._due_s(request),)

  def _due_s(self, request: Request) -> float:
    if request.deadline_s is not None:
      return request.deadline_s
    slo = request.slo
    return self.default_s if slo is None or slo.ttft_ms is None else slo.ttft_ms / 1000


@dataclasses.dataclass(frozen=True)
class PriorityClasses:
  """The lowest `Request.priority` first, and within one that which came first.

  Attributes:
    ageing_s: Seconds of waiting that weigh as much as one class, so that a request is overtaken by those a class before
      it only if they come within as many seconds; None is no ageing, and low classes may then wait for ever.
  """

  ageing_s: Rate | None = 60.0

  def __post_init__(self):
    check_fields(self)

  def key(self, request: Request) -> tuple[float, ...]:
    if self.ageing_s is None:
      return (float(request.priority),)
    return (request.arrival_s + self.ageing_s * request.priority,)
