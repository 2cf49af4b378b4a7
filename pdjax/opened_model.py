"""A config's model, opened: its checkpoint and tokenizer, and the requests that they make of prompts and workloads."""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pdjax.config import ServingConfig
from pdjax.serving.events import Arrived
from pdjax.serving.loop import Arrivals
from pdjax.types.checks import check_text
from pdjax.types.model import ModelSpec, mesh_shape
from pdjax.types.request import MAX_STOP_TOKENS, Request, SamplingParams
from pdjax.workload import Seeded, WorkloadContext

if TYPE_CHECKING:
  from pdjax.model.checkpoint import Checkpoint
  from pdjax.model.end_tokens import EndTokens
  from pdjax.model.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # a text, token ids, or the messages of a chat

_TOLD = ('num_requests', 'request_rate', 'burstiness', 'max_concurrency', 'seed')  # what a report says of a workload


@dataclasses.dataclass(frozen=True)
class OpenedModel:
  """A config's model as it is to be served, with its checkpoint and tokenizer where there are any.

  Attributes:
    model: The model.
    checkpoint: Its weights, if there are any.
    tokenizer: Its tokenizer, if there is one.
    source: The checkpoint by the name under which workers elsewhere find the same: of a hub id, with its commit.
  """

  model: ModelSpec
  checkpoint: 'Checkpoint | None' = None
  tokenizer: 'Tokenizer | None' = None
  source: str | None = None

  @functools.cached_property
  def end_tokens(self) -> 'EndTokens':
    """The tokens that end a sequence, and who says so."""
    if self.checkpoint is not None:
      return self.checkpoint.end_tokens()
    from pdjax.model.end_tokens import EndTokens

    turn = () if self.tokenizer is None else self.tokenizer.turn_end_ids
    return EndTokens((('config.model', self.model.eos_token_ids),), turn)

  @property
  def chat_end_ids(self) -> tuple[int, ...]:
    """Tokens that end an answer in a chat, besides the model's own: what the chat template puts behind one."""
    return self.end_tokens.turn

  def make_request(self, name: str, prompt: Prompt, sampling: SamplingParams = SamplingParams()) -> Request:
    """A request for a prompt, see `encode_prompt`; in a chat it also ends as the template ends an answer.

    Raises:
      ValueError: as `encode_prompt` and `Request` do.
    """
    return Request(name, self.encode_prompt(prompt), sampling, end_token_ids=self.end_ids_of(prompt))

  def end_ids_of(self, prompt: Prompt) -> tuple[int, ...]:
    """Tokens that end the answer to a prompt, besides the model's own: none for token ids."""
    is_chat = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
    return self.chat_end_ids if is_chat else ()

  def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
    """A prompt as token ids: a text goes through the chat template if there is one, and so do the messages of a chat.

    Raises:
      ValueError: if the prompt is empty, none of these, or words although there is no tokenizer.
    """
    if isinstance(prompt, Mapping):
      raise ValueError(f'the prompt is the message {prompt!r:.80}, expected a chat, a list of them; write [{{...}}].')
    if isinstance(prompt, bytes | bytearray) or not hasattr(prompt, '__getitem__') or not _has_length(prompt):
      raise ValueError(f'the prompt is {prompt!r:.80}, expected a text, messages or token ids.')
    if len(prompt) == 0:
      raise ValueError('the prompt is empty, expected some text, messages or token ids.')
    if isinstance(prompt, str):
      check_text(prompt, 'the prompt')
    elif not isinstance(prompt[0], Mapping):
      try:
        return tuple(map(operator.index, prompt))  # type: ignore[arg-type]
      except TypeError:
        raise ValueError(f'the prompt is {prompt!r:.80}, expected a text, messages or token ids.') from None
    if self.tokenizer is None:
      raise ValueError('the checkpoint has no tokenizer, so prompts must be token ids; use prompt_token_ids.')
    if not isinstance(prompt, str):
      return tuple(self.tokenizer.apply_chat_template(prompt))  # type: ignore[arg-type]
    if self.tokenizer.chat_template is None:
      return tuple(self.tokenizer.encode(prompt))
    return tuple(self.tokenizer.apply_chat_template([{'role': 'user', 'content': prompt}]))

  def arrivals(self, config: ServingConfig) -> Arrivals:
    """The requests of the config's workload as this model serves them, each with a seed.

    Raises:
      ValueError: if there is no workload, or it does not fit the model.
    """
    workload, model = config.workload, self.model
    if workload is None:
      raise ValueError('the config has no workload; set one, e.g. workload=Poisson(requests_per_s=1, num_requests=16).')
    if missing := [name for name in _TOLD if not hasattr(workload, name)]:  # the report asks, once all is served
      raise ValueError(
        f'the workload {type(workload).__name__} has no {", ".join(missing)}; a pdjax.workload.Workload has '
        f'{", ".join(_TOLD)}, each None where it has no meaning.'
      )
    encode = None if self.tokenizer is None else self.encode_prompt
    context = WorkloadContext(model.vocab_size, model.context_len, encode, self.chat_end_ids)
    return Seeded(workload.arrivals(context), config.seed)

  def known_requests(self, config: ServingConfig) -> list[Request]:
    """Of these, the requests that are known before anything is answered, in the order in which they come."""
    known = self.arrivals(config).due(math.inf, ())
    return [event.request for event in known if isinstance(event, Arrived)]


def _has_length(value: object) -> bool:
  try:
    len(value)  # type: ignore[arg-type]
  except TypeError:  # as of an array without axes
    return False
  return True


def open_model(config: ServingConfig) -> OpenedModel:
  """Open a config's checkpoint, if it has one, and see that the workers fit the model.

  Raises:
    ValueError: if the checkpoint is damaged or has another shape than `config.model`, or a worker's `tp` does not fit.
    FileNotFoundError: if it is not there.
  """
  from pdjax.model.checkpoint import find_checkpoint

  found_at = None if config.checkpoint in (None, 'random') else find_checkpoint(config.checkpoint)
  checkpoint = None if found_at is None else found_at.open()
  model = config.model
  if checkpoint is not None:
    found = checkpoint.spec
    if model is not None:
      found = dataclasses.replace(found, name=model.name)  # which tokens end a sequence, the checkpoint knows best
      if dataclasses.replace(found, eos_token_ids=model.eos_token_ids) != model:
        raise ValueError(
          f'checkpoint {config.checkpoint!r} holds {found}, but the config asks for {model}; leave one out.'
        )
    model = found
  assert model is not None
  if config.max_context is not None:
    if config.max_context > model.context_len:
      raise ValueError(f'max_context is {config.max_context}, but the context of {model.name} is {model.context_len}.')
    model = dataclasses.replace(model, context_len=config.max_context)
  for worker in config.workers:
    mesh_shape(model, worker.tp)
  source = None if found_at is None else found_at.source
  opened = OpenedModel(model, checkpoint, None if checkpoint is None else checkpoint.tokenizer(), source)
  if len(opened.end_tokens.chat_ids) > MAX_STOP_TOKENS:
    raise ValueError(
      f'{model.name} names {len(opened.end_tokens.chat_ids)} tokens as an end of sequence '
      f'({opened.end_tokens.by_source()}), but at most {MAX_STOP_TOKENS} are kept; name fewer in its configuration.'
    )
  return opened
