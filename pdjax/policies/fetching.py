"""Cached blocks from place to place: fetched before a prompt begins, and kept elsewhere when a request has ended."""

from collections.abc import Iterable

from pdjax.serving.actions import Transfer
from pdjax.serving.view import ClusterView, RequestView, WorkerView


def fetch_for(view: ClusterView, entry: RequestView, worker: WorkerView, least: int) -> Transfer | None:
  """The copy of a prompt's beginning from the place that holds most of it, if that is worth it; it is tried once.

  Args:
    view: The cluster.
    entry: A request that waits.
    worker: The worker that is to prefill it.
    least: Fewest tokens that are to come.
  """
  request, name = entry.request.id, worker.name
  if not view.caches or name in entry.copies_asked:
    return None
  best, most = None, view.cached_tokens(request, name) + least - 1
  for place in view.places.values():
    if place.up and (tokens := view.fetchable_tokens(request, place.name, name)) > most:
      best, most = place.name, tokens
  return None if best is None else Transfer(view.blocks(entry), name, best)


def keep_ended(view: ClusterView, returns_to: str | None) -> Iterable[Transfer]:
  """The copies of what requests leave that have just ended, to a place or, with 'source', to where they were prefilled.

  Blocks that are there already do not travel, nor those with which no prompt could go on there.
  """
  if returns_to is None:
    return
  for entry in view.ended.values():
    source, target = entry.target or entry.worker, entry.prefilled_by if returns_to == 'source' else returns_to
    if source is None or target is None or target == source or not view.places[source].up:
      continue
    if target not in view.places or (view.places[target].up and not view.places[target].draining):
      yield Transfer(view.blocks(entry), target, source)  # of a place that is unknown the error tells
