"""A worker's own cost model answers as the config's does, asked about that worker."""

import pytest

from pdjax.cost import Roofline, WorkerCost, as_cost
from pdjax.types import ChipSpec, LinkSpec, ModelSpec, WorkerSpec
from pdjax.types.pools import sent_bytes

LLAMA = ModelSpec.llama3_8b()
COST = Roofline(ChipSpec.tpu_v5e(), LinkSpec(45e9, 0.001))
ONE = WorkerSpec('one', max_step_tokens=512, page_size=16, kv_dtype='bfloat16', weights='bfloat16')
FOUR = WorkerSpec('four', tp=4, max_step_tokens=1024, page_size=64, kv_dtype='bfloat16', weights='bfloat16')


def _bound(spec: WorkerSpec, cost=COST) -> WorkerCost:
  return WorkerCost(as_cost(cost), LLAMA, spec)


@pytest.mark.parametrize('spec', [ONE, FOUR], ids=lambda spec: spec.name)
def test_a_step_takes_what_the_cost_model_says_of_this_worker(spec):
  chunks, contexts = [(16, 100), (0, 7)], [30, 500]
  assert _bound(spec).step_seconds(chunks, contexts, 3) == COST.step_seconds(LLAMA, spec, chunks, contexts, 3)
  assert _bound(spec).decode_seconds(contexts, 2) == COST.step_seconds(LLAMA, spec, [], contexts, 2)
  assert _bound(ONE).step_seconds(chunks, contexts) > _bound(FOUR).step_seconds(chunks, contexts)


def test_a_prompt_takes_as_long_as_its_chunks():
  def chunk(*one: int) -> float:
    return COST.step_seconds(LLAMA, ONE, [one], [], 1)

  cost = _bound(ONE)
  assert cost.prefill_seconds(1100) == chunk(0, 512) + chunk(512, 512) + chunk(1024, 76)
  assert cost.prefill_seconds(512, cached_tokens=100) == chunk(100, 512)
  assert cost.prefill_seconds(300, 64, budget=200) == chunk(64, 200) + chunk(264, 100)
  assert cost.prefill_seconds(1100, budget=4096) == cost.prefill_seconds(1100)  # no chunk is longer than a step takes
  assert cost.prefill_seconds(0, 100) == 0
  with pytest.raises(ValueError, match="worker 'one' is given budget=0, expected 1 or more"):
    cost.prefill_seconds(10, budget=0)


def test_nobody_decodes_in_no_time():
  assert _bound(ONE).decode_seconds([]) == 0 < _bound(ONE).decode_seconds([1])


def test_pages_travel_to_a_worker_or_to_its_cost_in_the_same_time():
  cost = _bound(ONE)
  assert cost.transfer_seconds(FOUR, 10**9) == COST.transfer_seconds(LLAMA, ONE, FOUR, 10**9)
  assert cost.transfer_seconds(_bound(FOUR), 10**9) == cost.transfer_seconds(FOUR, 10**9)
  sent = sent_bytes(LLAMA, ONE, FOUR, 1000)
  assert sent == 1008 * 131_072  # in whole units of 16 tokens
  assert cost.sent_seconds(FOUR, 1000) == cost.transfer_seconds(FOUR, sent)


def test_what_is_asked_again_is_looked_up():
  calls = []

  class Counted:
    def step_seconds(self, model, worker, chunks, contexts, steps):
      calls.append((chunks, contexts, steps))
      return len(calls)

    def transfer_seconds(self, model, source, target, num_bytes):
      return num_bytes

  cost = _bound(ONE, Counted())
  assert cost.step_seconds([(0, 8)], [5]) == cost.step_seconds([(0, 8)], [5]) == 1
  assert cost.decode_seconds([5]) == 2 and cost.decode_seconds([6]) == 3
  assert cost.prefill_seconds(600) == cost.prefill_seconds(600) == 4 + 5
  assert len(calls) == 5 and not cost.calibrated
