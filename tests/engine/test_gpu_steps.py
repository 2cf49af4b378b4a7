"""A worker's steps as GPUs would run them, lowered without one: the device is forced."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import cudnn, devices, dispatch
from pdjax.engine.programs import Decode, Prefill, Program
from pdjax.engine.steps import Steps
from pdjax.engine.worker import Worker
from pdjax.model.transformer import weight_shapes
from pdjax.sharding import make_mesh
from pdjax.types.model import ModelSpec
from pdjax.types.worker import Role, WorkerSpec

LAYER = dataclasses.replace(ModelSpec.llama3_8b(), num_layers=1, context_len=8192)


class Unallocated(Worker):
  """A worker whose pages and slots are shapes alone."""

  def reset(self):
    self.pages = self.page_shapes
    self.slots = self.packing.empty_slots()


def lowered(monkeypatch, program: Program, dtype: str, gpu: str = 'h100') -> str:
  """A step over one layer of Llama 3 8B, as StableHLO for CUDA."""
  monkeypatch.setattr(dispatch, 'current', lambda: devices.by_name(gpu))
  role = Role.PREFILL if isinstance(program, Prefill) else Role.DECODE
  spec = WorkerSpec('gpu', role, num_pages=4096, max_sequences=64, page_size=16, kv_dtype=dtype)
  mesh = make_mesh(LAYER, jax.devices()[:1])
  worker = Unallocated(spec, LAYER, mesh, weight_shapes(LAYER, jnp.dtype(dtype)))
  function = program.function(Steps(LAYER, mesh, spec.max_fused_steps))
  arguments = *(part.of(worker) for part in program.takes), *program.one_token(worker.packing)
  return jax.jit(function).trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()


def loops(text: str) -> int:
  return text.count('stablehlo.while')


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_steps_of_half_precision_have_no_loop_over_blocks_of_the_context(monkeypatch, dtype):
  """Only the drawing of tokens loops, and a decode step that is fused of several."""
  prefill, decode = (lowered(monkeypatch, one, dtype) for one in (Prefill(2048), Decode(64)))
  assert (prefill.count(cudnn.TARGET), decode.count(cudnn.TARGET)) == (2, 1)
  monkeypatch.setattr('pdjax.engine.steps.prefill_attention', lambda q, *args, **options: q)
  monkeypatch.setattr('pdjax.engine.steps.paged_attention', lambda q, *args, **options: q)
  assert loops(prefill) == loops(lowered(monkeypatch, Prefill(2048), dtype))
  assert loops(decode) == loops(lowered(monkeypatch, Decode(64), dtype))


def test_steps_of_older_gpus_and_of_float32_walk_over_long_contexts(monkeypatch):
  for dtype, gpu in (('float32', 'h100'), ('float16', 't4')):
    text = lowered(monkeypatch, Prefill(2048), dtype, gpu)
    assert cudnn.TARGET not in text
    assert loops(text) == loops(lowered(monkeypatch, Prefill(2048), 'bfloat16')) + 2  # rows, and their blocks
