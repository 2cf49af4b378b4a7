"""What a cluster still holds once nobody is served any more: pages, slots, staging, transfers, and requests."""

import math

from pdjax.engine.engine import Engine
from pdjax.serving.state import ClusterState


def leaks(state: ClusterState) -> list[str]:
  """What is not free or not over in the books of a cluster, each in a sentence; nothing if all is as it began."""
  found = []
  for name, worker in state.workers.items():
    if worker.allocator.num_free != worker.num_pages:
      found.append(f'{worker.num_pages - worker.allocator.num_free} of {worker.num_pages} pages of {name} are held.')
    for way, staging in (('out of', worker.staging_out), ('into', worker.staging_in)):
      if staging.free_bytes != staging.num_bytes:
        found.append(f'{staging.num_bytes - staging.free_bytes} bytes of staging {way} {name} are taken.')
    if sorted(worker.free_slots) != list(range(worker.spec.max_sequences)):
      found.append(f'of {worker.spec.max_sequences} slots of {name} these are free: {sorted(worker.free_slots)}.')
    if worker.orders or worker.prefilling or worker.decoding or worker.queued_tokens:
      found.append(
        f'{name} has {len(worker.orders)} passes under way, {len(worker.prefilling)} prompts, {len(worker.decoding)} '
        f'sequences and {worker.queued_tokens} queued tokens.'
      )
  if state.requests or state.waiting or state.prefilled:
    found.append(f'the requests {", ".join({**state.requests, **state.waiting, **state.prefilled})} are not over.')
  if state._in_flight:
    found.append(f'the orders {", ".join(map(str, state._in_flight))} are under way.')
  if state._transfers:
    found.append('transfers are under way, or to be tried again.')
  if state._transfers._behind:
    found.append(f'transfers wait for the passes {", ".join(map(str, state._transfers._behind))}.')
  if state._due:
    found.append(f'KV of {", ".join(state._due)} is to be sent on.')
  if state._must or state._tasks:
    found.append(f'these are to be done: {", ".join(map(repr, [*state._must.values(), *state._tasks]))}.')
  if state._samples:
    found.append(f'the samples {", ".join(state._samples)} are followed.')
  timers = [timer for timer, due_s in state._timers._due_s.items() if math.isfinite(due_s)]
  if timers and all(worker.up for worker in state.workers.values()):
    found.append(f'the timers {", ".join(f"{name} of {about}" for name, about in timers)} are set.')
  return found


def engine_leaks(engine: Engine) -> list[str]:
  """What an engine and its workers still know of requests and transfers, each in a sentence."""
  found = []
  for name, worker in engine.workers.items():
    if worker._progress:
      found.append(f'worker {name} still follows {", ".join(worker._progress)}.')
  if under_way := engine._incoming.under_way:
    found.append(f'the engine still waits for the transfers {", ".join(str(one.number) for one in under_way)}.')
  return found
