"""Published models by name: `ModelSpec.llama3_8b()` and others."""

from typing import Any, Self, TypeVar, cast

from pdjax.types.model.parts import GQA, MLA, Experts, Plain
from pdjax.types.model.rope import RopeScaling

_Model = TypeVar('_Model', bound='Presets')


class Presets:
  """The constructors of published models; `ModelSpec` inherits them.

  Those whose parts the engine does not compute (`ModelSpec.only_simulated`) are for the simulator. Weights are counted
  in the dtype in which a config serves them: GPT-OSS is published in MXFP4 and DeepSeek-V3 in FP8, which is less.
  """

  __slots__ = ('_hash',)  # of a `ModelSpec`, once it was asked for

  _hash: int

  @classmethod
  def smollm2_135m(cls) -> Self:
    """SmolLM2-135M-Instruct (Allal et al. 2025)."""
    return _make(
      cls,
      name='SmolLM2-135M-Instruct', num_layers=30, embed_dim=576, query_heads=9, kv_heads=3, head_dim=64,
      ffn_dim=1536, vocab_size=49_152, context_len=8192, rope_theta=100_000.0, tied_embeddings=True, eos_token_ids=(2,),
    )  # fmt: skip

  @classmethod
  def llama3_8b(cls) -> Self:
    """Llama 3.1 8B (Grattafiori et al. 2024), for simulation."""
    return _make(
      cls,
      name='Llama-3.1-8B', num_layers=32, embed_dim=4096, query_heads=32, kv_heads=8, head_dim=128,
      ffn_dim=14_336, vocab_size=128_256, context_len=131_072, rope_theta=500_000.0, eos_token_ids=(128_009,),
      rope_scaling=RopeScaling('llama3', 8.0),
    )  # fmt: skip

  @classmethod
  def llama3_70b(cls) -> Self:
    """Llama 3.1 70B (Grattafiori et al. 2024), for simulation."""
    return _make(
      cls,
      name='Llama-3.1-70B', num_layers=80, embed_dim=8192, query_heads=64, kv_heads=8, head_dim=128,
      ffn_dim=28_672, vocab_size=128_256, context_len=131_072, rope_theta=500_000.0, eos_token_ids=(128_009,),
      rope_scaling=RopeScaling('llama3', 8.0),
    )  # fmt: skip

  @classmethod
  def mistral_7b(cls) -> Self:
    """Mistral 7B v0.1 (Jiang et al. 2023), for simulation."""
    return _make(
      cls,
      name='Mistral-7B-v0.1', num_layers=32, embed_dim=4096, query_heads=32, kv_heads=8, head_dim=128,
      ffn_dim=14_336, vocab_size=32_000, context_len=32_768, eos_token_ids=(2,), sliding_window=4096,
    )  # fmt: skip

  @classmethod
  def qwen2_5_7b(cls) -> Self:
    """Qwen2.5-7B-Instruct (Yang et al. 2024), for simulation."""
    return _make(
      cls,
      name='Qwen2.5-7B-Instruct', num_layers=28, embed_dim=3584, query_heads=28, kv_heads=4, head_dim=128,
      ffn_dim=18_944, vocab_size=152_064, context_len=32_768, rope_theta=1_000_000.0, norm_eps=1e-6,
      eos_token_ids=(151_645, 151_643), qkv_bias=True,
    )  # fmt: skip

  @classmethod
  def qwen3_8b(cls) -> Self:
    """Qwen3-8B (Yang et al. 2025), for simulation."""
    return _make(
      cls,
      name='Qwen3-8B', num_layers=36, embed_dim=4096, query_heads=32, kv_heads=8, head_dim=128,
      ffn_dim=12_288, vocab_size=151_936, context_len=40_960, rope_theta=1_000_000.0, norm_eps=1e-6,
      eos_token_ids=(151_645, 151_643), qk_norm=True,
    )  # fmt: skip

  @classmethod
  def qwen3_32b(cls) -> Self:
    """Qwen3-32B (Yang et al. 2025), for simulation."""
    return _make(
      cls,
      name='Qwen3-32B', num_layers=64, embed_dim=5120, query_heads=64, kv_heads=8, head_dim=128,
      ffn_dim=25_600, vocab_size=151_936, context_len=40_960, rope_theta=1_000_000.0, norm_eps=1e-6,
      eos_token_ids=(151_645, 151_643), qk_norm=True,
    )  # fmt: skip

  @classmethod
  def mixtral_8x7b(cls) -> Self:
    """Mixtral 8x7B (Jiang et al. 2024), for simulation."""
    return _make(
      cls,
      name='Mixtral-8x7B-v0.1', num_layers=32, embed_dim=4096, query_heads=32, kv_heads=8, head_dim=128,
      ffn=Experts(count=8, active=2, dim=14_336), vocab_size=32_000, context_len=32_768, rope_theta=1_000_000.0,
      eos_token_ids=(2,),
    )  # fmt: skip

  @classmethod
  def deepseek_v3(cls) -> Self:
    """DeepSeek-V3 (Liu et al. 2024) without its draft layer, for simulation."""
    return _make(
      cls,
      name='DeepSeek-V3', num_layers=61, embed_dim=7168,
      attention=MLA(query_heads=128, query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
      ffn=Experts(
        count=256, active=8, dim=2048, shared_dim=2048, dense_layers=3, dense_dim=18_432, router_bias=True
      ),
      vocab_size=129_280, context_len=163_840, norm_eps=1e-6, eos_token_ids=(1,),
    )  # fmt: skip

  @classmethod
  def gpt_oss_120b(cls) -> Self:
    """GPT-OSS-120B (OpenAI 2025), for simulation: every other layer sees 128 tokens."""
    return _make(
      cls,
      name='gpt-oss-120b', num_layers=36, embed_dim=2880,
      attention=GQA(query_heads=64, kv_heads=8, head_dim=64, qkv_bias=True, out_bias=True, sinks=True),
      ffn=Experts(count=128, active=4, dim=2880, biases=True), vocab_size=201_088, context_len=131_072,
      rope_theta=150_000.0, eos_token_ids=(200_002,), sliding_window=128, windowed_layers=tuple(range(0, 36, 2)),
    )  # fmt: skip

  @classmethod
  def opt_13b(cls) -> Self:
    """OPT-13B (Zhang et al. 2022), for simulation."""
    return _opt(cls, 'OPT-13B', num_layers=40, embed_dim=5120, heads=40)

  @classmethod
  def opt_66b(cls) -> Self:
    """OPT-66B (Zhang et al. 2022), for simulation."""
    return _opt(cls, 'OPT-66B', num_layers=64, embed_dim=9216, heads=72)

  @classmethod
  def opt_175b(cls) -> Self:
    """OPT-175B (Zhang et al. 2022), for simulation."""
    return _opt(cls, 'OPT-175B', num_layers=96, embed_dim=12_288, heads=96)


def _make(cls: type[_Model], **fields: Any) -> _Model:
  return cast(Any, cls)(**fields)


def _opt(cls: type[_Model], name: str, num_layers: int, embed_dim: int, heads: int) -> _Model:
  return _make(
    cls,
    name=name, num_layers=num_layers, embed_dim=embed_dim,
    attention=GQA(heads, heads, embed_dim // heads, qkv_bias=True, out_bias=True), ffn=Plain(4 * embed_dim),
    vocab_size=50_272, context_len=2048, tied_embeddings=True, eos_token_ids=(2,), learned_positions=2050,
    norm_biases=True,
  )  # fmt: skip
