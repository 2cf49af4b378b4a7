"""The event as plain data: what one line of a log's file holds."""

import dataclasses
from typing import Any

from pdjax.serving.block_keys import NO_PARENT, split
from pdjax.serving.events import (
  Arrived,
  BlockRemoved,
  BlockStored,
  Decoded,
  Delivered,
  Done,
  Event,
  Occupancy,
  Result,
  Started,
  WorkerBack,
)
from pdjax.serving.orders import (
  AbandonOrder,
  Admission,
  ChunkOrder,
  EndOrder,
  Join,
  LeaveOrder,
  Order,
  StepOrder,
  TransferOrder,
)
from pdjax.types.request import Request


def event_to_json(event: Event) -> dict[str, Any]:
  """The event as plain dicts, lists, strings and numbers; what one line of the file holds."""
  kind = type(event).__name__
  match event:
    case Arrived(request):
      return {'event': kind, 'request': _request(request)}
    case Started(now_s, order):
      return {'event': kind, 'now_s': now_s, 'order': _order(order)}
    case Done():
      results = [_result(result) for result in event.results]
      decoded = None if event.decoded is None else _decoded(event.decoded)
      trip = event.trip and _fields(event.trip)
      return {'event': kind, **_fields(event), 'results': results, 'decoded': decoded, 'trip': trip}
    case Delivered():
      late = [one.request for one in event.late] if event.late_rows or event.late_firsts else []
      return {'event': kind, 'now_s': event.now_s, 'order': event.order, 'late': late}
    case WorkerBack():
      return {'event': kind, **_fields(event), 'comeback': event.comeback and _fields(event.comeback)}
    case Occupancy():
      return {'event': kind, **_fields(event), 'workers': [_fields(use) for use in event.workers]}
    case BlockStored():
      parent = None if event.parent == NO_PARENT else event.parent.hex()
      return {
        'event': kind, 'now_s': event.now_s, 'block_hashes': _hashes(event.keys), 'parent_block_hash': parent,
        'token_ids': event.token_ids, 'block_size': event.block_size, 'lora_id': None, 'medium': event.medium,
      }  # fmt: skip
    case BlockRemoved():
      return {'event': kind, 'now_s': event.now_s, 'block_hashes': _hashes(event.keys), 'medium': event.medium}
    case _:
      return {'event': kind, **_fields(event)}


def _hashes(keys: bytes) -> list[str]:
  return [key.hex() for key in split(keys)]


def _request(request: Request) -> dict[str, Any]:
  return {
    'id': request.id,
    'prompt_len': request.prompt_len,
    'sampling': _fields(request.sampling),
    'arrival_s': request.arrival_s,
    'slo': request.slo and _fields(request.slo),
    'session': request.session,
    'tenant': request.tenant,
    'class_name': request.class_name,
    'priority': request.priority,
    'deadline_s': request.deadline_s,
    'has_cache_salt': request.cache_salt is not None,
    'cache_prefix': request.cache_prefix,
    'num_block_hashes': len(request.block_hashes),
    'block_size': request.block_size,
    'end_token_ids': request.end_token_ids,
  }


def _order(order: Order) -> dict[str, Any]:
  named = {'order': type(order).__name__, **_fields(order)}
  match order:
    case StepOrder():
      changes = {'joins': [_join(one) for one in order.joins], 'growth': [_fields(one) for one in order.growth]}
      return {**named, 'chunks': [_chunk(chunk) for chunk in order.chunks], **changes}
    case TransferOrder():
      return {**{name: value for name, value in named.items() if name != 'span'}, **_fields(order.span)}
    case EndOrder() | AbandonOrder() | LeaveOrder():
      return named


def _chunk(chunk: ChunkOrder) -> dict[str, Any]:
  return {**_fields(chunk), 'request': chunk.request.id}


def _join(join: Join) -> dict[str, Any]:
  return {**_fields(join), 'admission': join.admission and _admission(join.admission)}


def _decoded(decoded: Decoded) -> dict[str, Any]:
  logprobs = {str(row): [_fields(one) for one in told] for row, told in decoded.logprobs.items()}
  is_one = not any(decoded.tokens.strides) and decoded.tokens.size  # one number stands for all, as a simulator has it
  return {
    'tokens': int(decoded.tokens[0, 0]) if is_one else decoded.tokens.tolist(), 'counts': decoded.counts.tolist(),
    'ended': [_fields(one) for one in decoded.ended], 'texts': decoded.texts, 'logprobs': logprobs,
    'ends_s': decoded.ends_s,
  }  # fmt: skip


def _admission(admission: Admission) -> dict[str, Any]:
  return {**_fields(admission), 'request': admission.request.id}


def _result(result: Result) -> dict[str, Any]:
  return {
    'request': result.request, 'tokens': result.tokens, 'finish_reason': result.finish_reason, 'text': result.text,
    'logprobs': [_fields(logprob) for logprob in result.logprobs] if result.logprobs else [], 'error': result.error,
  }  # fmt: skip


_FIELD_NAMES: dict[type, tuple[str, ...]] = {}


def _fields(message: Any) -> dict[str, Any]:
  """Like `dataclasses.asdict` but one level deep and without copies: half the cost of a line was there."""
  names = _FIELD_NAMES.get(type(message))
  if names is None:
    names = tuple(field.name for field in dataclasses.fields(message) if field.repr)
    _FIELD_NAMES[type(message)] = names
  return {name: getattr(message, name) for name in names}
