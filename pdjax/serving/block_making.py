"""The ways in which blocks are made, and the keys that follow: of requests, and of blocks that are sent on."""

from collections.abc import Mapping, Sequence

import numpy as np

from pdjax.serving.block_keys import KEY_BYTES, NO_PARENT, BlockHasher, as_array, stand_ins
from pdjax.serving.blocks import Blocks, Made
from pdjax.serving.requests import RequestState
from pdjax.types.cache import wire_dtype
from pdjax.types.model import ModelSpec
from pdjax.types.prefix_cache import PrefixCache
from pdjax.types.request import Request
from pdjax.types.worker import Role, WorkerSpec

_MOST_HASHERS = 4096  # of tenants and ways of making; more are made anew


class BlockMaking:
  """The ways in which blocks are made, and the keys of blocks by what made them.

  Attributes:
    block_tokens: Tokens of a block.
  """

  def __init__(self, model: ModelSpec, settings: PrefixCache, places: Mapping[str, WorkerSpec]):
    """Of a model and its places.

    Args:
      model: The model served.
      settings: The settings.
      places: Each place.
    """
    self.block_tokens = settings.block_tokens
    self._model = model
    self._settings = settings
    self._places = places
    self._made: dict[tuple[str, str], Made] = {}
    self._sent_on: dict[tuple[Made, str, str], Made] = {}
    self._asked: dict[str, frozenset[Made]] = {}  # by place
    self._hashers: dict[tuple[Made, str], BlockHasher] = {}

  # -------------------------------------------------------------------------- what makes a block

  def made_of(self, source: str, target: str) -> Made:
    """The way in which the blocks of a place are made.

    That is the model, the weights, the cache that later tokens attend to as they are computed, and the dtypes in which
    the numbers lose something, one after another.

    Args:
      source: The worker that computes them.
      target: The place; the same, or one that they are sent to.
    """
    way = source, target
    if way not in self._made:
      ours = self._places[source]
      weights, cached = str(ours.weights or ours.cached_dtype), ours.cached_dtype
      made = (self._model.name, weights, cached, weights if cached == 'float32' else cached)
      self._made[way] = self.sent_on(made, source, target)
    return self._made[way]

  def sent_on(self, made: Made, source: str, target: str) -> Made:
    """The way in which blocks that a place has are made once they are sent on to another."""
    if self._settings.lossy:
      return (self._model.name,)
    way = made, source, target
    if way not in self._sent_on:
      dtype, on_the_way = self._places[source].cached_dtype, list(made)
      for other in (wire_dtype(dtype, self._places[target].cached_dtype), self._places[target].cached_dtype):
        # float32 takes all others as they are; int8 has a scale that is found anew.
        if other != dtype and other != 'float32' and (other == 'int8' or other != on_the_way[-1]):
          on_the_way.append(other)
        dtype = other
      self._sent_on[way] = tuple(on_the_way)
    return self._sent_on[way]

  def is_useful(self, made: Made, target: str) -> bool:
    """Whether a request could go on from blocks that are made so at a place, or they could be sent on from there."""
    return self._places[target].role is Role.HOLD or made in self.asked_of(target)

  def asked_of(self, worker: str) -> frozenset[Made]:
    """The ways in which requests may ask a worker for blocks, by the workers that may compute their prompts."""
    if worker not in self._asked:
      prefills = [name for name, one in self._places.items() if one.ever_prefills]
      sources = prefills if self._places[worker].ever_decodes else [worker]
      self._asked[worker] = frozenset(self.made_of(source, worker) for source in sources)
    return self._asked[worker]

  def _hasher(self, made: Made, salt: str) -> BlockHasher:
    hasher = self._hashers.get((made, salt))
    if hasher is None:
      if len(self._hashers) >= _MOST_HASHERS:
        self._hashers.clear()
      hasher = self._hashers[made, salt] = BlockHasher(self.block_tokens, made, salt)
    return hasher

  # -------------------------------------------------------------------------- keys

  def has_hashes(self, request: Request) -> bool:
    """Whether ids of blocks stand for the tokens of a request."""
    return self._settings.trusts_block_hashes and request.block_size is not None

  def _content(self, request: Request, generated: Sequence[int]) -> tuple[np.ndarray, Made]:
    """The tokens of a sequence, or of its prompt what stands for them and what that is."""
    if self.has_hashes(request):
      assert request.block_size is not None
      tokens = stand_ins(request.block_hashes, request.block_size, request.prompt_len)
      return tokens, (f'ids of {request.block_size} tokens',)
    tokens = as_array(request.prompt)
    return (np.concatenate([tokens, as_array(generated)]) if len(generated) else tokens), ()

  def keys(self, entry: RequestState, made: Made) -> bytes:
    """The keys of the whole blocks of what is to be computed of a request before it decodes."""
    known, keys = entry.keys.get(made, (-1, b''))
    if known != len(entry.delivered):
      content, unit = self._content(entry.request, entry.delivered[:-1])
      keys = self._hasher((*made, *unit), entry.request.salt).keys(content)
      entry.keys[made] = len(entry.delivered), keys
    return keys

  def decoded_keys(self, entry: RequestState, made: Made) -> bytes:
    """The keys of the whole blocks of all that a request has cached: all its tokens but the last."""
    keys, size = self.keys(entry, made), self.block_tokens
    if self.has_hashes(entry.request):  # nobody can say what is asked with the tokens that came
      return keys
    first = len(keys) // KEY_BYTES * size
    sequence = [*entry.request.prompt[first:], *entry.tokens[max(first - entry.prompt_len, 0) : -1]]
    return keys + self._hasher(made, entry.request.salt).keys(sequence, keys[-KEY_BYTES:] or NO_PARENT)

  def blocks(self, entry: RequestState) -> Blocks:
    """The whole blocks of a request: of its prompt, and of the tokens that it has generated but the last."""
    content, unit = self._content(entry.request, entry.tokens[:-1])
    return Blocks(entry.request.id, self.whole(len(content)), entry.number, content, entry.request.salt, unit)

  def keys_of(self, blocks: Blocks, made: Made) -> bytes:
    """The keys of blocks, as something makes them."""
    if made not in blocks._keys:
      blocks._keys[made] = self._hasher((*made, *blocks._unit), blocks.salt).keys(blocks._content)
    return blocks._keys[made]

  def tokens_of(self, blocks: Blocks) -> tuple[int, ...]:
    """The tokens of blocks, for the log if it is to have them; none where nobody knows them."""
    return tuple(blocks._content.tolist()) if self._settings.log_tokens and not blocks._unit else ()

  def whole(self, tokens: int) -> int:
    """As many of some tokens as fill whole blocks."""
    return tokens - tokens % self.block_tokens
