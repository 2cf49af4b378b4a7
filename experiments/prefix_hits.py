"""Replays of the prompts of a trace through one prefix cache: the cache as it is, and the best that is possible.

Prompts come one after another to one cache, in the order of arrival; nothing is computed and no time passes. A hit is a
block of a prompt that the cache holds with all blocks before it. The unit is the trace's own block, of which each takes
a page. Answers are not cached, since a trace does not say which prompts go on from them.

LRU is the cache of a worker: its index and its allocator, which give up what was not used for the longest time, of one
prompt the last block first. Of a prompt that is longer than the cache the first blocks stay.

The optimum knows what comes (Belady 1966): of all that it has once a prompt is served, it gives up what is asked for
last, of one prompt the last block first, and keeps no block that is not asked for again. No other choice of what to
keep from prompt to prompt has more hits of blocks, even if hits need not be leading ones: a block that stays from one
use to the next is an interval, and to drop the one that ends last, wherever too many overlap, leaves the most of them
(Faigle and Nawijn 1995). Its share of tokens is that of the same choice, not of one made for tokens: a prompt's last
block may be cut short.
"""

import collections
import dataclasses
import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pdjax.metrics.charts.rows import table
from pdjax.metrics.charts.style import FIGURE, finish
from pdjax.metrics.charts.systems import system_scales
from pdjax.metrics.colours import LIGHT
from pdjax.serving.block_keys import KEY_BYTES
from pdjax.serving.page_allocator import PageAllocator
from pdjax.serving.prefix_index import PrefixIndex
from pdjax.types import Request

if TYPE_CHECKING:
  import altair as alt

LRU, OPTIMUM = WAYS = 'LRU', 'optimum'

_SCATTER = np.uint64(0x9E3779B97F4A7C15)  # odd: numbers in a row go to places of the index far from one another


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The prompts of a trace in blocks that are numbered: equal numbers mean equal blocks behind equal ones.

  Attributes:
    blocks: For each prompt its blocks, `[N]` int64.
    lens: For each prompt its tokens.
    block_size: Tokens of a block.
    num_distinct: Blocks that are unlike, whose numbers are below this.
  """

  blocks: tuple[np.ndarray, ...]
  lens: tuple[int, ...]
  block_size: int
  num_distinct: int

  @classmethod
  def of(cls, requests: Sequence[Request]) -> 'Prompts':
    """Number the blocks of requests, by their ids and what is before them.

    Raises:
      ValueError: if none has ids of blocks, or their blocks are of several sizes.
    """
    sizes = sorted({request.block_size for request in requests if request.block_size is not None})
    if len(sizes) != 1:
      found = f'blocks of {" and ".join(map(str, sizes))} tokens' if sizes else 'no ids of blocks'
      raise ValueError(
        f'the trace has {found}, expected ids of blocks that are all of one size, as traces of mooncake, '
        'bailian and weka have them.'
      )
    numbers: dict[tuple[int, int], int] = {}
    blocks = []
    for request in requests:
      at, path = -1, []
      for block in request.block_hashes:
        at = numbers.setdefault((at, block), len(numbers))
        path.append(at)
      blocks.append(np.array(path, np.int64))
    return cls(tuple(blocks), tuple(request.prompt_len for request in requests), sizes[0], len(numbers))


@dataclasses.dataclass(frozen=True)
class HitRate:
  """Hits as shares of all blocks and of all tokens of prompts; tokens behind a prompt's last block are never hit."""

  blocks: float
  tokens: float

  @classmethod
  def of(cls, prompts: Prompts, hits: Sequence[int]) -> 'HitRate':
    """The rate of some hits, the leading blocks of each prompt that are hit."""
    tokens = sum(min(hit * prompts.block_size, length) for hit, length in zip(hits, prompts.lens, strict=True))
    return cls(sum(hits) / sum(map(len, prompts.blocks)), tokens / sum(prompts.lens))


def replay_lru(prompts: Prompts, num_pages: int) -> list[int]:
  """The leading blocks of each prompt that a cache of so many pages holds, a block a page."""
  num_pages = min(num_pages, prompts.num_distinct)
  index, allocator = PrefixIndex({'cache': (num_pages, 1)}), PageAllocator(num_pages)

  def forget(pages: Sequence[int]) -> None:
    index.forget_pages('cache', pages)

  allocator.forget = forget
  hits = []
  for blocks in prompts.blocks:
    numbers = blocks.astype('<u8')
    keys = np.stack([numbers * _SCATTER, numbers], axis=1).tobytes()
    found = index.find(keys)
    hits.append(hit := index.hit('cache', found))
    held = index.pages('cache', found[:hit])
    allocator.hold(held)
    taken = allocator.take(min(len(blocks) - hit, allocator.num_free))
    index.store('cache', keys[KEY_BYTES * hit : KEY_BYTES * (hit + len(taken))], taken)
    allocator.cache(taken)
    allocator.drop((*held, *taken))
  return hits


def replay_optimum(prompts: Prompts, num_pages: int) -> list[int]:
  """The leading blocks of each prompt that the best cache of so many pages holds.

  Whatever asks for a block asks for those before it too, so that none of them is next asked for later than it is. Of a
  prompt, therefore, leading blocks are kept, and by the prompt that asks for them next their number is enough. Only
  what stays once a prompt is served is bounded, not what it needs meanwhile.
  """
  hits = []
  kept: collections.Counter[int] = collections.Counter()  # by the prompt that asks for them next
  furthest: list[int] = []  # prompts in `kept`, negative, and some that were
  num_kept = 0
  for prompt, later in enumerate(_later_uses(prompts)):
    hits.append(kept.pop(prompt, 0))
    num_kept -= hits[-1]
    for other, count in later:
      if other not in kept:
        heapq.heappush(furthest, -other)
      kept[other] += count
      num_kept += count
    while num_kept > num_pages:
      last = -furthest[0]
      dropped = min(kept[last], num_kept - num_pages)
      num_kept -= dropped
      kept[last] -= dropped
      if not kept[last]:
        del kept[last]
        heapq.heappop(furthest)
  return hits


def _later_uses(prompts: Prompts) -> list[list[tuple[int, int]]]:
  """For each prompt the later ones that are the next to ask for some of its blocks, each with how many."""
  never = len(prompts.blocks)
  following = np.full(prompts.num_distinct, never)
  found = []
  for prompt in reversed(range(never)):
    blocks = prompts.blocks[prompt]
    uses, counts = np.unique(following[blocks], return_counts=True)
    found.append([(use, count) for use, count in zip(uses.tolist(), counts.tolist(), strict=True) if use != never])
    following[blocks] = prompt
  return found[::-1]


def over_capacity(
  rates: dict[str, list[tuple[float, float]]], attainable: float, title: str, subtitle: str
) -> 'alt.LayerChart':
  """Hit rates over the tokens that a cache holds, a curve for each way to choose what stays.

  Args:
    rates: By way the (tokens, hit rate).
    attainable: The hit rate of a cache without end.
    title: The title.
    subtitle: A line below it.
  """
  import altair as alt

  tokens = sorted({capacity for points in rates.values() for capacity, _ in points})
  data: list[dict[str, Any]] = [
    {'system': name, 'tokens': capacity, 'rate': rate}
    for name, points in reversed(rates.items())  # the first is drawn last, over the others
    for capacity, rate in points
  ]
  x = alt.X(
    'tokens:Q', title='tokens that the cache holds',
    scale=alt.Scale(type='log', domain=[tokens[0], tokens[-1]], nice=False, padding=12),
    axis=alt.Axis(values=tokens if len(tokens) <= 10 else alt.Undefined, format='~s', grid=False),
  )  # fmt: skip
  y = alt.Y(
    'rate:Q', title='hits, of input tokens', scale=alt.Scale(domain=[0, attainable * 1.1 or 1], nice=False),
    axis=alt.Axis(tickCount=5, format='~%'),
  )  # fmt: skip
  colour, dash = system_scales(list(rates), OPTIMUM)
  base = alt.Chart(table(data)).encode(x=x, y=y, color=colour)
  lines = base.mark_line(strokeWidth=2).encode(strokeDash=dash)
  tooltip = [
    alt.Tooltip('system:N'), alt.Tooltip('tokens:Q', format=',~r'), alt.Tooltip('rate:Q', title='hits', format=FIGURE),
  ]  # fmt: skip
  points = base.mark_point(filled=True, size=60, opacity=1, strokeWidth=1).encode(tooltip=tooltip)
  most = alt.Chart(table([{'rate': attainable}]))
  rule = most.mark_rule(strokeWidth=1, strokeDash=[2, 2], color=LIGHT['soft']).encode(y=y)
  titled = alt.TitleParams(title, subtitle=[subtitle, f'dotted: a cache without end, {attainable:.1%} of input tokens'])
  return finish(alt.layer(rule, lines, points), title, height=240).properties(title=titled)


def replay(prompts: Prompts, capacities: Sequence[float]) -> tuple[HitRate, dict[float, dict[str, HitRate]]]:
  """The rates of a cache without end, and by capacity those of LRU and of the optimum.

  Raises:
    ValueError: if a capacity is below one block.
  """
  if min(capacities) < prompts.block_size:
    raise ValueError(f'the capacity {min(capacities):g} is below the {prompts.block_size} tokens of one block.')
  found = {}
  for capacity in capacities:
    num_pages = int(min(capacity / prompts.block_size, prompts.num_distinct))
    ways = {LRU: replay_lru, OPTIMUM: replay_optimum}
    found[capacity] = {name: HitRate.of(prompts, way(prompts, num_pages)) for name, way in ways.items()}
  attainable = HitRate.of(prompts, replay_optimum(prompts, prompts.num_distinct))
  return attainable, found
