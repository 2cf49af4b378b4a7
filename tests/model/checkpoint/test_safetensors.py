"""Hugging Face folders give the weights that were written into them, in our names and shapes."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pdjax.model.checkpoint import SafetensorsCheckpoint, open_checkpoint, tensor_shapes
from pdjax.types import ModelSpec
from tests.hf import hf_tensors

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


def write(folder, dtype=np.float32, config=None, tied=False, shards=1, extra=None, without=()):
  """Write a tiny checkpoint; returns its weights. `config` replaces (or, with None, removes) keys."""
  rng = np.random.default_rng(0)
  shapes = tensor_shapes(spec_of('tiny', tied_embeddings=tied))
  weights = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
  tensors = {k: v for k, v in hf_tensors(weights).items() if k not in without} | (extra or {})
  merged = CONFIG | {'tie_word_embeddings': tied} | (config or {})
  (folder / 'config.json').write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
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


@pytest.mark.parametrize(
  'newer',
  [
    {},
    {
      'rope_theta': None,
      'torch_dtype': None,
      'dtype': 'bfloat16',
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 50_000.0},
    },
    {'rope_scaling': {'type': 'default'}, 'torch_dtype': None},
  ],
)
def test_older_and_newer_configs_give_the_same_spec(tmp_path, newer):
  write(tmp_path, config=newer)
  checkpoint = open_checkpoint(tmp_path)
  assert checkpoint.spec == spec_of(tmp_path.name)
  assert checkpoint.dtype == (ml_dtypes.bfloat16 if 'dtype' in newer else np.float32)


def test_missing_settings_take_the_defaults_of_the_format(tmp_path):
  keys = ('rope_theta', 'rms_norm_eps', 'max_position_embeddings', 'eos_token_id')
  write(tmp_path, config=dict.fromkeys(keys))
  expected = spec_of(tmp_path.name, rope_theta=10_000.0, norm_eps=1e-6, context_len=2048, eos_token_ids=())
  assert SafetensorsCheckpoint(tmp_path).spec == expected


@pytest.mark.parametrize(('generation', 'expected'), [(5, (5,)), ([5, 7, 5], (5, 7)), (None, (2,))])
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
    ({'config': {'model_type': 'mixtral'}}, "model_type 'mixtral', expected 'llama'"),
    ({'config': {'rope_scaling': {'type': 'linear', 'factor': 2.0}}}, "rotary embedding .'linear'"),
    ({'config': {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5}}}, "rotary embedding .'llama3'"),
    ({'config': {'attention_bias': True}}, 'attention_bias=True, expected False'),
    ({'config': {'mlp_bias': True}}, 'mlp_bias=True, expected False'),
    ({'config': {'hidden_act': 'gelu'}}, "hidden_act='gelu', expected 'silu'"),
    ({'config': {'quantization_config': {'quant_method': 'awq'}}}, 'quantization_config=.*expected none'),
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


@pytest.mark.parametrize(('content', 'message'), [('{"model_type"', 'not valid JSON'), ('[]', 'holds a list')])
def test_a_damaged_config_is_refused(tmp_path, content, message):
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(ValueError, match=message):
    SafetensorsCheckpoint(tmp_path)
