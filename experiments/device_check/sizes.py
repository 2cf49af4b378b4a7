"""Sizes of all that a check of a device measures: as models have them, or toys that show that it works."""

import dataclasses

from pdjax.types import ModelSpec

Chunks = tuple[tuple[int, int], ...]  # (new tokens, cached tokens before them) of each chunk that is packed

_TOY = ModelSpec(
  name='toy', num_layers=1, embed_dim=64, query_heads=4, kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=128,
  context_len=256, eos_token_ids=(1,),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Shapes and how long things are timed.

  Attributes:
    copy_bytes: Of the array whose copy is the ceiling of bandwidth.
    product_size: Rows and columns of the matrices whose product is the ceiling of FLOP/s.
    rotated_bytes: Least bytes of the inputs that timed calls take in turns: more than any cache holds.
    groups: Groups of calls of which the median counts.
    group_s: Least seconds of a group.
    chained_calls: Most calls of a program, where calls are shorter than the start of a program.
    compile_s: Seconds after which kernels that are not compiled are given up, so that there is time for the others.
    heads: Query heads, key/value heads and head size of timed kernels.
    prefills: Packed chunks of each timed prefill, by worth.
    batches: Sequences of timed decode steps, by worth.
    contexts: Cached tokens of each of them, by worth.
    page_sizes: Tokens per page of timed kernels.
    checked_heads: Query heads, key/value heads and head sizes that answers are checked with.
    checked_page_sizes: Tokens per page that they are checked with.
    checked_dtypes: Dtypes that they are checked in.
    checked_alone: Dtypes that they are checked in with one chunk to a call, and with long contexts.
    compared_prefill: Packed chunks, as large as timed ones, that the automatic choice is compared with plain XLA at.
    compared_decode: Sequences and cached tokens of each that it is compared at.
    far_elements: Elements of a pool at whose far end pages are read: more than 32 bits count.
    checked_options: Names of options that they are checked with, of the first heads and pages.
    scores_bytes: Most bytes of the scores that the attention which keeps all of them may have.
    model: The model whose steps are measured.
    few_layers: Layers of the same model where few are enough.
    prompt_len: Tokens of the chunk whose prefill is measured.
    decode_context: Cached tokens of sequences whose decode steps are measured.
    decode_batches: Sequences of these.
    decode_steps: Decode steps that are timed, none of them fused.
    prefill_steps: Prefill steps that are timed.
    served: Requests of the small workload, tokens of each prompt, and tokens of each answer.
    handoff: Tokens of the prompt that is handed over, tokens of its chunks, and rounds.
    tuned_prefills: Packed chunks that parameters of prefill attention are timed at.
    tuned_blocks: Query tokens and cached tokens a block, of which the fastest is looked for.
    tuned_packed: Packed chunks that cuDNN's tiles are timed at.
    tuned_tile_rows: Rows of a tile, of which the fastest is looked for.
    tuned_decodes: Sequences and cached tokens of each that parameters of decode attention are timed at.
    tuned_block_tokens: Cached tokens a block, of which the fastest is looked for.
  """

  copy_bytes: int = 1 << 30
  product_size: int = 8192
  rotated_bytes: int = 256 << 20
  groups: int = 7
  group_s: float = 0.03
  chained_calls: int = 4
  compile_s: float = 55.0
  heads: tuple[int, int, int] = (32, 8, 128)
  prefills: tuple[Chunks, ...] = (
    ((4096, 0),),
    ((2048, 14_336),),
    ((16_384, 0),),
    ((1024, 0),),
    ((512, 0),),
    ((512, 0), (512, 1024), (512, 2048), (512, 3072)),
  )
  batches: tuple[int, ...] = (64, 16, 1, 128)
  contexts: tuple[int, ...] = (2048, 8192, 512)
  page_sizes: tuple[int, ...] = (16, 64)
  checked_heads: tuple[tuple[int, int, int], ...] = ((32, 8, 128), (9, 3, 64))
  checked_page_sizes: tuple[int, ...] = (16, 64)
  checked_dtypes: tuple[str, ...] = ('float32', 'bfloat16', 'float16')
  checked_options: tuple[str, ...] = ('plain', 'all, lse', 'int8 pages', 'window', 'soft cap', 'sinks', 'lse')
  checked_alone: tuple[str, ...] = ('float32', 'bfloat16')
  compared_prefill: Chunks = ((2048, 14_336),)
  compared_decode: tuple[int, int] = (64, 2048)
  far_elements: int = (1 << 31) + (1 << 22)
  scores_bytes: int = 4 << 30
  model: ModelSpec = dataclasses.field(default_factory=ModelSpec.llama3_8b)
  few_layers: int = 4
  prompt_len: int = 4096
  decode_context: int = 2048
  decode_batches: tuple[int, ...] = (1, 16, 64, 128)
  decode_steps: int = 24
  prefill_steps: int = 6
  served: tuple[int, int, int] = (8, 1024, 32)
  handoff: tuple[int, int, int] = (1024, 256, 3)
  tuned_prefills: tuple[Chunks, ...] = (((256, 768),), ((2048, 2048),))
  tuned_blocks: tuple[tuple[int, int], ...] = ((128, 512), (256, 1024), (256, 2048), (512, 1024))
  tuned_packed: tuple[Chunks, ...] = (((512, 0), (512, 1024), (512, 2048), (512, 3072)),)
  tuned_tile_rows: tuple[int, ...] = (128, 256, 512)
  tuned_decodes: tuple[tuple[int, int], ...] = ((1, 2048), (16, 2048), (64, 2048), (16, 8192))
  tuned_block_tokens: tuple[int, ...] = (512, 1024, 2048, 4096)

  @classmethod
  def real(cls) -> 'Sizes':
    """As models have it."""
    return cls()

  @classmethod
  def toy(cls) -> 'Sizes':
    """Small enough for a CPU to go through all of it in seconds: the figures mean nothing."""
    return cls(
      copy_bytes=1 << 20, product_size=64, rotated_bytes=1 << 16, groups=2, group_s=0.0, chained_calls=2, compile_s=300,
      heads=(4, 2, 16), prefills=(((32, 0),), ((8, 0), (8, 16))), batches=(2,), contexts=(64,), page_sizes=(16,),
      checked_heads=((4, 2, 16),), checked_page_sizes=(16,), checked_dtypes=('float32', 'bfloat16'),
      checked_options=('plain', 'all, lse', 'int8 pages'), checked_alone=('float32',), compared_prefill=((16, 40),),
      compared_decode=(2, 40), far_elements=1 << 18, model=_TOY, few_layers=1, prompt_len=32, decode_context=40,
      decode_batches=(1, 2), decode_steps=3, prefill_steps=2, served=(1, 32, 4), handoff=(16, 8, 1),
      tuned_prefills=(((8, 8),),), tuned_blocks=((8, 16),), tuned_packed=(((8, 0), (8, 8)),), tuned_tile_rows=(8,),
      tuned_decodes=((1, 32),), tuned_block_tokens=(16,),
    )  # fmt: skip
