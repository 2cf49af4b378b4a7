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
  """The request whose first token is due soonest (Liu and Layland 1973): its arrival and its limit of TTFT.

  Attributes:
    default_s: Seconds that requests without such a limit have.
  """

  default_s: Rate = 10.0

  def __post_init__(self):
    check_fields(self)

  def key(self, request: Request) -> tuple[float, ...]:
    return (request.arrival_s + first_token_limit_s(request, self.default_s),)


def first_token_limit_s(request: Request, default_s: float) -> float:
  """Seconds from a request's arrival in which its first token is to come."""
  slo = request.slo
  return default_s if slo is None or slo.ttft_ms is None else slo.ttft_ms / 1000
