"""Whether a cluster can do what it is asked to, and why not."""

import array
import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set, Sized
from typing import Any

from pdjax.serving.actions import (
  STANDING,
  Abandon,
  Action,
  All,
  Cancel,
  Chunk,
  Leave,
  Preempt,
  Reject,
  Resend,
  SendOn,
  Step,
  SwitchRole,
  Transfer,
  WakeAt,
)
from pdjax.serving.orders import MAX_ORDERS
from pdjax.serving.view import ClusterView, Phase, RequestView, WorkerView
from pdjax.types.checks import is_integer, is_number
from pdjax.types.fitting import shown
from pdjax.types.request import MAX_STOP_TOKENS
from pdjax.types.worker import Role

MOST_IDLE_ANSWERS = 10_000  # of one turn
MOST_IDLE_WAKES = 100_000  # in a row, while requests wait and nothing is under way
MOST_YIELDED = 100_000  # actions of an answer that does not say how many it has
NAMED_ACTIONS = 'Step, Transfer, Cancel, Reject, Preempt, SwitchRole or WakeAt'
_ACTIONS = (Step, Transfer, Cancel, Reject, Preempt, SwitchRole, Abandon, Resend, SendOn, Leave, WakeAt)


class PolicyError(RuntimeError):
  """A policy asked for what the cluster cannot do; the message names the action and what is short."""


def why_unfit(view: ClusterView, entry: RequestView, *, finds_stops: bool) -> str | None:
  """The reason the request can never be served here, or None."""
  request, model = entry.request, view.model
  if request.prompt_len > model.context_len:
    return (
      f'the prompt has {request.prompt_len} tokens, but the context of {model.name} is {model.context_len}; '
      'shorten the prompt.'
    )
  stops = len(request.stop_tokens(model.eos_token_ids))
  if stops > MAX_STOP_TOKENS:
    return (
      f"{stops} stop tokens asked for, the model's own included, but at most {MAX_STOP_TOKENS} are kept; name fewer."
    )
  if request.sampling.stop and not finds_stops:
    return (
      f'stop strings {", ".join(map(repr, request.sampling.stop))} asked for, but there is no tokenizer to find them '
      'with; serve a checkpoint that has one, or use stop_token_ids.'
    )
  place = first_outside(request.prompt, model.vocab_size)
  if place is not None:
    known = f'the ids of {model.name} are 0 to {model.vocab_size - 1}'
    return f'token id {request.prompt[place]!r} in the prompt, but {known}; use its tokenizer.'
  return why_without_place(view, entry)


def _runs(worker: WorkerView, *, decodes: bool, now: bool) -> bool:
  """Whether a worker runs a phase: in any of its roles, or in that of now, or that it drains for."""
  if now:
    role = worker.draining or worker.role
    return role.decodes if decodes else role.prefills
  return worker.ever_decodes if decodes else worker.ever_prefills


def why_without_place(view: ClusterView, entry: RequestView, *, now: bool = False) -> str | None:
  """The reason there is no worker that could ever serve the request; or None.

  Args:
    view: The cluster.
    entry: The request.
    now: Whether workers keep the roles that they have now; else any that they may take counts.
  """
  request, slots = entry.request, view.slots_needed(entry.request.id)
  must_decode = entry.limit > 1 or slots > 1
  if must_decode and not entry.computed and _has_two_places(view, entry, slots, now=now):
    return None
  able: dict[bool, list[WorkerView]] = {}  # by whether they decode it
  for decodes in [False] * (not entry.computed) + [True] * must_decode:
    there = [one for one in view.workers.values() if _runs(one, decodes=decodes, now=now)]
    workers = [worker for worker in there if not worker.given_up]
    if not workers:
      lost = ', '.join(f'{worker.name!r} ({worker.lost})' for worker in there)
      return f'every worker that {"decodes" if decodes else "prefills"} is lost: {lost}.'
    roomy = [worker for worker in workers if view.could_fit(request.id, worker.name, decodes=decodes)]
    if not roomy:
      largest = max(workers, key=lambda worker: worker.num_pages * worker.page_size)
      return (
        f'{request.prompt_len} prompt tokens{f", {len(entry.delivered)} delivered ones" if entry.delivered else ""} '
        f'and up to {entry.limit} generated ones'
        f'{f" of each of {slots} samples" if slots > 1 else ""} need '
        f'{view.describe_pages(request.id, largest.name, decodes=decodes, ever=True)} pages of '
        f'{largest.page_size} tokens, but the largest worker that {"decodes" if decodes else "prefills"}, '
        f'{largest.name!r}, has {view.capacity(largest.name)} in all; raise num_pages, shorten the prompt or lower '
        f'{"n or " if decodes and slots > 1 else ""}max_tokens.'
      )
    able[decodes] = [worker for worker in roomy if not decodes or worker.spec.max_sequences >= slots]
    if not able[decodes]:
      found = ', '.join(f'{w.name} {w.spec.max_sequences} and {w.num_pages}' for w in workers)
      return (
        f'{slots} samples need {slots} sequences and '
        f'{view.describe_pages(request.id, roomy[0].name, decodes=decodes, ever=True)} pages on one worker that '
        f'decodes, but these have {found}; raise max_sequences or lower n.'
      )
  if not must_decode:
    return None
  sources = {entry.worker} if entry.computed else {worker.name for worker in able[False]}
  for target in able[True]:
    is_both = target.role is Role.BOTH if now else Role.BOTH in target.spec.roles
    if sources != {target.name} or (target.role.decodes if entry.computed else is_both):
      return None
  return (
    f'only worker {able[True][0].name!r} could decode it, and its prompt could be nowhere else; give another worker '
    "room for it, or that one the role 'both'."
  )


def _has_two_places(view: ClusterView, entry: RequestView, slots: int, *, now: bool) -> bool:
  """Whether one worker could prefill a request and another decode it, as far as a look at few of them tells."""

  def first(decodes: bool, least: int) -> WorkerView | None:
    for one in view.workers.values():
      if one.given_up or not _runs(one, decodes=decodes, now=now):
        continue
      if one.spec.max_sequences >= least and view.could_fit(entry.request.id, one.name, decodes=decodes):
        return one
    return None

  source, target = first(False, 0), first(True, slots)
  return source is not None and target is not None and source is not target


def first_outside(prompt: Sequence[int], vocab_size: int) -> int | None:
  """The index of the first entry of `prompt` that is no token id, or None.

  A prompt whose own `vocab_size` is no larger is not walked. Only integers count as token ids: another, found later,
  would break the step of others.
  """
  if getattr(prompt, 'vocab_size', vocab_size + 1) <= vocab_size:
    return None
  with contextlib.suppress(TypeError, OverflowError):
    tokens = array.array('I', prompt)  # a twentieth of what the walk takes, which is left for those with a wrong one
    if not tokens or max(tokens) < vocab_size:
      return None
  known = (hasattr(token, '__index__') and 0 <= token < vocab_size for token in prompt)
  return next((place for place, one in enumerate(known) if not one), None)


def check_policy(policy: Any) -> None:
  """Raise `PolicyError` unless a policy has a method `decide` that takes a view."""
  name, decide = type(policy).__name__, getattr(policy, 'decide', None)
  if not callable(decide):
    raise PolicyError(f'policy {name} has no method decide(self, view); define it, see pdjax.serving.Policy.')
  try:
    signature = inspect.signature(decide)
  except (TypeError, ValueError):  # of a function that does not say what it takes
    return
  try:
    signature.bind(None)
  except TypeError:
    raise PolicyError(
      f'policy {name}: decide takes {signature}, expected one argument, the view; define decide(self, view).'
    ) from None


def ask(policy: Any, view: ClusterView) -> list[Action]:
  """The answer of a policy, as a list.

  Raises:
    PolicyError: if it is no sequence of actions.
  """
  answer = policy.decide(view)
  if type(answer) is list and all(isinstance(action, _ACTIONS) for action in answer):  # as nearly all are
    return answer
  name, expected = f'policy {type(policy).__name__}', f'expected a list of {NAMED_ACTIONS}'
  if isinstance(answer, str | bytes | Mapping | Set) or not isinstance(answer, Iterable):  # sets have no order
    raise PolicyError(f'{name} answered {answer!r:.200}, {expected}; answer with [] where nothing is to be done.')
  actions = list(answer if isinstance(answer, Sized) else itertools.islice(answer, MOST_YIELDED + 1))
  if not isinstance(answer, Sized) and len(actions) > MOST_YIELDED:
    raise PolicyError(
      f'{name} yields more than {MOST_YIELDED:,} actions in one answer, the last {actions[-1]!r:.200}; let it end.'
    )
  for action in actions:
    if not isinstance(action, _ACTIONS):
      raise PolicyError(f'{name} answered {answer!r:.200} with {action!r:.200} in it, {expected}.')
  return actions


def waiting_key(policy: Any) -> Callable[[RequestView], tuple[float, ...]] | None:
  """The key by which a policy wants requests that wait to be ordered; None if it names none.

  Raises:
    PolicyError: if it is no method, and later if an answer is no tuple of finite numbers.
  """
  key = getattr(policy, 'waiting_key', None)
  name = type(policy).__name__
  if key is None:
    return None
  if not callable(key):
    raise PolicyError(f'policy {name} has waiting_key={key!r}, expected a method that takes a request; make it one.')

  def checked(entry: RequestView) -> tuple[float, ...]:
    try:
      answer = key(entry.request)
    except Exception as error:
      raise PolicyError(
        f'policy {name}: waiting_key of request {entry.request.id!r} raised {type(error).__name__}: {error}; it takes '
        'a request and answers a tuple of numbers.'
      ) from error
    if not isinstance(answer, tuple) or not all(is_number(one) and math.isfinite(one) for one in answer):
      raise PolicyError(
        f'policy {name} answered waiting_key of request {entry.request.id!r} with {shown(answer)}, expected a tuple of '
        'finite numbers; answer so.'
      )
    return tuple(map(float, answer))

  return checked


def check_idle(policy: Any, num_idle: int, last: Sequence[Action]) -> None:
  """Raise `PolicyError` if so many answers of one turn have started nothing that none ever will; `last` is the last."""
  if num_idle >= MOST_IDLE_ANSWERS:
    raise PolicyError(
      f'policy {type(policy).__name__} gave {num_idle:,} answers in one turn that started no order, the last '
      f'{last!r:.200}; answer with [] where there is nothing to do.'
    )


def check_id(action: Action, request: str) -> None:
  """Raise `PolicyError` if what an action names as a request is no id."""
  if not isinstance(request, str):
    raise PolicyError(f'{action!r}: request {request!r:.200} is no id; name a request by its id, a text.')


def find_request(view: ClusterView, action: Action, request: str) -> RequestView:
  """The request that an action names; raises `PolicyError` if there is none."""
  check_id(action, request)
  entry = view.requests.get(request)
  if entry is None:
    raise PolicyError(f'{action!r}: request {request!r} is unknown or finished.')
  return entry


def find_worker(view: ClusterView, action: Action, name: str) -> WorkerView:
  """The worker that an action names; raises `PolicyError` if there is none."""
  worker = view.workers.get(name) if isinstance(name, str) else None
  if worker is None and isinstance(name, str) and name in view.places:
    raise PolicyError(
      f'{action!r}: {name!r} only holds pages, and runs nothing; name one of the workers {", ".join(view.workers)}, or '
      'copy blocks there: Transfer(view.blocks(request), target, source).'
    )
  if worker is None:
    raise PolicyError(f'{action!r}: worker {name!r} is unknown; the workers are {", ".join(view.workers)}.')
  return worker


def find_place(view: ClusterView, action: Action, name: str | None) -> WorkerView:
  """The worker, or place that only holds pages, that an action names; raises `PolicyError` if there is none."""
  place = view.places.get(name) if isinstance(name, str) else None
  if name is None:
    raise PolicyError(
      f'{action!r}: blocks need a source; name the place that is to send them, of {", ".join(view.places)}.'
    )
  if place is None:
    raise PolicyError(f'{action!r}: place {name!r} is unknown; the places are {", ".join(view.places)}.')
  return place


def find_way(view: ClusterView, action: Action, source: str, target: str) -> None:
  """Raise `PolicyError` if there is no way from one place to another."""
  if not view.has_way(source, target):
    raise PolicyError(
      f'{action!r}: there is no way from {source!r} to {target!r}; between any two places there is one for a policy '
      'with moves_anywhere = True.'
    )


def check_decodes(action: Action, target: WorkerView) -> None:
  """Raise `PolicyError` if a worker does not decode."""
  if not target.role.decodes:
    raise PolicyError(f'{action!r}: worker {target.name!r} has role {target.role.value}; name one that decodes.')


def check_up(action: Action, worker: WorkerView) -> None:
  """Raise `PolicyError` if a worker is lost."""
  if not worker.up:
    raise PolicyError(f'{action!r}: worker {worker.name!r} is lost ({worker.lost}); wait until it is back.')


def check_takes_new(action: Action, worker: WorkerView) -> None:
  """Raise `PolicyError` if a worker is lost, or draining."""
  check_up(action, worker)
  if worker.draining:
    raise PolicyError(
      f'{action!r}: worker {worker.name!r} is draining to become {worker.draining.value}, so it takes no new request; '
      'name another.'
    )


def describe_needs(view: ClusterView, request: str, worker: str, *, decodes: bool) -> str:
  """The pages and slots that a request takes of a worker, in words."""
  pages, slots = view.describe_pages(request, worker, decodes=decodes), view.slots_needed(request)
  return f'{pages} pages{"" if not decodes else " and a slot" if slots == 1 else f" and {slots} slots"}'


def check_step(view: ClusterView, step: Step) -> list[str] | None:
  """The sequences a step decodes, by id; None for all that can.

  Raises:
    PolicyError: if there is no such worker, or it cannot take the step.
  """
  worker = find_worker(view, step, step.worker)
  check_up(step, worker)
  _check_fields(step)
  if worker.num_steps >= MAX_ORDERS:
    raise PolicyError(
      f'{step!r}: worker {worker.name!r} has {MAX_ORDERS} steps in flight already; wait for one to end.'
    )
  most = 1 if step.chunks else worker.spec.max_fused_steps
  if step.steps is STANDING:
    if step.chunks:
      raise PolicyError(f'{step!r}: chunks are one step, and none that stands; leave out steps, or the chunks.')
  elif not is_integer(step.steps):
    raise PolicyError(f'{step!r}: steps={step.steps!r}, expected an integer or STANDING.')
  elif not 1 <= step.steps <= most:
    raise PolicyError(
      f'{step!r}: steps={step.steps}, but worker {worker.name!r} takes 1 to {most}'
      f'{" beside chunks" if step.chunks else ""}; name one of these, or raise max_fused_steps.'
    )
  decodes: list[str] | None = None
  if isinstance(step.decodes, All):
    has_decodes = worker.is_standing or worker.has_work
  else:
    decodes = list(step.decodes)
    for name, entry in [(name, find_request(view, step, name)) for name in decodes]:
      if name not in worker.decoding or entry.tokens_left < 1:
        raise PolicyError(f'{step!r}: request {name!r} has nothing to decode on worker {worker.name!r}.')
      if not entry.can_step:
        raise PolicyError(
          f'{step!r}: request {name!r} has no page for its next token on worker {worker.name!r}; wait for one, or '
          'preempt another.'
        )
    has_decodes = bool(decodes)
  if not step.chunks and not has_decodes:
    raise PolicyError(f'{step!r}: nothing to do; give it chunks or sequences that can decode.')
  if len({chunk.request for chunk in step.chunks}) != len(step.chunks) or len(decodes or ()) != len(set(decodes or ())):
    raise PolicyError(f'{step!r}: a request stands in it twice.')
  spec = worker.spec
  tokens = sum(chunk.length for chunk in step.chunks)
  if len(step.chunks) > spec.max_chunks or tokens > spec.max_step_tokens:
    raise PolicyError(
      f'{step!r}: {len(step.chunks)} chunks with {tokens} tokens, but worker {worker.name!r} takes '
      f'{spec.max_chunks} chunks and {spec.max_step_tokens} tokens in one step.'
    )
  if step.chunks and not worker.role.prefills:
    raise PolicyError(f'{step!r}: worker {worker.name!r} has role {worker.role.value}, so it takes no chunks.')
  for chunk in step.chunks:
    _check_chunk(view, step, chunk, worker)
  _check_room(view, step, worker)
  return decodes


def _check_fields(step: Step) -> None:
  if not isinstance(step.decodes, All | tuple | list):
    raise PolicyError(f'{step!r}: decodes={step.decodes!r}, expected ALL or a tuple of ids.')
  if not isinstance(step.chunks, tuple | list) or not all(isinstance(chunk, Chunk) for chunk in step.chunks):
    raise PolicyError(f'{step!r}: chunks={step.chunks!r}, expected a tuple of Chunk.')
  for chunk in step.chunks:
    if not is_integer(chunk.start) or not is_integer(chunk.length):
      raise PolicyError(f'{step!r}: {chunk!r} needs integers for start and length.')


def _check_chunk(view: ClusterView, step: Step, chunk: Chunk, worker: WorkerView) -> None:
  entry = find_request(view, step, chunk.request)
  if entry.phase not in (Phase.WAITING, Phase.PREFILLING):
    raise PolicyError(f'{step!r}: request {chunk.request!r} is {entry.phase.value}, so it takes no chunk.')
  if entry.worker not in (None, worker.name):
    raise PolicyError(f'{step!r}: request {chunk.request!r} is being prefilled on {entry.worker!r}.')
  may_start = chunk.start == entry.started or (not entry.started and view.may_be_cached(chunk.start))
  if not may_start or not 1 <= chunk.length <= entry.prefill_len - chunk.start:
    cached = (
      ''
      if entry.started or not view.may_be_cached(0)
      else (
        f'; or at view.cached_tokens({chunk.request!r}, {worker.name!r}), which is '
        f'{view.cached_tokens(chunk.request, worker.name)} now, with that many fewer'
      )
    )
    raise PolicyError(
      f'{step!r}: the next chunk of {chunk.request!r} starts at {entry.started} and has 1 to {entry.prompt_left} '
      f'tokens{cached}.'
    )
  sent_to = None if entry.target == worker.name else entry.target
  if entry.started and chunk.send_to != sent_to:
    raise PolicyError(f'{step!r}: earlier chunks of {chunk.request!r} were sent to {sent_to!r}; treat this one alike.')
  check = check_up if entry.started else check_takes_new
  check(step, worker)
  if chunk.send_to is not None:
    target = find_worker(view, step, chunk.send_to)
    check(step, target)
    if not target.role.decodes or target is worker:
      raise PolicyError(
        f'{step!r}: {chunk.request!r} cannot be sent to {chunk.send_to!r}; name another worker that decodes.'
      )


def decodes_there(worker: WorkerView, chunk: Chunk) -> bool:
  """Whether the request of a chunk goes on to decode where it is prefilled."""
  return worker.role.decodes and chunk.send_to is None


def _check_room(view: ClusterView, step: Step, worker: WorkerView) -> None:
  """Raise unless every worker has the pages and slots that the step's new requests need."""
  room = view.room()
  for chunk in step.chunks:
    if view.requests[chunk.request].started:
      continue
    stays = decodes_there(worker, chunk)
    places = [(worker.name, stays)] + ([(chunk.send_to, True)] if chunk.send_to else [])
    for place, decodes in places:
      start = chunk.start if place == worker.name else None
      if not room.fits(chunk.request, place, decodes=decodes, start=start):
        needs = describe_needs(view, chunk.request, place, decodes=decodes)
        raise PolicyError(
          f'{step!r}: request {chunk.request!r} needs {needs} on {place!r}, which has {room.pages(place)} pages and '
          f'{room.slots(place)} slots left.'
        )
      room.take(chunk.request, place, decodes=decodes, start=start)
