"""The forecast of a first token: what a worker has to compute before it, by that worker's own cost model."""

from pdjax.serving.view import RequestView, Room, WorkerView

_CONTEXT_STEP = 256  # to which a mean context is rounded, so that a cost model is asked the same again


def first_token_seconds(request: RequestView, worker: WorkerView, room: Room) -> float:
  """Predicted seconds until a prompt is computed at a worker, behind what that was given and beside what it decodes.

  Args:
    request: A request that waits.
    worker: A worker that prefills.
    room: Says what is cached there, what was given to it in this decision too, and how much a step takes.
  """
  name, cost = worker.name, worker.cost
  cached = room.cached_tokens(request.request.id, name)
  left = room.queued_tokens(name) + max(request.prefill_len - cached, 1)
  chunk = min(left, room.step_tokens(name))
  batch = len(worker.decoding)
  contexts = (_mean_context(worker, batch),) * batch
  # A chunk in the middle attends to as many tokens as all do in the mean.
  between = cached + (left - chunk) // 2
  return left / chunk * cost.step_seconds(((between, chunk),), contexts)


def _mean_context(worker: WorkerView, batch: int) -> int:
  """Tokens of a sequence of a batch by the pages that are held, those for tokens to come counted."""
  if not batch:
    return 0
  tokens = (worker.num_pages - worker.free_pages) * worker.page_size // batch
  return tokens // _CONTEXT_STEP * _CONTEXT_STEP + _CONTEXT_STEP
