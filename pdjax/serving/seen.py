"""Requests and workers as policies see them: protocols, whose values are the books' own objects, to be read."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from pdjax.cost.worker_cost import WorkerCost
from pdjax.serving.actions import Step
from pdjax.serving.requests import Phase
from pdjax.types.request import Request
from pdjax.types.worker import Role, WorkerSpec


class RequestView(Protocol):
  """A request as a policy sees it: the books' own object, to be read."""

  @property
  def request(self) -> Request:
    """The request."""

  @property
  def limit(self) -> int:
    """Most tokens it may generate: its own `max_tokens`, or what is left of the model's context."""

  @property
  def phase(self) -> Phase:
    """The stage it has reached."""

  @property
  def worker(self) -> str | None:
    """The worker that prefills it."""

  @property
  def target(self) -> str | None:
    """The worker that decodes it; the same as `worker` when nothing moves."""

  @property
  def pages(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    """Pages it holds, by worker and cache kind."""

  @property
  def started(self) -> int:
    """Prompt tokens handed to the worker."""

  @property
  def prefill_len(self) -> int:
    """Tokens to compute before it can decode: its prompt and, begun again, what was delivered but the last token."""

  @property
  def prompt_left(self) -> int:
    """Tokens of `prefill_len` that no step was given yet."""

  @property
  def tokens(self) -> Sequence[int]:
    """Tokens generated and delivered."""

  @property
  def num_tokens(self) -> int:
    """The number of `tokens`, for which none is taken out of where steps bring them."""

  @property
  def delivered(self) -> Sequence[int]:
    """The tokens it had when it was last begun again."""

  @property
  def tokens_left(self) -> int:
    """Tokens that may still be asked for, those under way not counted."""

  @property
  def can_step(self) -> bool:
    """Whether another decode step can bring it a token, and it has a page for that."""

  @property
  def preemptions(self) -> int:
    """Times it was preempted."""

  @property
  def computed(self) -> bool:
    """Whether its whole prompt is computed."""

  @property
  def attempts(self) -> int:
    """Times it was begun, this one counted."""

  @property
  def can_move(self) -> bool:
    """Whether it decodes and may be moved: its prompt is all computed, and its pages hold all that they should."""

  @property
  def prefilled_by(self) -> str | None:
    """The worker that computed its prompt, wherever it moved since."""

  @property
  def fetching(self) -> int:
    """Copies of its blocks that are under way to workers that prefill."""

  @property
  def copies_asked(self) -> Mapping[str, int]:
    """Times that a copy of its blocks was asked for, by the place that it goes to."""

  @property
  def number(self) -> int:
    """Its position in the order of arrival."""

  @property
  def slots_needed(self) -> int:
    """Slots where it decodes: one, and one for each further sample that follows it."""


class PagesView(Protocol):
  """The pages and slots of a worker, as a policy sees them."""

  @property
  def page_size(self) -> int:
    """Tokens per page."""

  @property
  def num_pages(self) -> int:
    """Pages in all, free or not."""

  @property
  def free_pages(self) -> int:
    """Pages that nobody holds; of several cache kinds, the free memory in whole pages."""

  @property
  def cached_pages(self) -> int:
    """Pages that nobody holds and whose content is found again; they count as free."""

  @property
  def used_bytes(self) -> int:
    """Bytes of the cache that somebody holds, over all devices, copies counted once."""

  @property
  def num_bytes(self) -> int:
    """Bytes of the cache in all, held or not, over all devices, copies counted once."""

  @property
  def free_slots(self) -> int:
    """Slots in which no sequence stands."""


class WorkerView(PagesView, Protocol):
  """A worker as a policy sees it: the books' own object, to be read."""

  @property
  def spec(self) -> WorkerSpec:
    """The worker as the config has it."""

  @property
  def cost(self) -> WorkerCost:
    """Its own cost model: the one of the config (`ServingConfig.cost`), asked about this worker."""

  @property
  def name(self) -> str:
    """Its name."""

  @property
  def role(self) -> Role:
    """The phases it runs now; `spec` has those that it began with, and which it may take."""

  @property
  def ever_prefills(self) -> bool:
    """Whether it prefills in any of its roles."""

  @property
  def ever_decodes(self) -> bool:
    """Whether it decodes in any of its roles."""

  @property
  def draining(self) -> Role | None:
    """The role that it is to have once it is empty; until then it takes no new request. None if it keeps its own."""

  @property
  def role_since_s(self) -> float:
    """The time of the turn from which on it has had its role; 0 for the one that it began with."""

  @property
  def steps(self) -> Sequence[Step]:
    """Steps in flight, oldest first, as the policy asked for them."""

  @property
  def num_steps(self) -> int:
    """The number of steps in flight."""

  @property
  def prefilling(self) -> Mapping[str, RequestView]:
    """Prompts begun here with tokens left to hand over, in order."""

  @property
  def decoding(self) -> Mapping[str, RequestView]:
    """Sequences in its slots."""

  @property
  def queued_tokens(self) -> int:
    """Prompt tokens of requests begun here that are not computed yet."""

  @property
  def incarnation(self) -> int:
    """The number of its incarnation, from 1."""

  @property
  def up(self) -> bool:
    """Whether it takes orders: it was not lost, or is back."""

  @property
  def lost(self) -> str:
    """The error it was lost with; empty while it is up."""

  @property
  def given_up(self) -> bool:
    """Whether nobody waits for it to come back any more."""

  def decodable(self) -> list[str]:
    """Sequences that another decode step can bring a token, and that have a page for it."""

  @property
  def has_work(self) -> bool:
    """Whether another step can bring a sequence a token that no step in flight brings it."""

  @property
  def is_standing(self) -> bool:
    """Whether a standing step goes on here until something changes."""

  @property
  def is_short(self) -> bool:
    """Whether sequences here would decode and none can for want of pages, with no step under way to free some."""
