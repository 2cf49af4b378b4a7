"""Sources of requests that the loop asks every turn (`Arrivals`): a list, a closed loop, chats that go on."""

import collections
import dataclasses
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, TypeVar

from pdjax.serving.events import Arrived, Finished, Withdrawn
from pdjax.types.checked import Index, Seconds, check_fields, checks_arguments
from pdjax.types.fitting import Must, at_least
from pdjax.types.request import SERVED, SLO, Request, SamplingParams, TokenIds

Users = Annotated[int, at_least(1, 'at least 1; with none, nothing would arrive')]
Thinking = Annotated[float, Must(lambda value: 0 <= value < math.inf, '0 (no pause) or a positive number of seconds')]


class _Scheduled:
  """The common part of the sources: a heap of requests to come, and the true output lengths of all."""

  def __init__(self, output_lens: Mapping[str, int] | None = None):
    self._heap: list[tuple[float, int, Request]] = []  # the count keeps requests of equal arrival in order
    self._num_scheduled = 0
    self._output_lens = dict(output_lens or {})

  def next_s(self) -> float:
    return self._heap[0][0] if self._heap else math.inf

  def due(self, now_s: float, finished: Sequence[Finished] = ()) -> list[Arrived | Withdrawn]:
    for end in finished:
      self._follow_up(end)
    events: list[Arrived | Withdrawn] = []
    while self._heap and self._heap[0][0] <= now_s:
      events.append(Arrived(heapq.heappop(self._heap)[2]))
    return events

  def output_len(self, request_id: str) -> int | None:
    return self._output_lens.get(request_id)

  def _schedule(self, request: Request) -> None:
    heapq.heappush(self._heap, (request.arrival_s, self._num_scheduled, request))
    self._num_scheduled += 1

  def _follow_up(self, end: Finished) -> None:
    """Schedule the requests that follow the end of one."""


class Listed(_Scheduled):
  """Ready requests at the times they name, whatever becomes of them (an open loop).

  Args:
    requests: In any order; those of equal `arrival_s` keep theirs.
    output_lens: True output length by request id, for those that have one.

  Raises:
    ValueError: if two requests have one id.
  """

  @checks_arguments()
  def __init__(self, requests: Iterable[Request], output_lens: Mapping[str, int] | None = None):
    super().__init__(output_lens)
    for request in _distinct(requests):
      self._schedule(request)

  @property
  def closed(self) -> bool:
    return not self._heap


class ClosedLoop(_Scheduled):
  """A fixed number of users: each sends a request, waits for its end, thinks, and sends the next.

  Args:
    requests: The requests to send, in this order; their own arrival times do not count.
    max_concurrency: Users, and so the most requests in flight.
    think_s: Seconds from the end of a request to the next one of the same user.
    output_lens: True output length by request id, for those that have one.

  Raises:
    ValueError: if two requests have one id, there is no user, or the think time is negative.
  """

  @checks_arguments()
  def __init__(
    self,
    requests: Iterable[Request],
    max_concurrency: Users,
    think_s: Thinking = 0.0,
    output_lens: Mapping[str, int] | None = None,
  ):
    super().__init__(output_lens)
    self._think_s = think_s
    self._to_send = collections.deque(_distinct(requests))
    self._in_flight: dict[str, set[str]] = {}  # by the id of each sample: those of its request that have not ended
    for _ in range(min(max_concurrency, len(self._to_send))):
      self._send_next(0.0)

  @property
  def closed(self) -> bool:
    return not self._heap and not self._to_send

  def _follow_up(self, end: Finished) -> None:
    if end.request in self._in_flight:
      left = self._in_flight.pop(end.request)
      left.remove(end.request)
      if not left:
        self._send_next(end.now_s + self._think_s)

  def _send_next(self, arrival_s: float) -> None:
    if self._to_send:
      request = dataclasses.replace(self._to_send.popleft(), arrival_s=arrival_s)
      names = {sample.id for sample in request.samples()}
      self._in_flight |= dict.fromkeys(names, names)
      self._schedule(request)


@dataclasses.dataclass(frozen=True, slots=True)
class ChatTurn:
  """A message that a user adds to a chat, with the sampling and the true length of its answer (None: as it comes)."""

  user: TokenIds
  sampling: SamplingParams = SamplingParams()
  output_len: Annotated[int, at_least(1, 'at least 1 token')] | None = None

  def __post_init__(self):
    check_fields(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
  """The user's side of one conversation, which starts no earlier than `start_s`."""

  id: str
  turns: tuple[ChatTurn, ...]
  start_s: Seconds = 0.0
  slo: SLO | None = None

  def __post_init__(self):
    check_fields(self)


class Chats(_Scheduled):
  """Conversations: each prompt is the whole of the last one, its answer, and the user's next message.

  A turn arrives `think_s` after the one before has ended. A chat ends with its last turn, with a turn that did
  not end well, or before a turn whose prompt and `max_tokens` together would exceed `max_context`. A request is
  named after its chat and turn, `chat-3-turn-0`, and its `session` is the chat's id.

  Args:
    chats: The conversations, in any order.
    max_context: Most tokens of a prompt and its answer together.
    max_concurrency: Most chats at once; a later one waits until another has ended. None starts each at its time.
    think_s: Seconds from an answer to the next turn.

  Raises:
    ValueError: if two chats have one id, one has no turn or a first turn that does not fit, `max_concurrency` is
      below 1, or the think time is negative.
  """

  @checks_arguments()
  def __init__(
    self,
    chats: Iterable[Chat],
    max_context: Index,
    max_concurrency: Users | None = None,
    think_s: Thinking = 0.0,
  ):
    super().__init__()
    self._max_context = max_context
    self._think_s = think_s
    self._to_start = collections.deque(sorted(_distinct(chats), key=lambda chat: chat.start_s))
    for chat in self._to_start:
      if not chat.turns:
        raise ValueError(f'chat {chat.id!r} has no turns, expected at least one.')
      if not self._fits(chat.turns[0].user, chat.turns[0]):
        raise ValueError(
          f'chat {chat.id!r} begins with {len(chat.turns[0].user)} tokens and asks for up to '
          f'{chat.turns[0].sampling.max_tokens} more, expected at most {max_context} together; shorten either.'
        )
    self._asked: dict[str, tuple[Chat, int, Request]] = {}  # by request: its chat and turn
    num_chats = len(self._to_start)
    for _ in range(num_chats if max_concurrency is None else min(max_concurrency, num_chats)):
      self._start_next(0.0)

  @property
  def closed(self) -> bool:
    can_go_on = any(turn + 1 < len(chat.turns) for chat, turn, _ in self._asked.values())
    return not self._heap and not self._to_start and not can_go_on

  def _follow_up(self, end: Finished) -> None:
    if end.request not in self._asked:
      return
    chat, turn, request = self._asked.pop(end.request)
    if end.finish_reason in SERVED and turn + 1 < len(chat.turns):
      added = chat.turns[turn + 1]
      prompt = (*request.prompt, *end.tokens, *added.user)
      if self._fits(prompt, added):
        self._ask(chat, turn + 1, prompt, end.now_s + self._think_s)
        return
    self._start_next(end.now_s)

  def _start_next(self, free_s: float) -> None:
    """Start the next chat, no earlier than `free_s`."""
    if self._to_start:
      chat = self._to_start.popleft()
      self._ask(chat, 0, chat.turns[0].user, max(chat.start_s, free_s))

  def _ask(self, chat: Chat, turn: int, prompt: Sequence[int], arrival_s: float) -> None:
    asked = chat.turns[turn]
    request = Request(f'{chat.id}-turn-{turn}', prompt, asked.sampling, arrival_s, chat.slo, session=chat.id)
    self._asked[request.id] = chat, turn, request
    if asked.output_len is not None:
      self._output_lens[request.id] = asked.output_len
    self._schedule(request)

  def _fits(self, prompt: Sequence[int], turn: ChatTurn) -> bool:
    return len(prompt) + turn.sampling.max_tokens <= self._max_context


_Named = TypeVar('_Named', Request, Chat)


def _distinct(named: Iterable[_Named]) -> list[_Named]:
  """The requests or chats as a list, once no two have one id."""
  items = list(named)
  names = (one.id for item in items for one in (item.samples() if isinstance(item, Request) else (item,)))
  for name, count in collections.Counter(names).items():
    if count > 1:
      raise ValueError(f'{count} requests or chats have the id {name!r}, expected one; rename the others.')
  return items
