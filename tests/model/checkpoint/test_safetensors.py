"""Hugging Face folders give the weights that were written into them, in our names and shapes."""

import dataclasses
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pdjax.model.checkpoint import SafetensorsCheckpoint, open_checkpoint, tensor_shapes
from pdjax.model.checkpoint import safetensors as safetensors_format
from pdjax.types import ModelSpec, RopeScaling
from tests.data.tied_heads import HEADS
from tests.hf import hf_tensors
from tests.model.numpy_llama import NumpyLlama

FAMILIES = pathlib.Path(__file__).parents[2] / 'data' / 'families'
ABSENT = object()

CONFIG = {
  'model_type': 'llama',
  'hidden_size': 12,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 6,
  'intermediate_size': 20,
  'vocab_size': 30,
  'max_position_embeddings': 64,
  'rms_norm_eps': 1e-6,
  'rope_theta': 50_000.0,
  'torch_dtype': 'float32',
  'eos_token_id': 2,
}


def spec_of(name: str, **changes) -> ModelSpec:
  spec = ModelSpec(
    name=name, num_layers=2, embed_dim=12, query_heads=4, kv_heads=2, head_dim=6, ffn_dim=20, vocab_size=30,
    context_len=64, rope_theta=50_000.0, norm_eps=1e-6, eos_token_ids=(2,),
  )  # fmt: skip
  return dataclasses.replace(spec, **changes)


def write(folder, dtype=np.float32, config=None, tied=False, shards=1, extra=None, without=(), **spec):
  """Write a tiny checkpoint; returns its weights. `config` replaces (or, with ABSENT, removes) keys."""
  rng = np.random.default_rng(0)
  shapes = tensor_shapes(spec_of('tiny', tied_embeddings=tied, **spec))
  weights = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
  tensors = {k: v for k, v in hf_tensors(weights).items() if k not in without} | (extra or {})
  merged = CONFIG | {'tie_word_embeddings': tied} | (config or {})
  (folder / 'config.json').write_text(json.dumps({k: v for k, v in merged.items() if v is not ABSENT}))
  if shards == 1:
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
    return weights
  weight_map = {name: f'model-{i % shards + 1:05}-of-{shards:05}.safetensors' for i, name in enumerate(tensors)}
  for shard in set(weight_map.values()):
    held = {name: tensors[name] for name in tensors if weight_map[name] == shard}
    safetensors.numpy.save_file(held, folder / shard)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
  return weights


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_come_back_in_our_shapes_and_their_own_type(tmp_path, dtype, shards, tied):
  weights = write(tmp_path, dtype=dtype, shards=shards, tied=tied)
  checkpoint = SafetensorsCheckpoint(tmp_path)
  assert checkpoint.spec.tied_embeddings == tied
  for name, weight in weights.items():
    found = checkpoint.tensor(name)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, weight, err_msg=name)


WINDOWS = {'use_sliding_window': True, 'sliding_window': 5}
WIDER = {'hidden_size': 16}
LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
NEWER = {'rope_theta': ABSENT, 'torch_dtype': ABSENT, 'dtype': 'bfloat16'}


@pytest.mark.parametrize(
  ('older', 'newer', 'scaling'),
  [
    ({}, {}, None),
    ({'rope_scaling': None}, {'rope_type': None}, None),
    ({'rope_scaling': {'type': 'default'}}, {'rope_type': 'default'}, None),
    (
      {'rope_scaling': {'type': 'linear', 'factor': 2}},
      {'rope_type': 'linear', 'factor': 2.0},
      RopeScaling('linear', 2.0),
    ),
    (
      {'rope_scaling': {'rope_type': 'llama3', **LLAMA3}},
      {'rope_type': 'llama3', **LLAMA3},
      RopeScaling('llama3', 8.0, 1.0, 4.0, 16),
    ),
  ],
)
def test_older_and_newer_configs_give_the_same_spec(tmp_path, older, newer, scaling):
  write(tmp_path, config=older)
  checkpoint = open_checkpoint(tmp_path)
  assert (checkpoint.spec, checkpoint.dtype) == (spec_of(tmp_path.name, rope_scaling=scaling), np.float32)
  write(tmp_path, config={**NEWER, 'rope_parameters': {'rope_theta': 50_000.0, **newer}})
  checkpoint = open_checkpoint(tmp_path)
  assert (checkpoint.spec, checkpoint.dtype) == (spec_of(tmp_path.name, rope_scaling=scaling), ml_dtypes.bfloat16)


def test_the_original_context_of_llama3_scaling_is_found_wherever_it_stands(tmp_path):
  scaling = {'rope_type': 'llama3', **LLAMA3}
  write(tmp_path, config={'rope_scaling': scaling, 'original_max_position_embeddings': 32})
  assert SafetensorsCheckpoint(tmp_path).spec.rope_scaling.original_context_len == 32
  scaling.pop('original_max_position_embeddings')
  write(tmp_path, config={'rope_scaling': scaling})
  assert SafetensorsCheckpoint(tmp_path).spec.rope_scaling.original_context_len == 64  # all there is


@pytest.mark.parametrize(('gone', 'ends'), [(ABSENT, (2,)), (None, ())])  # a null says that nothing ends a sequence
def test_missing_settings_take_the_defaults_of_the_format(tmp_path, gone, ends):
  keys = ('rope_theta', 'rms_norm_eps', 'max_position_embeddings', 'eos_token_id')
  write(tmp_path, config=dict.fromkeys(keys, gone))
  expected = spec_of(tmp_path.name, rope_theta=10_000.0, norm_eps=1e-6, context_len=2048, eos_token_ids=ends)
  assert SafetensorsCheckpoint(tmp_path).spec == expected


@pytest.mark.parametrize(
  ('config', 'spec'),
  [
    ({'model_type': 'llama', 'num_key_value_heads': ABSENT, 'head_dim': ABSENT, **WIDER},
      {'kv_heads': 4, 'head_dim': 4, 'embed_dim': 16}),
    ({'model_type': 'llama', 'num_key_value_heads': None, 'head_dim': None, **WIDER},
      {'kv_heads': 4, 'head_dim': 4, 'embed_dim': 16}),
    ({'model_type': 'llama', 'sliding_window': 5}, {}),  # which that family does not have
    ({'model_type': 'mistral', 'num_attention_heads': 8, 'num_key_value_heads': ABSENT}, {'sliding_window': 4096,
      'query_heads': 8, 'kv_heads': 8}),
    ({'model_type': 'mistral', 'sliding_window': None}, {}),
    ({'model_type': 'mistral', 'sliding_window': 5, 'max_window_layers': 1}, {'sliding_window': 5}),
    ({'model_type': 'mistral', 'max_position_embeddings': ABSENT, 'sliding_window': None}, {'context_len': 131_072}),
    ({'model_type': 'qwen2', 'sliding_window': 5}, {'qkv_bias': True}),  # not in use
    ({'model_type': 'qwen2', 'attention_bias': True, 'max_position_embeddings': None},
      {'qkv_bias': True, 'context_len': 32_768}),
    ({'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1},
      {'qkv_bias': True, 'sliding_window': 5, 'windowed_layers': (1,)}),
    ({'model_type': 'qwen2', 'use_sliding_window': True, 'max_window_layers': 0},
      {'qkv_bias': True, 'sliding_window': 4096}),
    ({'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 5}, {'qkv_bias': True}),  # from layer 28 on
    ({'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': None}, {'qkv_bias': True}),
    ({'model_type': 'qwen3', 'head_dim': ABSENT}, {'qk_norm': True, 'head_dim': 128}),
    ({'model_type': 'qwen3', 'use_sliding_window': True, 'sliding_window': 5,
      'layer_types': ['sliding_attention', 'full_attention']},
      {'qk_norm': True, 'sliding_window': 5, 'windowed_layers': (0,)}),
  ],
)  # fmt: skip
def test_each_family_has_its_own_defaults(tmp_path, config, spec):
  write(tmp_path, config=config, **spec)
  assert SafetensorsCheckpoint(tmp_path).spec == spec_of(tmp_path.name, **spec)


@pytest.mark.parametrize(('generation', 'expected'), [(5, (2, 5)), ([5, 7, 5], (2, 5, 7)), (None, (2,)), (-1, (2,))])
def test_generation_config_names_more_ends(tmp_path, generation, expected):
  write(tmp_path)
  (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': generation}))
  assert SafetensorsCheckpoint(tmp_path).spec.eos_token_ids == expected


def test_a_copy_of_tied_embeddings_is_told(tmp_path, caplog):
  weights = write(tmp_path, tied=True)
  write(tmp_path, tied=True, extra={'lm_head.weight': weights['embed']})
  checkpoint = SafetensorsCheckpoint(tmp_path)
  assert checkpoint.spec.tied_embeddings
  with pytest.raises(KeyError, match='unembed'):
    checkpoint.tensor('unembed')
  assert 'lm_head.weight is not used: it is a copy of model.embed_tokens.weight' in caplog.text


@pytest.mark.parametrize('at_once', [None, 12, 30])
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('change', ['first', 'last', 'none'])
def test_heads_are_compared_to_the_last_number(tmp_path, monkeypatch, dtype, change, at_once):
  if at_once is not None:
    monkeypatch.setattr(safetensors_format, '_COMPARED_AT_ONCE', at_once)
  head = write(tmp_path, dtype=dtype, tied=True)['embed'].copy()
  if change != 'none':
    head[(0, 0) if change == 'first' else (-1, -1)] += 1
  write(tmp_path, dtype=dtype, tied=True, extra={'lm_head.weight': head})
  checkpoint = SafetensorsCheckpoint(tmp_path)
  assert checkpoint.spec.tied_embeddings == (change == 'none')
  if change != 'none':
    np.testing.assert_array_equal(checkpoint.tensor('unembed'), head.T)


@pytest.mark.parametrize(
  ('head', 'message', 'authority'),
  [
    (np.zeros((29, 12), np.float32), r"'lm_head.weight' .* has shape \(29, 12\), expected \(30, 12\)", 'transformers'),
    (np.zeros((30, 11), np.float32), r"'lm_head.weight' .* has shape \(30, 11\), expected \(30, 12\)", 'transformers'),
    (np.zeros(360, np.float32), r"'lm_head.weight' .* has shape \(360,\), expected", 'transformers'),
    (np.zeros((30, 12), np.float64), "'lm_head.weight' .* is stored as F64", 'the contract'),
  ],
)  # fmt: skip
def test_a_head_that_fits_no_model_is_refused(tmp_path, head, message, authority):
  write(tmp_path, tied=True, extra={'lm_head.weight': head})
  with pytest.raises(ValueError, match=message):
    SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
  ('case', 'tied'),
  [('other', False), ('equal', True), ('head alone', True), ('other by one bit', False), ('wider type', True)],
)
def test_two_matrices_give_the_logits_of_transformers(tmp_path, case, tied):
  tensors = safetensors.numpy.load_file(FAMILIES / 'smollm2' / 'model.safetensors')
  matrices = HEADS[case](tensors.pop('model.embed_tokens.weight'))
  safetensors.numpy.save_file(tensors | matrices, tmp_path / 'model.safetensors')
  shutil.copy(FAMILIES / 'smollm2' / 'config.json', tmp_path)
  checkpoint = SafetensorsCheckpoint(tmp_path)
  assert checkpoint.spec.tied_embeddings == tied
  with np.load(FAMILIES / 'smollm2' / 'logits.npz') as file:
    prompt = file['prompt'][:16]
  with np.load(FAMILIES.parent / 'heads.npz') as file:
    expected = file[case]
  widened = Widened(checkpoint)
  np.testing.assert_allclose(NumpyLlama(widened).logits(prompt), expected, rtol=0, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Widened:
  """A checkpoint in float32."""

  checkpoint: SafetensorsCheckpoint

  @property
  def spec(self) -> ModelSpec:
    return self.checkpoint.spec

  def tensor(self, name: str) -> np.ndarray:
    return np.asarray(self.checkpoint.tensor(name), np.float32)


def test_rotary_frequencies_of_older_files_are_told(tmp_path, caplog):
  frequencies = {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': np.ones(3, np.float32) for i in range(2)}
  write(tmp_path, extra=frequencies)
  SafetensorsCheckpoint(tmp_path)  # transformers too computes them from config.json, whatever the file holds
  for name in frequencies:
    assert name in caplog.text
  assert 'follow from config.json' in caplog.text


@pytest.mark.parametrize(
  'extra', ['model-00001-of-00002.safetensors', 'adapter_model.safetensors', 'consolidated.safetensors']
)
@pytest.mark.parametrize('shards', [1, 2])
def test_files_of_weights_that_are_not_used_are_told(tmp_path, caplog, shards, extra):
  write(tmp_path, shards=shards)
  if shards == 2:
    extra = extra.replace('of-00002', 'of-00003')
  safetensors.numpy.save_file({'x': np.zeros(1, np.float32)}, tmp_path / extra)
  SafetensorsCheckpoint(tmp_path)
  assert f'{extra} not used: the weights are model' in caplog.text


def move(folder, name: str, change, keep=True, listed=True) -> None:
  """Put a changed copy of a tensor into the other of two files; `keep` it where it was, too."""
  index = folder / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  home = content['weight_map'][name]
  (away,) = {*content['weight_map'].values()} - {home}
  tensors = safetensors.numpy.load_file(folder / home)
  safetensors.numpy.save_file(safetensors.numpy.load_file(folder / away) | {name: change(tensors[name])}, folder / away)
  if not keep:
    del tensors[name]
    safetensors.numpy.save_file(tensors, folder / home)
    if listed:
      content['weight_map'][name] = away
    else:
      del content['weight_map'][name]
    index.write_text(json.dumps(content))


def test_a_tensor_that_the_index_does_not_list_is_read(tmp_path):
  weights = write(tmp_path, shards=2)  # by file, as transformers reads them
  move(tmp_path, 'model.norm.weight', lambda tensor: tensor, keep=False, listed=False)
  np.testing.assert_array_equal(SafetensorsCheckpoint(tmp_path).tensor('final_norm'), weights['final_norm'])


def test_a_tensor_that_is_in_two_files_must_be_one(tmp_path):
  weights = write(tmp_path, shards=2)
  move(tmp_path, 'model.norm.weight', lambda tensor: tensor)
  np.testing.assert_array_equal(SafetensorsCheckpoint(tmp_path).tensor('final_norm'), weights['final_norm'])
  for change in (lambda tensor: tensor + 1, lambda tensor: tensor.astype(np.float16), lambda tensor: tensor[:-1]):
    move(tmp_path, 'model.norm.weight', change)
    with pytest.raises(
      ValueError, match=r"'model\.norm\.weight' is in .* and, with other values, in .* expected it once"
    ):
      SafetensorsCheckpoint(tmp_path)


def test_an_unlisted_tensor_of_no_model_is_refused(tmp_path):
  write(tmp_path, shards=2)
  path = tmp_path / 'model-00002-of-00002.safetensors'
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(tensors | {'model.layers.7.mlp.extra': np.zeros(1, np.float32)}, path)
  with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors holds tensor 'model\.layers\.7\.mlp\.extra'"):
    SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(('second', 'is_refused'), [('model-00001-of-00002.safetensors', None), ('', True)])
def test_an_index_that_lists_a_tensor_twice_is_refused(tmp_path, second, is_refused):
  write(tmp_path, shards=2)
  index = tmp_path / 'model.safetensors.index.json'
  name, file = next(iter(json.loads(index.read_text())['weight_map'].items()))
  other = 'model-00002-of-00002.safetensors' if file != 'model-00002-of-00002.safetensors' else second
  entry = f'"{name}": "{file}"'
  index.write_text(
    index.read_text().replace(
      entry, f'{entry}, {entry}' if not is_refused else f'{entry.replace(file, other)}, {entry}'
    )
  )
  if is_refused:
    with pytest.raises(ValueError, match=rf"index\.json lists '{name}' twice, as '{other}' and '{file}'"):
      SafetensorsCheckpoint(tmp_path)
  else:
    SafetensorsCheckpoint(tmp_path)


def test_a_folder_without_tokenizer_json_has_no_tokenizer(tmp_path):
  write(tmp_path)
  assert SafetensorsCheckpoint(tmp_path).tokenizer() is None


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'config': {'model_type': 'mixtral'}}, "model_type 'mixtral', expected one of llama, mistral, qwen2, qwen3"),
    ({'config': {'model_type': ABSENT}}, 'model_type None, expected one of'),
    ({'config': {'architectures': ['LlamaForSequenceClassification']}}, 'architectures .* expected LlamaForCausalLM'),
    ({'config': {'rope_scaling': {'type': 'yarn', 'factor': 2.0}}}, "rotary embedding by 'yarn'"),
    ({'config': {'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}}}, "rotary embedding by 'dynamic'"),
    ({'config': {'rope_parameters': {'rope_type': 'longrope', 'rope_theta': 5e5}}}, "rotary embedding by 'longrope'"),
    ({'config': {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5}}}, 'factor=None in its rotary settings'),
    ({'config': {'rope_scaling': {'type': 'linear', 'factor': 0}}}, 'factor=0 in its rotary settings'),
    ({'config': {'rope_scaling': {'rope_type': 'llama3', **LLAMA3, 'low_freq_factor': 4.0}}}, 'must be the smaller'),
    ({'config': {'rope_parameters': {'full_attention': {'rope_type': 'default'}}}}, 'one set of them for all layers'),
    ({'config': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
    ({'config': {'rope_parameters': {'partial_rotary_factor': 0.5}}}, 'partial_rotary_factor=0.5'),
    ({'config': {'attention_bias': True}}, 'attention_bias=True, expected False'),
    ({'config': {'mlp_bias': True}}, 'mlp_bias=True, expected False'),
    ({'config': {'hidden_act': 'gelu'}}, "hidden_act='gelu', expected 'silu'"),
    ({'config': {'quantization_config': {'quant_method': 'awq'}}}, 'quantization_config=.*expected none'),
    ({'config': {'model_type': 'mistral', 'sliding_window': 0}}, 'sliding_window=0, expected a positive integer'),
    ({'config': {'model_type': 'mistral', 'layer_types': ['full_attention'] * 2}}, 'layer_types=.*sliding_attention'),
    ({'config': {'model_type': 'qwen3', 'layer_types': ['sliding_attention'] * 2}}, 'layer_types=.*full_attention'),
    ({'config': {'model_type': 'qwen3', 'layer_types': ['full_attention']}}, 'layer_types=.*2 times full_attention'),
    ({'config': {'model_type': 'qwen2'}}, "lacks 6 of the 27 tensors .* 'model.layers.0.self_attn.q_proj.bias'"),
    ({'config': {'model_type': 'qwen3'}}, "lacks 4 of the 25 tensors .* 'model.layers.0.self_attn.q_norm.weight'"),
    ({'config': {'num_key_value_heads': 3}}, '4 query heads and 3 key/value heads'),
    ({'config': {'num_hidden_layers': 10**9}}, 'num_hidden_layers=1000000000, expected .* at most 10,000'),
    ({'config': {'head_dim': 5}}, 'head_dim=5, expected an even number'),
    ({'config': {'architectures': 5}}, 'architectures 5, expected LlamaForCausalLM in a list'),
    ({'config': {'architectures': 'LlamaForCausalLM'}}, "architectures 'Llama.*, expected LlamaForCausalLM in a list"),
    ({'config': {'tie_word_embeddings': 'false'}}, "tie_word_embeddings='false', expected true or false"),
    ({'config': {'rope_theta': float('inf')}}, 'rope_theta=inf, expected a positive number'),
    ({'config': {'rope_scaling': {'type': 'linear', 'factor': float('inf')}}}, 'factor=inf in its rotary settings'),
    ({'config': {'model_type': 'qwen2', **WINDOWS, 'max_window_layers': '1'}}, "max_window_layers='1', expected an"),
    ({'config': {'model_type': 'qwen2', **WINDOWS, 'max_window_layers': [1]}}, r'max_window_layers=\[1\], expected an'),
    (
      {'config': {'model_type': 'qwen2', 'layer_types': [['full_attention']] * 2}},
      r'layer_types=\[\[.*2 times full_att',
    ),
    ({'config': {'eos_token_id': '2'}}, r"config\.json has eos_token_id \['2'\]"),
    ({'config': {'eos_token_id': {'a': 1}}}, 'eos_token_id .* expected an integer or a list'),
    ({'config': {'eos_token_id': [2, 30]}}, r'eos_token_ids=\(2, 30\), expected .* from 0 to 29'),
    ({'config': {'vocab_size': True}}, 'vocab_size=True, expected a positive integer'),
    ({'config': {'hidden_size': None}}, 'hidden_size=None, expected a positive integer'),
    ({'config': {'intermediate_size': 16}}, r'gate_proj.weight.* has shape \(20, 12\), expected \(16, 12\)'),
    ({'without': ('model.norm.weight',)}, "lacks 1 of the 21 tensors .* 'model.norm.weight'"),
    ({'without': ('lm_head.weight',)}, 'or set tie_word_embeddings'),
    ({'extra': {'model.layers.0.self_attn.q_proj.bias': np.zeros(24, np.float32)}}, 'q_proj.bias'),
    ({'dtype': np.float64}, 'is stored as F64, expected BF16, F16 or F32'),
  ],
)
def test_a_model_that_would_give_wrong_tokens_is_refused(tmp_path, changes, message):
  write(tmp_path, **changes)
  with pytest.raises(ValueError, match=message) as caught:
    SafetensorsCheckpoint(tmp_path)
  assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize('shards', [1, 2])
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path, shards):
  write(tmp_path, shards=shards)
  path = max(tmp_path.glob('*.safetensors'))
  content = path.read_bytes()
  for length in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:length])
    with pytest.raises(ValueError, match=r'is cut short or damaged .*download or copy it again') as caught:
      SafetensorsCheckpoint(tmp_path)
    assert str(path) in str(caught.value)


def test_a_file_of_another_format_is_refused(tmp_path):
  write(tmp_path)
  path = tmp_path / 'model.safetensors'
  path.write_bytes(b'PK\x03\x04' + bytes(1000))  # as PyTorch's own files begin
  with pytest.raises(ValueError, match=r'model\.safetensors .* is cut short or damaged'):
    SafetensorsCheckpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
  write(tmp_path, shards=3)
  (tmp_path / 'model-00002-of-00003.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match=r"lacks 'model-00002-of-00003\.safetensors'"):
    SafetensorsCheckpoint(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path):
  write(tmp_path, shards=2)
  index = tmp_path / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  content['weight_map']['model.norm.weight'] = 'model-00001-of-00002.safetensors'
  content['weight_map']['model.embed_tokens.weight'] = 'model-00002-of-00002.safetensors'
  index.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"lacks tensor 'model\..*index\.json says so"):
    SafetensorsCheckpoint(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='found no folder at'):
    SafetensorsCheckpoint(tmp_path / 'absent')
  with pytest.raises(FileNotFoundError, match=r'has no config\.json'):
    SafetensorsCheckpoint(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  with pytest.raises(FileNotFoundError, match=r'neither model\.safetensors nor model\.safetensors\.index\.json'):
    SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'{"model_type"', 'is not valid JSON'),
    (b'[' * 100_000, 'is not valid JSON .*recursion'),
    (b'[]', 'holds a list'),
    (b'\xff', 'is no text in UTF-8'),
  ],
)
def test_a_damaged_config_is_refused(tmp_path, content, message):
  (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(ValueError, match=rf'config\.json {message}'):
    SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize('dtype', [['float16'], {'a': 1}, 'float7'])
def test_a_declared_type_that_is_none_gives_way_to_the_embeddings(tmp_path, dtype):
  write(tmp_path, dtype=np.float16, config={'dtype': dtype})
  assert SafetensorsCheckpoint(tmp_path).dtype == np.float16


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda tensor: tensor[:-1].copy(), 'has shape'),
    (lambda tensor: tensor.astype(np.float64), 'is stored as F64'),
  ],
)
def test_the_shard_of_a_wrong_tensor_is_named(tmp_path, spoil, message):
  write(tmp_path, shards=2)
  shard = tmp_path / 'model-00002-of-00002.safetensors'
  tensors = safetensors.numpy.load_file(shard)
  name = max(tensors)
  safetensors.numpy.save_file(tensors | {name: spoil(tensors[name])}, shard)
  with pytest.raises(ValueError, match=rf"tensor '{name}' of .*{shard.name} {message}"):
    SafetensorsCheckpoint(tmp_path)
