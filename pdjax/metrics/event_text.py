"""The line of an event: what `event_to_json` has in it, at a fraction of the cost where there are many."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pdjax.metrics.event_json import event_to_json
from pdjax.serving.events import Decoded, Delivered, Done, Event, Finished, Occupancy, PrefixHit, Started, Trip, Turn
from pdjax.serving.orders import Admission, ChunkOrder, Join, LeaveOrder, StepOrder, TransferOrder
from pdjax.types.json_text import json_text


def event_text(event: Event) -> str:
  """The event as one line of JSON, without its end."""
  write = _WRITERS.get(type(event))
  text = None if write is None else write(event)
  return json_text(event_to_json(event)) if text is None else text


_name = functools.lru_cache(maxsize=1 << 14)(json.dumps)  # of requests and workers, which come again and again


def _float(value: Any) -> str:
  return (
    repr(value) if type(value) is float and value - value == 0.0 else json_text(value)
  )  # what is not finite is text


def _ints(values: Iterable[int]) -> str:
  return str([*values])


def _pages(pages: Mapping[str, tuple[int, ...]]) -> str:
  return '{' + ', '.join([f'{_name(kind)}: {_ints(numbers)}' for kind, numbers in pages.items()]) + '}'


def _turn(event: Turn) -> str:
  return f'{{"event": "Turn", "now_s": {_float(event.now_s)}}}'


def _delivered(event: Delivered) -> str | None:
  if event.late_rows or event.late_firsts:
    return None
  return f'{{"event": "Delivered", "now_s": {_float(event.now_s)}, "order": {event.order}, "late": []}}'


def _done(event: Done) -> str:
  results = '[]' if not event.results else json_text(event_to_json(event)['results'])
  decoded = 'null' if event.decoded is None else _decoded(event.decoded)
  to_come = 'null' if event.to_come is None else event.to_come
  trip = 'null' if event.trip is None else _trip(event.trip)
  return (
    f'{{"event": "Done", "order": {event.order}, "began_s": {_float(event.began_s)}, '
    f'"ended_s": {_float(event.ended_s)}, "results": {results}, "decoded": {decoded}, "to_come": {to_come}, '
    f'"wasted_tokens": {event.wasted_tokens}, "wire_bytes": {event.wire_bytes}, "trip": {trip}}}'
  )


def _trip(trip: Trip) -> str:
  return (
    f'{{"wire_began_s": {_float(trip.wire_began_s)}, "arrived_s": {_float(trip.arrived_s)}, "pieces": {trip.pieces}}}'
  )


def _decoded(decoded: Decoded) -> str:
  is_one = decoded.tokens.size and not any(decoded.tokens.strides)
  tokens = decoded.tokens[0, 0] if is_one else decoded.tokens.tolist()
  ended = [
    f'{{"row": {one.row}, "finish_reason": "{one.finish_reason}", '
    f'"error": {"null" if one.error is None else json_text(one.error)}}}'
    for one in decoded.ended
  ]
  texts = json_text(decoded.texts) if decoded.texts else '[]'
  logprobs = '{}' if not decoded.logprobs else json_text({str(row): told for row, told in decoded.logprobs.items()})
  return (
    f'{{"tokens": {tokens}, "counts": {decoded.counts.tolist()}, "ended": [{", ".join(ended)}], "texts": {texts}, '
    f'"logprobs": {logprobs}, "ends_s": [{", ".join(map(_float, decoded.ends_s))}]}}'
  )


def _occupancy(event: Occupancy) -> str:
  uses = [
    f'{{"worker": {_name(use.worker)}, "pages": {use.pages}, "decoding": {use.decoding}, "cached": {use.cached}}}'
    for use in event.workers
  ]
  return (
    f'{{"event": "Occupancy", "now_s": {_float(event.now_s)}, "waiting": {event.waiting}, '
    f'"workers": [{", ".join(uses)}]}}'
  )


def _hit(event: PrefixHit) -> str:
  return (
    f'{{"event": "PrefixHit", "now_s": {_float(event.now_s)}, "request": {_name(event.request)}, '
    f'"place": {_name(event.place)}, "tokens": {event.tokens}, "side": "{event.side}"}}'
  )


def _finished(event: Finished) -> str:
  error = 'null' if event.error is None else json_text(event.error)
  return (
    f'{{"event": "Finished", "now_s": {_float(event.now_s)}, "request": {_name(event.request)}, '
    f'"finish_reason": "{event.finish_reason}", "tokens": {_ints(event.tokens)}, "error": {error}, '
    f'"cached_tokens": {event.cached_tokens}}}'
  )


def _started(event: Started) -> str | None:
  match event.order:
    case StepOrder():
      order: str | None = _step(event.order)
    case TransferOrder():
      order = _transfer(event.order)
    case LeaveOrder(number, request, worker):
      order = f'{{"order": "LeaveOrder", "id": {number}, "request": {_name(request)}, "worker": {_name(worker)}}}'
    case _:
      return None
  return f'{{"event": "Started", "now_s": {_float(event.now_s)}, "order": {order}}}'


def _step(order: StepOrder) -> str:
  growth = '[]'
  if order.growth:
    growth = json_text([{'slot': one.slot, 'pages': one.pages, 'reach': one.reach} for one in order.growth])
  groups = str([[*group] for group in order.layer_groups])
  return (
    f'{{"order": "StepOrder", "id": {order.id}, "worker": {_name(order.worker)}, '
    f'"chunks": [{", ".join(map(_chunk, order.chunks))}], "joins": [{", ".join(map(_join, order.joins))}], '
    f'"leaves": {_ints(order.leaves)}, "growth": {growth}, "decodes": {_bool(order.decodes)}, "steps": {order.steps}, '
    f'"standing": {_bool(order.standing)}, "incarnation": {order.incarnation}, "layer_groups": {groups}}}'
  )


def _bool(value: bool) -> str:
  return 'true' if value else 'false'


def _optional(value: int | None) -> str:
  return 'null' if value is None else str(value)


def _chunk(chunk: ChunkOrder) -> str:
  return (
    f'{{"request": {_name(chunk.request.id)}, "start": {chunk.start}, "length": {chunk.length}, '
    f'"pages": {_pages(chunk.pages)}, "limit": {chunk.limit}, "slot": {_optional(chunk.slot)}, '
    f'"delivered": {_ints(chunk.delivered)}, "copies": {json_text(chunk.copies) if chunk.copies else "{}"}, '
    f'"begins": {_bool(chunk.begins)}}}'
  )


def _join(join: Join) -> str:
  admission = 'null' if join.admission is None else _admission(join.admission)
  return (
    f'{{"request": {_name(join.request)}, "slot": {join.slot}, "context": {join.context}, "left": {join.left}, '
    f'"reach": {_optional(join.reach)}, "admission": {admission}}}'
  )


def _admission(admission: Admission) -> str:
  copies = json_text(admission.copies) if admission.copies else '{}'
  return (
    f'{{"request": {_name(admission.request.id)}, "pages": {_pages(admission.pages)}, '
    f'"tokens": {_ints(admission.tokens)}, "limit": {admission.limit}, "copies": {copies}}}'
  )


def _transfer(order: TransferOrder) -> str:
  span = order.span
  layers = 'null' if span.layers is None else _ints(span.layers)
  return (
    f'{{"order": "TransferOrder", "id": {order.id}, "request": {_name(order.request)}, '
    f'"source": {_name(order.source)}, "target": {_name(order.target)}, "after": {_optional(order.after)}, '
    f'"incarnations": {_ints(order.incarnations)}, "num_bytes": {order.num_bytes}, '
    f'"copy": {_optional(order.copy)}, "source_pages": {_ints(span.source_pages)}, '
    f'"target_pages": {_ints(span.target_pages)}, "start": {span.start}, '
    f'"tokens": {span.tokens}, "layers": {layers}, "kind": {_name(span.kind)}}}'
  )


_WRITERS: dict[type, Callable[[Any], str | None]] = {
  Turn: _turn, Delivered: _delivered, Done: _done, Occupancy: _occupancy, PrefixHit: _hit, Finished: _finished,
  Started: _started,
}  # fmt: skip
