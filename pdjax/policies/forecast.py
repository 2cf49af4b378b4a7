"""The forecast of a first token: what a worker has to fetch and compute before it, by that worker's own cost model."""

from pdjax.serving.view import RequestView, Room, WorkerView

_CONTEXT_STEP = 256  # to which a mean context is rounded, so that a cost model is asked the same again
_STANDING_AHEAD = 1.5  # steps of a standing order: of the one that runs half is left on average, another is ready


def first_token_seconds(request: RequestView, worker: WorkerView, room: Room) -> float:
  """Predicted seconds until a prompt is computed at a worker, behind what that was given and beside what it decodes.

  What another place holds of it is taken to be fetched first, if that holds more and was not tried before.

  Args:
    request: A request that waits.
    worker: A worker that prefills.
    room: Says what is cached there, what was given to it in this decision too, and how much a step takes.
  """
  name, cost = worker.name, worker.cost
  cached, ahead_s = room.cached_tokens(request.request.id, name), 0.0
  fetched, source = room.fetchable_tokens(request.request.id, name)
  if source is not None and name not in request.copies_asked:
    ahead_s, cached = source.cost.sent_seconds(cost, fetched - cached), fetched
  left = room.queued_tokens(name) + max(request.prefill_len - cached, 1)
  chunk = min(left, room.step_tokens(name))
  batch = len(worker.decoding)
  contexts = (_mean_context(worker, batch),) * batch
  if batch:
    steps = _STANDING_AHEAD if worker.is_standing else worker.num_steps - 0.5
    ahead_s += max(steps, 0.0) * cost.step_seconds((), contexts)
  # A chunk in the middle attends to as many tokens as all do in the mean.
  between = cached + (left - chunk) // 2
  return ahead_s + left / chunk * cost.step_seconds(((between, chunk),), contexts)


def decode_step_seconds(worker: WorkerView) -> float:
  """Predicted seconds of a decode step of all that a worker decodes; 0 if that is nobody."""
  batch = len(worker.decoding)
  return worker.cost.decode_seconds((_mean_context(worker, batch),) * batch)


def _mean_context(worker: WorkerView, batch: int) -> int:
  """Tokens of a sequence of a batch by the pages that are held, those for tokens to come counted."""
  if not batch:
    return 0
  tokens = (worker.num_pages - worker.free_pages) * worker.page_size // batch
  return tokens // _CONTEXT_STEP * _CONTEXT_STEP + _CONTEXT_STEP
