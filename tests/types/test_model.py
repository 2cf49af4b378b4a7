"""The figures of a model's shape, against published figures."""

import dataclasses
import math

import pytest

from pdjax.deployment import deploy
from pdjax.opened_model import OpenedModel
from pdjax.types import ModelSpec, RopeScaling
from pdjax.types.model import GQA, MLA, Experts, Gated, Plain, mesh_shape, weights
from tests.serving.driver import TINY
from tests.tiny import config


@pytest.mark.parametrize(
  'model, billions, kv_bytes',
  [
    (ModelSpec.smollm2_135m(), 0.135, 23_040),
    (ModelSpec.llama3_8b(), 8.03, 131_072),
    (ModelSpec.llama3_70b(), 70.6, 327_680),
    (ModelSpec.mistral_7b(), 7.24, 131_072),
    (ModelSpec.qwen2_5_7b(), 7.62, 57_344),
    (ModelSpec.qwen3_8b(), 8.19, 147_456),
    (ModelSpec.qwen3_32b(), 32.8, 262_144),
    (ModelSpec.mixtral_8x7b(), 46.7, 131_072),
    (ModelSpec.deepseek_v3(), 671, 70_272),
    (ModelSpec.gpt_oss_120b(), 117, 36_864),
    (ModelSpec.opt_13b(), 12.9, 819_200),
    (ModelSpec.opt_66b(), 65.7, 2_359_296),
    (ModelSpec.opt_175b(), 175, 4_718_592),
  ],
  ids=lambda value: getattr(value, 'name', None),
)
def test_presets_have_the_published_size(model, billions, kv_bytes):
  assert float(f'{model.num_params / 1e9:.3g}') == billions
  assert model.cached_token_bytes('bfloat16') == kv_bytes
  assert model.cached_token_bytes('float32') == 2 * kv_bytes
  assert model.weight_bytes(2) == 2 * model.num_params


def test_parameters_of_a_tiny_model_counted_by_hand():
  attention = 24 * 48 + 2 * 24 * 16 + 48 * 24  # q, k and v, out
  layer = attention + 3 * 24 * 48 + 2 * 24
  assert TINY.layer_params == layer
  assert TINY.num_params == 2 * layer + 2 * 96 * 24 + 24
  assert dataclasses.replace(TINY, tied_embeddings=True).num_params == 2 * layer + 96 * 24 + 24


DENSE = [  # preset, layers, and shapes: embedding, q, k, gate, then those of a layer's biases or norms of heads
  ('smollm2_135m', 30, (49_152, 576), (576, 576), (192, 576), (1536, 576), [], 134_515_008),
  ('llama3_8b', 32, (128_256, 4096), (4096, 4096), (1024, 4096), (14_336, 4096), [], 8_030_261_248),
  ('llama3_70b', 80, (128_256, 8192), (8192, 8192), (1024, 8192), (28_672, 8192), [], 70_553_706_496),
  ('mistral_7b', 32, (32_000, 4096), (4096, 4096), (1024, 4096), (14_336, 4096), [], 7_241_732_096),
  (
    'qwen2_5_7b',
    28,
    (152_064, 3584),
    (3584, 3584),
    (512, 3584),
    (18_944, 3584),
    [(3584,), (512,), (512,)],
    7_615_616_512,
  ),
  ('qwen3_8b', 36, (151_936, 4096), (4096, 4096), (1024, 4096), (12_288, 4096), [(128,), (128,)], 8_190_735_360),
  ('qwen3_32b', 64, (151_936, 5120), (8192, 5120), (1024, 5120), (25_600, 5120), [(128,), (128,)], 32_762_123_264),
]


@pytest.mark.parametrize(
  ('preset', 'layers', 'embed', 'q', 'k', 'gate', 'more', 'published'),
  DENSE,
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_parameters_of_dense_models_counted_from_the_shapes_of_their_checkpoints(
  preset, layers, embed, q, k, gate, more, published
):
  model, width = getattr(ModelSpec, preset)(), embed[1]
  layer = numbers(q, k, k, q, gate, gate, gate, (width,), (width,), *more)
  whole = layers * layer + (1 if model.tied_embeddings else 2) * numbers(embed) + width
  assert model.num_params == whole == published


def numbers(*shapes: tuple[int, ...]) -> int:
  return sum(math.prod(shape) for shape in shapes)


def test_parameters_of_other_architectures_counted_from_the_shapes_of_their_checkpoints():
  """As their safetensors files list them; of DeepSeek-V3 without the draft layer."""
  embed = 7168
  mla = numbers(
    (1536, embed), (1536,), (128 * 192, 1536), (512 + 64, embed), (512,), (128 * 256, 512), (embed, 128 * 128)
  )  # fmt: skip
  dense, expert = 3 * numbers((18_432, embed)), 3 * numbers((2048, embed))
  router = numbers((256, embed), (256,))
  layers = 61 * (mla + 2 * embed) + 3 * dense + 58 * (router + 257 * expert)
  assert ModelSpec.deepseek_v3().num_params == layers + 2 * numbers((129_280, embed)) + embed == 671_026_419_200

  embed = 2880
  attention = numbers(
    (64 * 64, embed), (64 * 64,), (8 * 64, embed), (8 * 64,), (8 * 64, embed), (8 * 64,), (embed, 64 * 64), (embed,),
    (64,),
  )  # fmt: skip
  experts = numbers((128, embed), (128,), (128, 5760, embed), (128, 5760), (128, embed, 2880), (128, embed))
  whole = 36 * (attention + experts + 2 * embed) + 2 * numbers((201_088, embed)) + embed
  assert ModelSpec.gpt_oss_120b().num_params == whole == 116_829_156_672

  embed = 4096
  layer = numbers((4096, embed), (1024, embed), (1024, embed), (embed, 4096), (8, embed), (embed,), (embed,))
  whole = 32 * (layer + 8 * 3 * numbers((14_336, embed))) + 2 * numbers((32_000, embed)) + embed
  assert ModelSpec.mixtral_8x7b().num_params == whole == 46_702_792_704

  sizes = (('opt_13b', 40, 5120, 12_853_473_280), ('opt_66b', 64, 9216, None), ('opt_175b', 96, 12_288, None))
  for name, layers, embed, published in sizes:
    layer = 4 * numbers((embed, embed), (embed,)) + numbers(
      (4 * embed, embed), (4 * embed,), (embed, 4 * embed), (embed,)
    )
    whole = layers * (layer + 4 * embed) + numbers((50_272, embed), (2050, embed)) + 2 * embed
    assert getattr(ModelSpec, name)().num_params == whole and published in (None, whole)


def test_the_table_names_every_weight_once_with_a_shape_of_its_axes():
  for model in (
    TINY,
    dataclasses.replace(TINY, qkv_bias=True, qk_norm=True),
    ModelSpec.deepseek_v3(),
    ModelSpec.opt_13b(),
  ):
    rows = model.weights
    assert sum(row.size for row in rows.values()) == model.num_params
    for name, row in rows.items():
      assert row.name == name and len(row.axes) == len(row.shape) and row.size > 0
      assert sorted(row.file_order) == list(range(len(row.shape)))
      assert math.prod(row.stored_shape) == math.prod(row.file_shape) == row.size
  rows = TINY.weights
  assert rows['layers.1.o'].shape == (24, 6, 8) and rows['layers.1.o'].file_shape == (6, 8, 24)
  assert rows['layers.0.q'].stored_shape == (48, 24) and rows['layers.0.o'].stored_shape == (24, 48)
  assert rows['embed'].file_shape == rows['embed'].stored_shape == (96, 24) and rows['embed'].kind == 'embedding'


def test_what_a_simulator_asks_for_in_every_step_is_summed_up_once(monkeypatch):
  model = dataclasses.replace(TINY, name='asked in every step')
  before = model.token_flops(), model.num_params, model.layer_params, model.weight_bytes(2)

  def again(*args):
    raise AssertionError('the table is walked again')

  monkeypatch.setattr(weights, 'layer_weights', again)
  monkeypatch.setattr(weights, 'outer_weights', again)
  assert (model.token_flops(), model.num_params, model.layer_params, model.weight_bytes(2)) == before


FLAGS = [(part, field.name) for part in (GQA, Gated) for field in dataclasses.fields(part) if field.type is bool]


@pytest.mark.parametrize(('part', 'flag'), FLAGS, ids=lambda one: getattr(one, '__name__', one))
def test_the_fields_of_a_model_make_it_again_with_every_flag_of_its_parts(part, flag):
  name = 'attention' if part is GQA else 'ffn'
  model = dataclasses.replace(TINY, **{name: dataclasses.replace(getattr(TINY, name), **{flag: True})})
  assert model != TINY and ModelSpec(**model.flat()) == model


def test_a_model_is_made_of_parts_or_of_their_fields():
  parts = {'attention': GQA(6, 2, 8), 'ffn': Gated(48)}
  assert dataclasses.replace(TINY, **parts) == TINY and TINY.attention == GQA(6, 2, 8) and TINY.ffn == Gated(48)
  assert dataclasses.replace(TINY, kv_heads=3, qk_norm=True).attention == GQA(6, 3, 8, qk_norm=True)
  assert (TINY.query_heads, TINY.kv_heads, TINY.head_dim, TINY.ffn_dim, TINY.qkv_bias) == (6, 2, 8, 48, False)
  assert ModelSpec(**TINY.flat()) == TINY and 'attention' not in TINY.flat()
  deepseek = ModelSpec.deepseek_v3()
  assert ModelSpec(**deepseek.flat()) == deepseek and deepseek.flat()['attention'] is deepseek.attention
  assert TINY.only_simulated is None
  with pytest.raises(ValueError, match="model 'bare': a GQA needs kv_heads, head_dim"):
    ModelSpec('bare', num_layers=1, embed_dim=8, query_heads=2, ffn_dim=8, vocab_size=9, context_len=9)


@pytest.mark.parametrize(
  ('model', 'part'),
  [
    (ModelSpec.deepseek_v3(), 'multi-head latent attention'),
    (ModelSpec.mixtral_8x7b(), 'a mixture of experts'),
    (ModelSpec.gpt_oss_120b(), 'a bias of the output projection'),
    (ModelSpec.opt_13b(), 'learned positions'),
    (dataclasses.replace(TINY, ffn=Plain(48)), 'a feed-forward layer without a gate'),
  ],
  ids=lambda value: getattr(value, 'name', ''),
)
def test_what_the_engine_does_not_compute_is_refused_by_its_name_before_anything_is_loaded(model, part):
  assert model.only_simulated == part
  with pytest.raises(ValueError, match=f'{model.name} has {part}, which the engine does not compute; simulate it'):
    deploy(config(), OpenedModel(model))


def test_of_experts_a_token_is_multiplied_by_the_active_ones():
  mixtral, dense = ModelSpec.mixtral_8x7b(), ModelSpec.mistral_7b()
  one = 3 * 4096 * 14_336
  assert mixtral.token_flops() == dense.token_flops() + 2 * 32 * (one + 8 * 4096)
  with pytest.raises(ValueError, match='active=9, expected at most count=8'):
    Experts(count=8, active=9, dim=4)


def test_mla_caches_one_latent_for_all_heads_and_cuts_its_queries():
  deepseek = ModelSpec.deepseek_v3()
  assert deepseek.cached_token_bytes('bfloat16') == 61 * (512 + 64) * 2 and mesh_shape(deepseek, 8) == (1, 8)
  assert deepseek.attention.pair_flops == 2 * 128 * (128 + 64 + 128)
  with pytest.raises(ValueError, match='MLA has kv_rank=0, expected an integer of at least 1'):
    MLA(query_heads=2, query_rank=None, kv_rank=0, nope_dim=4, rope_dim=4, value_dim=4)


def test_attention_of_a_prompt_costs_the_same_in_one_chunk_or_in_several():
  whole = TINY.attention_flops(new_tokens=10, cached_tokens=0)
  assert whole == 4 * 2 * 6 * 8 * 55  # each token sees itself and those before: 55 pairs
  assert sum(TINY.attention_flops(1, cached) for cached in range(10)) == whole
  assert TINY.attention_flops(4, 0) + TINY.attention_flops(6, 4) == whole


@pytest.mark.parametrize('new, cached', [(1, 0), (3, 0), (9, 0), (1, 3), (2, 3), (4, 2), (5, 20)])
def test_attention_within_a_sliding_window_costs_no_more_than_it_sees(new, cached):
  windowed = dataclasses.replace(TINY, sliding_window=4)
  half = dataclasses.replace(TINY, sliding_window=4, windowed_layers=(1,))
  pairs = sum(min(position + 1, 4) for position in range(cached, cached + new))
  assert windowed.attention_flops(new, cached) == 4 * 2 * 6 * 8 * pairs
  assert (
    half.attention_flops(new, cached) == (windowed.attention_flops(new, cached) + TINY.attention_flops(new, cached)) / 2
  )


def test_a_token_reads_no_further_back_than_the_window():
  half = dataclasses.replace(TINY, sliding_window=4, windowed_layers=(1,))
  layer = TINY.cached_token_bytes('float32') // 2
  read = [half.read_bytes('float32', [], [context]) for context in (3, 4, 10)]
  assert read == [6 * layer, 8 * layer, 14 * layer]  # of ten tokens, four in one layer and all in the other
  assert half.read_bytes('float32', [], [3, 4, 10]) == sum(read)
  assert TINY.read_bytes('float32', [], [10]) == 20 * layer
  chunk = half.read_bytes('float32', [(10, 3)], [])
  assert chunk == (4 + 3 + 13) * layer  # a chunk reads itself, and what of those before it some token of it may see
  assert [half.window(layer) for layer in range(2)] == [None, 4]


def test_biases_and_head_norms_count():
  model = dataclasses.replace(TINY, qkv_bias=True, qk_norm=True)
  more = 2 * (8 * (6 + 2 * 2) + 2 * 8)
  assert model.num_params == TINY.num_params + more
  assert model.weight_bytes_per_device(4, tp=1) == model.weight_bytes(4)
  assert model.weight_bytes_per_device(4, tp=2) - TINY.weight_bytes_per_device(4, tp=2) == 4 * 2 * (8 * 5 + 2 * 8)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'sliding_window': 0}, 'sliding_window=0, expected at least 1 token'),
    ({'sliding_window': '8'}, "sliding_window='8', expected an integer, at least 1 token, or None"),
    ({'sliding_window': 4, 'windowed_layers': (0, 2)}, r'windowed_layers=\(0, 2\), expected .* its layers, 0 to 1'),
    ({'sliding_window': 4, 'windowed_layers': ('a',)}, r"windowed_layers\[0\]='a'"),
    ({'num_layers': 10**9}, 'num_layers=1000000000, expected at most 10,000'),
    ({'embed_dim': 24.0}, 'embed_dim=24.0, expected an integer'),
    ({'num_layers': '2'}, "num_layers='2', expected an integer"),
    ({'vocab_size': True}, 'vocab_size=True, expected an integer'),
    ({'head_dim': 5}, 'head_dim=5, expected an even number'),
    ({'rope_theta': 'x'}, "rope_theta='x', expected a positive number"),
    ({'rope_theta': -1.0}, 'rope_theta=-1.0, expected a positive number'),
    ({'rope_theta': float('inf')}, 'rope_theta=inf, expected a positive number'),
    ({'rope_theta': 10**400}, 'rope_theta=1000.*, expected a positive number'),
    ({'norm_eps': float('nan')}, 'norm_eps=nan, expected a positive number'),
    ({'tied_embeddings': 'false'}, "tied_embeddings='false', expected True or False"),
    ({'name': 5}, 'name=5, expected a text'),
    ({'rope_scaling': 'linear'}, "rope_scaling='linear', expected RopeScaling\\(...\\) or None"),
    ({'eos_token_ids': (1, 96)}, r'eos_token_ids=\(1, 96\), expected .* integers from 0 to 95'),
    ({'eos_token_ids': (-1,)}, r'eos_token_ids\[0\]=-1'),
    ({'eos_token_ids': (2.5,)}, r'eos_token_ids\[0\]=2.5'),
    ({'eos_token_ids': 'x'}, "eos_token_ids='x'"),
  ],
)
def test_a_model_refuses_fields_that_make_no_sense(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'kind': 'yarn', 'factor': 2.0}, "kind='yarn', expected one of 'linear', 'llama3'"),
    ({'kind': 'linear', 'factor': 0.0}, 'factor=0.0, expected a positive number'),
    ({'kind': 'linear', 'factor': float('inf')}, 'factor=inf, expected a positive number'),
    ({'kind': 'linear', 'factor': '2'}, "factor='2', expected a positive number"),
    ({'kind': 'llama3', 'factor': 8.0, 'original_context_len': 64.5}, '=64.5, expected an integer'),
    ({'kind': 'llama3', 'factor': 8.0, 'low_freq_factor': 4.0}, 'the first must be the smaller'),
  ],
)
def test_rope_scaling_refuses_what_it_cannot_do(fields, message):
  with pytest.raises(ValueError, match=message):
    RopeScaling(**fields)


def test_logits_cost_a_row_of_the_output_projection():
  assert TINY.unembed_flops() == 2 * 24 * 96


@pytest.mark.parametrize('size', ['num_layers', 'embed_dim', 'kv_heads', 'head_dim', 'ffn_dim', 'context_len'])
def test_a_model_refuses_sizes_below_one(size):
  with pytest.raises(ValueError, match=f"model 'tiny' has {size}=0, expected an integer of at least 1"):
    dataclasses.replace(TINY, **{size: 0})


def test_a_model_refuses_key_value_heads_that_do_not_divide_the_query_heads():
  with pytest.raises(ValueError, match='6 query heads and 4 key/value heads; the second must divide the first'):
    dataclasses.replace(TINY, kv_heads=4)


def _heads(query_heads: int, kv_heads: int, ffn_dim: int = 720) -> ModelSpec:
  return dataclasses.replace(TINY, query_heads=query_heads, kv_heads=kv_heads, ffn_dim=ffn_dim)


@pytest.mark.parametrize(
  'heads, tp, shape',
  [
    ((9, 3), 1, (1, 1)),
    ((9, 3), 3, (3, 1)),
    ((9, 3), 9, (3, 3)),
    ((12, 12), 2, (2, 1)),
    ((12, 12), 4, (4, 1)),
    ((12, 12), 12, (12, 1)),
    ((8, 2), 2, (2, 1)),
    ((8, 2), 4, (2, 2)),
    ((8, 2), 8, (2, 4)),
    ((8, 1), 4, (1, 4)),
  ],
)
def test_key_value_heads_are_cut_as_far_as_they_go_and_then_copied(heads, tp, shape):
  assert mesh_shape(_heads(*heads), tp) == shape


@pytest.mark.parametrize(
  'heads, tp, legal',
  [
    ((9, 3), 2, '1, 3, 9'),
    ((9, 3), 27, '1, 3, 9'),
    ((12, 12), 5, '1, 2, 3, 4, 6, 12'),
    ((12, 4), 3, '1, 2, 4, 12'),  # 3 divides 12 query heads, but 4 key/value heads neither divide it nor are divided
    ((8, 2), 3, '1, 2, 4, 8'),
    ((8, 2), 0, '1, 2, 4, 8'),
  ],
)
def test_an_illegal_tp_is_refused_with_the_legal_ones(heads, tp, legal):
  with pytest.raises(ValueError, match=f'tp={tp} does not fit .*{heads[0]} query heads.* use one of {legal}[.]'):
    mesh_shape(_heads(*heads), tp)


def test_devices_divide_the_weights_but_for_what_they_copy():
  assert TINY.weight_bytes_per_device(4, tp=1) == TINY.weight_bytes(4)
  norms = 2 * 2 * 24 + 24
  assert TINY.weight_bytes_per_device(4, tp=2) == (TINY.num_params - norms) * 4 // 2 + norms * 4
  kv_copied = 2 * 2 * 24 * 8  # key and value projections of one of two heads a device, in two layers
  others = TINY.num_params - norms - 2 * kv_copied
  assert TINY.weight_bytes_per_device(4, tp=6) == (others // 6 + kv_copied + norms) * 4


def test_columns_and_words_that_tp_does_not_divide_lie_whole_on_every_device():
  model = ModelSpec.smollm2_135m()  # 1,536 columns and 49,152 words; three devices divide them, nine do not
  layer = 2 * 576 * 64 * (9 // 9 + 3 // 3) + 3 * 576 * 1536 + 2 * 576
  assert model.weight_bytes_per_device(1, tp=9) == 30 * layer + 576 * 49_152 + 576
  assert model.weight_bytes_per_device(1, tp=3) < model.weight_bytes(1) / 2.9
