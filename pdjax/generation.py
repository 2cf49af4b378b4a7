"""Answers to a list of prompts, by one run."""

import dataclasses
from collections.abc import Mapping, Sequence, Set

from pdjax.config import ServingConfig
from pdjax.deployment import choose_config
from pdjax.launch import run
from pdjax.opened_model import Prompt, open_model
from pdjax.types.checked import Seed, checks_arguments
from pdjax.types.fitting import shown
from pdjax.types.request import Completion, SamplingParams
from pdjax.workload import Given


@checks_arguments('prompts')
def generate(
  prompts: Sequence[Prompt],
  config: ServingConfig | None = None,
  sampling: SamplingParams | Sequence[SamplingParams] | None = None,
  *,
  checkpoint: str | None = None,
  seed: Seed | None = None,
) -> list[Completion]:
  """Answer prompts: texts and chats go through the chat template, token ids are taken as they are.

      for answer in pdjax.generate(['What do bees make?', 'Who wrote Hamlet?']):
        print(answer.text)

  Args:
    prompts: Each a text, the messages of a chat, or token ids.
    config: The config that serves them; None takes `default_config(checkpoint)`.
    sampling: For all prompts, or one for each; None takes the defaults.
    checkpoint: A model for the default config: a GGUF file, a folder with safetensors, or 'smollm2'.
    seed: The seed from which prompts whose sampling has none draw theirs; None takes the config's.

  Returns:
    A completion for each prompt, in their order; with `SamplingParams.n` above 1, that many in a row.

  Raises:
    ValueError: if a prompt cannot be served; the message says which and why.
    FileNotFoundError: if the model is not there; the message says what to install.
  """
  if isinstance(prompts, str):
    raise ValueError(f'prompts is the text {prompts[:40]!r}, expected a list of prompts; write [{prompts[:40]!r}].')
  if isinstance(prompts, bytes | Mapping | Set | type) or not hasattr(prompts, '__getitem__'):
    raise ValueError(f'prompts is {shown(prompts)}, expected a list of prompts.')
  sampling = SamplingParams() if sampling is None else sampling
  each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
  if len(each) != len(prompts):
    raise ValueError(
      f'there are {len(each)} sampling parameters for {len(prompts)} prompts; give one, or one for each.'
    )
  config = choose_config(config, checkpoint, seed)
  opened = open_model(config)
  requests = []
  for index, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
    try:
      requests.append(opened.make_request(f'request-{index}', prompt, params))
    except ValueError as error:
      raise ValueError(f'prompt {index}: {error}') from error
  completions = run(dataclasses.replace(config, workload=Given(tuple(requests))), opened=opened).completions
  by_id = {completion.request.id: completion for completion in completions}
  answers = []
  for index, request in enumerate(requests):
    for sample in request.samples():
      answer = by_id[sample.id]
      if answer.error:
        raise ValueError(f'prompt {index}: {answer.error}')
      answers.append(answer)
  return answers
