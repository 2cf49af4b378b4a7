"""Hugging Face folders give the weights that were written into them, in our names and shapes."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pdjax.model.checkpoint import SafetensorsCheckpoint, open_checkpoint, tensor_shapes
from pdjax.types import ModelSpec, RopeScaling
from tests.hf import hf_tensors

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


@pytest.mark.parametrize('gone', [ABSENT, None])
def test_missing_settings_take_the_defaults_of_the_format(tmp_path, gone):
  keys = ('rope_theta', 'rms_norm_eps', 'max_position_embeddings', 'eos_token_id')
  write(tmp_path, config=dict.fromkeys(keys, gone))
  expected = spec_of(tmp_path.name, rope_theta=10_000.0, norm_eps=1e-6, context_len=2048, eos_token_ids=())
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


@pytest.mark.parametrize(('generation', 'expected'), [(5, (5,)), ([5, 7, 5], (5, 7)), (None, (2,)), (-1, ())])
def test_generation_config_knows_the_ends_best(tmp_path, generation, expected):
  write(tmp_path)
  (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': generation}))
  assert SafetensorsCheckpoint(tmp_path).spec.eos_token_ids == expected


def test_a_copy_of_tied_embeddings_is_ignored(tmp_path):
  write(tmp_path, tied=True, extra={'lm_head.weight': np.zeros((30, 12), np.float32)})
  checkpoint = SafetensorsCheckpoint(tmp_path)
  with pytest.raises(KeyError, match='unembed'):
    checkpoint.tensor('unembed')


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
