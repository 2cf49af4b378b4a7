"""Copies of cached blocks between places: how much went which way."""

import dataclasses

import numpy as np

from pdjax.metrics.span_rows import SpanRows


@dataclasses.dataclass(frozen=True, slots=True)
class CopiedBlocks:
  """The cached blocks that were copied from one place to another.

  Attributes:
    source: The place that had them.
    target: The place that got them.
    transfers: Transfers that ended well.
    tokens: Tokens of these blocks.
    bytes: Bytes put onto the target's devices.
  """

  source: str
  target: str
  transfers: int
  tokens: int
  bytes: int


def copied_blocks(spans: SpanRows) -> tuple[CopiedBlocks, ...]:
  """The copies of a run, one entry a way, in the order in which the ways were first taken."""
  rows = spans.rows[spans.is_copy]
  found = []
  for source, target in dict.fromkeys(zip(rows['worker'].tolist(), rows['target'].tolist(), strict=True)):
    way = rows[(rows['worker'] == source) & (rows['target'] == target)]
    tokens, num_bytes = int(np.sum(way['prompt_tokens'])), int(np.sum(way['wire_bytes']))
    found.append(CopiedBlocks(spans.place(source), spans.place(target), len(way), tokens, num_bytes))
  return tuple(found)
