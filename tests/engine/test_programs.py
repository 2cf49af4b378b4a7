"""The table of programs: its buckets by role, what each program donates, and that another needs nothing but a class."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdjax.engine import programs
from pdjax.engine.programs import KINDS, SLOTS, WEIGHTS, Group, Layers, Program, layer_groups, programs_of
from pdjax.engine.worker import Worker
from pdjax.types import TransferSpec, WorkerSpec
from tests.engine.cluster import Cluster
from tests.tiny import TINY

BY_LAYERS = TransferSpec(granularity='layers')
SPEC = WorkerSpec('any', num_pages=64, max_sequences=12, max_step_tokens=64, page_size=4, kv_dtype='float32')
PAIR = tuple(Group(layer, layer + 1, 0) for layer in range(2))  # one program


def table(role: str, groups=()) -> list[str]:
  return list(programs_of(dataclasses.replace(SPEC, role=role), groups))


def anew(cluster: Cluster, name: str, transfer: TransferSpec | None = None) -> Worker:
  """A worker like one of a cluster, with nothing compiled."""
  worker = cluster.workers[name]
  return Worker(worker.spec, worker.model, worker.mesh, worker.weights, transfer=transfer)


def test_the_table_of_a_role_has_exactly_its_buckets():
  decodes = ['decodex1', 'decodex8', 'decodex12']
  assert table('prefill') == ['remember', 'copy', 'prefillx32', 'prefillx64']
  assert table('decode') == ['remember', 'admit', 'grow', 'copy', *decodes]
  assert table('both') == ['remember', 'admit', 'grow', 'copy', 'fusedx32x12', 'fusedx64x12', *decodes]


def test_a_prefill_in_groups_of_layers_has_a_program_for_each_that_differs_and_none_of_a_whole_step():
  assert table('prefill', PAIR) == [
    'remember', 'copy', 'beginx32', 'beginx64', 'layersx32x0x1', 'layersx64x0x1', 'finishx32', 'finishx64',
  ]  # fmt: skip
  uneven = layer_groups(dataclasses.replace(TINY, num_layers=5), ((0, 1), (1, 3), (3, 5)))
  assert uneven == (Group(0, 1, 0), Group(1, 3, 1), Group(3, 5, 1))
  assert [name for name in table('prefill', uneven) if 'layersx32' in name] == ['layersx32x0x1', 'layersx32x1x2']


def test_groups_as_long_but_of_other_windows_share_no_program():
  windows = dataclasses.replace(TINY, num_layers=4, sliding_window=8, windowed_layers=(1, 3))
  bounds = ((0, 1), (1, 2), (2, 3), (3, 4))
  assert [group.like for group in layer_groups(windows, bounds)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
  ('fixture', 'name', 'transfer'),
  [
    ('two_and_two', 'prefill0', None),
    ('two_and_two', 'prefill0', BY_LAYERS),
    ('two_and_two', 'decode0', None),
    ('colocated_pair', 'both0', None),
  ],
  ids=['prefill', 'by layers', 'decode', 'both'],
)
def test_what_a_program_donates_is_gone_after_it_ran_and_all_else_is_there(
  fixture, name, transfer, request, monkeypatch
):
  worker = anew(request.getfixturevalue(fixture), name, transfer)
  run, seen = Worker.run, []

  def runs(worker: Worker, program: Program, *arguments):
    taken = [*(part.of(worker) for part in program.takes), *arguments]
    out = run(worker, program, *arguments)
    for place, argument in enumerate(taken):
      gone = [leaf.is_deleted() for leaf in jax.tree.leaves(argument) if isinstance(leaf, jax.Array)]
      assert gone == [place in program.donates] * len(gone), (program.name, place)
    seen.append(program.name)
    return out

  monkeypatch.setattr(Worker, 'run', runs)
  worker.compile('highest')
  assert set(seen) == set(worker.programs)
  assert not worker.broken
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(worker.weights))


def test_layers_are_taken_out_of_the_state_and_put_back_where_they_were(two_and_two):
  worker = anew(two_and_two, 'prefill0', BY_LAYERS)
  program = Layers(32, Group(1, 2, 0))
  first, second = worker.pages.layers
  weights, part = (one.of(worker) for one in program.takes)
  assert weights == [worker.weights['layers'][1]] and part.layers == (second,)
  new = dataclasses.replace(part, layers=(jnp.ones_like(second),))
  program.gives_back[0].put(worker, new)
  assert worker.pages.layers == (first, new.layers[0])
  assert program.name == Layers(32, Group(0, 1, 0)).name  # which is what is compiled


@dataclasses.dataclass(frozen=True)
class Mark(Program):
  """A program that the package does not have: adds a number to rows of the history, and gives two sums."""

  rows: int

  takes, gives_back = (WEIGHTS, SLOTS), (SLOTS,)

  @property
  def name(self) -> str:
    return f'markx{self.rows}'

  @classmethod
  def all_of(cls, spec, groups):
    return [cls(rows) for rows in (1, 2)] if spec.role.decodes else []

  def function(self, steps):
    def mark(weights, slots, number):
      slots = dataclasses.replace(slots, history=slots.history.at[: self.rows, 0].add(number))
      return slots, slots.history[:, 0].sum(), weights['embed'].shape[0] + number

    return mark

  def one_token(self, packing):
    return (np.uint16(packing.num_slots),)


def test_a_program_added_to_the_table_is_compiled_run_at_warm_up_and_run_by_name(two_and_two, monkeypatch):
  monkeypatch.setattr(programs, 'KINDS', (*KINDS, Mark))
  prefill, decode = (anew(two_and_two, name) for name in ('prefill0', 'decode0'))
  assert set(prefill.programs) == set(two_and_two.workers['prefill0'].programs)
  assert decode.compile('highest').keys() == {*two_and_two.workers['decode0'].programs, 'markx1', 'markx2'}
  slots = decode.spec.max_sequences
  assert decode.slots.history[:2, 0].tolist() == [2 * slots, slots]
  before = decode.slots
  total, size = decode.run(decode.programs['markx2'], np.uint16(5))
  assert before.history.is_deleted() and not decode.broken
  assert (int(total), int(size)) == (3 * slots + 10, TINY.vocab_size + 5)
  assert decode.slots.history[:2, 0].tolist() == [2 * slots + 5, slots + 5]
  assert decode.program('markx2').memory_analysis().alias_size_in_bytes >= decode.slots.history.nbytes
