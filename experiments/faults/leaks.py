"""Leaks: pages, slots, staging, transfers and requests that a cluster still holds once nobody is served any more."""

import math

from pdjax.engine.engine import Engine
from pdjax.serving.state import ClusterState


def leaks(state: ClusterState) -> list[str]:
  """Everything that is not free or not over in the books of a cluster, in sentences; none if all is as it began."""
  found = []
  books = state.books
  for name, worker in books.places.items():
    holdings = books.holdings[name]
    if worker.free_pages != worker.num_pages:
      found.append(f'{worker.num_pages - worker.free_pages} of {worker.num_pages} pages of {name} are held.')
    for way, staging in (('out of', holdings.staging_out), ('into', holdings.staging_in)):
      if staging.free_bytes != staging.num_bytes:
        found.append(f'{staging.num_bytes - staging.free_bytes} bytes of staging {way} {name} are taken.')
    if sorted(holdings.slots) != list(range(worker.spec.max_sequences)):
      found.append(f'of {worker.spec.max_sequences} slots of {name} these are free: {sorted(holdings.slots)}.')
    if worker.num_steps or worker.prefilling or worker.decoding or worker.queued_tokens:
      found.append(
        f'{name} has {worker.num_steps} steps under way, {len(worker.prefilling)} prompts, {len(worker.decoding)} '
        f'sequences and {worker.queued_tokens} queued tokens.'
      )
  if books.requests or books.waiting or books.prefilled:
    found.append(f'the requests {", ".join({**books.requests, **books.waiting, **books.prefilled})} are not over.')
  if books.in_flight:
    found.append(f'the orders {", ".join(map(str, books.in_flight))} are under way.')
  if books.transfers:
    found.append('transfers are under way, or to be tried again.')
  if books.transfers._behind:
    found.append(f'transfers wait for the steps {", ".join(map(str, books.transfers._behind))}.')
  if books.copies or books.moving:
    found.append(f'{len(books.copies)} copies of cached blocks are under way, and {len(books.moving)} requests move.')
  if books.due:
    found.append(f'KV of {", ".join(books.due)} is to be sent on.')
  if books.must or books.tasks:
    found.append(f'these are to be done: {", ".join(map(repr, [*books.must.values(), *books.tasks]))}.')
  if books.unsettled:
    found.append(f'{", ".join(one.request.id for one in books.unsettled)} are to be looked at again.')
  if books.samples:
    found.append(f'the samples {", ".join(books.samples)} are followed.')
  timers = [timer for timer, due_s in books.timers._due_s.items() if math.isfinite(due_s)]
  if timers and all(place.up for place in books.places.values()):
    found.append(f'the timers {", ".join(f"{name} of {about}" for name, about in timers)} are set.')
  return found


def engine_leaks(engine: Engine) -> list[str]:
  """Requests and transfers that an engine and its workers still know, in sentences."""
  found = []
  for name, worker in engine.workers.items():
    if worker.followed.ids:
      found.append(f'worker {name} still follows {", ".join(worker.followed.ids)}.')
  if under_way := engine._incoming.under_way:
    found.append(f'the engine still waits for the transfers {", ".join(str(one.number) for one in under_way)}.')
  return found
