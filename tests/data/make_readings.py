r"""Writes tests/data/readings.json and heads.npz: what transformers makes of chats and of the files of a checkpoint.

python tests/data/make_readings.py        # needs torch and transformers, which the tests do not

Each case is written here by hand, with the files that a folder holds, and stands in readings.json with what came of it.
"""

import json
import pathlib
import shutil
import tempfile

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tied_heads import HEADS
from tokenizers import decoders, models, pre_tokenizers

HERE = pathlib.Path(__file__).parent
FAMILIES = HERE / 'families'

# Chats

PLAIN = '{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}'
DUMP = '{% for m in messages %}{{ m | tojson }};{% endfor %}'
CALLS = (
  "{% for m in messages %}{{ m['role'] }}:{% if 'tool_calls' in m %}"
  "{% for call in m['tool_calls'] %}[{{ call.function.name }}({{ call.function.arguments | tojson }})]{% endfor %}"
  "{% endif %}{{ m['content'] }}{% if m.name is defined %}@{{ m.name }}{% endif %}"
  '{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %};{% endfor %}'
)
REASONING = (
  '{% for m in messages %}{% if m.reasoning_content is defined %}<{{ m.reasoning_content }}>{% endif %}'
  '{% if m.thinking is defined %}({{ m.thinking }}){% endif %}{{ m.content }};{% endfor %}'
)
PARTS = (
  '{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}'
  '{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %};{% endfor %}'
)
TOOLS = '{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}'
FIND = {'type': 'function', 'function': {'name': 'find', 'parameters': {'type': 'object', 'properties': {}}}}


def asked(**message) -> list[dict]:
  return [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', **message}]


CHATS = [
  {'template': PLAIN, 'messages': [{'role': 'assistant', 'content': None}]},
  {'template': CALLS, 'messages': asked(content='a', tool_calls=None)},
  {'template': CALLS, 'messages': asked(content=None, tool_calls=[{'function': {'name': 'f', 'arguments': None}}])},
  {'template': CALLS, 'messages': [{'role': 'tool', 'content': '7', 'name': 'f', 'tool_call_id': 'c1'}]},
  {'template': CALLS, 'messages': [{'role': 'tool', 'content': '7', 'name': None, 'tool_call_id': None}]},
  {'template': DUMP, 'messages': asked(content='a', refusal=None, audio=None, annotations=[])},
  {'template': DUMP, 'messages': asked(tool_calls=[{'id': None, 'function': {'arguments': {'a': None}}}])},
  {'template': DUMP, 'messages': asked(content='a', thinking='t')},
  {'template': DUMP, 'messages': asked(reasoning_content='c', content='a', thinking=None)},
  {'template': REASONING, 'messages': asked(content='a', reasoning='r')},
  {'template': REASONING, 'messages': asked(content='a', thinking='t')},
  {'template': REASONING, 'messages': asked(content='a', reasoning='r', thinking='t')},
  {'template': REASONING, 'messages': asked(content='a', reasoning='r', thinking='t', reasoning_content='c')},
  {'template': REASONING, 'messages': asked(content='a', reasoning='r', reasoning_content=None)},
  {'template': REASONING, 'messages': asked(content='a', reasoning='r', reasoning_content='')},
  {'template': PARTS, 'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]}]},
  {'template': PARTS, 'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': t} for t in 'abc']}]},
  {'template': PARTS, 'messages': [{'role': 'user', 'content': []}]},
  {'template': TOOLS, 'messages': [{'role': 'user', 'content': 'a'}], 'tools': [FIND]},
  {'template': TOOLS, 'messages': [{'role': 'user', 'content': 'a'}], 'tools': []},
  {'template': TOOLS, 'messages': [{'role': 'user', 'content': 'a'}]},
]

# Tokens that a folder names beside its tokenizer.json

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = ['<s>', '</s>', '<turn>', '<tool>', *LETTERS, 'ab']
TEXT = '<s>a<x> ab <tool><y></s>'


def flagged(content: str, **flags) -> dict:
  return {'content': content, 'lstrip': False, 'normalized': False, 'rstrip': False, 'single_word': False} | flags


TOKENS = [
  {},
  {'special_tokens_map.json': {'bos_token': '<s>'}},
  {'special_tokens_map.json': {'bos_token': flagged('<s>', lstrip=True), 'eos_token': flagged('</s>')}},
  {'tokenizer_config.json': {'bos_token': '<turn>'}, 'special_tokens_map.json': {'bos_token': '<s>'}},
  {'tokenizer_config.json': {'bos_token': '<turn>'}, 'special_tokens_map.json': {'bos_token': None}},
  {'tokenizer_config.json': {'bos_token': '<s>', 'added_tokens_decoder': {}},
    'special_tokens_map.json': {'bos_token': '<turn>', 'eos_token': '</s>'}},
  {'tokenizer_config.json': {'added_tokens_decoder': {'261': flagged('<x>', special=True, rstrip=True)}}},
  {'tokenizer_config.json': {'added_tokens_decoder': {'262': flagged('<y>'), '261': flagged('<x>', special=True)}}},
  {'tokenizer_config.json': {'added_tokens_decoder': {'3': flagged('<tool>', lstrip=True, special=False)}}},
  {'tokenizer_config.json': {'added_tokens_decoder': {'1': flagged('</s>', special=False)}, 'eos_token': '</s>'}},
  {'added_tokens.json': {'<x>': 261, '<tool>': 3}},
  {'added_tokens.json': {'<x>': 261}, 'tokenizer_config.json': {'pad_token': '<x>'}},
  {'added_tokens.json': {'<y>': 262, '<x>': 261}, 'special_tokens_map.json': {'sep_token': '<y>'}},
  {'tokenizer_config.json': {'additional_special_tokens': ['<x>', '<turn>']}},
  {'special_tokens_map.json': {'additional_special_tokens': ['<y>', '<x>']}},
  {'tokenizer_config.json': {'additional_special_tokens': ['<x>']},
    'special_tokens_map.json': {'additional_special_tokens': ['<y>']}},
  {'tokenizer_config.json': {'extra_special_tokens': ['<x>'], 'additional_special_tokens': ['<y>']}},
  {'tokenizer_config.json': {'extra_special_tokens': {'image': '<x>', 'audio_token': '<y>'}}},
  {'special_tokens_map.json': {'extra_special_tokens': [flagged('<x>', rstrip=True), '<y>']}},
  {'tokenizer_config.json': {'additional_special_tokens': [{'__type': 'AddedToken', **flagged('<x>', special=True)}]}},
  {'tokenizer_config.json': {'image_token': '<x>', 'pad_token': 'ab'}},
]  # fmt: skip


def write_tokenizer(folder: pathlib.Path) -> None:
  backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(VOCABULARY)}, [('a', 'b')]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(['<s>', '</s>', '<turn>'])
  backend.save(str(folder / 'tokenizer.json'))


def write_files(folder: pathlib.Path, files: dict) -> None:
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content))


def read_tokens(files: dict) -> dict:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_tokenizer(folder)
    write_files(folder, files)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    return {
      'files': files,
      'special': tokenizer.special_tokens_map,
      'tokens': tokenizer.convert_ids_to_tokens(ids),
      'decoded': tokenizer.decode(ids, skip_special_tokens=True),
      'bos': tokenizer.apply_chat_template(
        [{'role': 'user', 'content': 'a'}], chat_template='{{ bos_token }}', tokenize=False
      ),
    }


def render(case: dict) -> dict:
  with tempfile.TemporaryDirectory() as name:
    write_tokenizer(pathlib.Path(name))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name, bos_token='<s>')
    text = tokenizer.apply_chat_template(
      case['messages'], tools=case.get('tools'), chat_template=case['template'], tokenize=False
    )
    return {**case, 'text': text}


# What ends a sequence; LEFT_OUT takes a key out of config.json

LEFT_OUT = 'left out'
ENDS = [
  {'family': family, 'config': config, 'generation': generation}
  for family, config, generation in [
    ('llama2', LEFT_OUT, None),
    ('mistral', LEFT_OUT, None),
    ('qwen2', LEFT_OUT, None),
    ('qwen3', LEFT_OUT, None),
    ('llama2', None, None),
    ('mistral', None, {'eos_token_id': 7}),
    ('llama2', 5, None),
    ('llama2', [5, 7], None),
    ('llama2', [], None),
    ('llama2', 5, {'eos_token_id': 7}),
    ('llama2', 5, {'eos_token_id': [7, 9]}),
    ('llama2', 5, {'eos_token_id': None}),
    ('llama2', 5, {}),
    ('llama2', LEFT_OUT, {'eos_token_id': 7}),
    ('llama2', -1, None),
    ('qwen3', 5, {'eos_token_id': -1}),
    ('mistral', 5, {'eos_token_id': [7, 5]}),
  ]
]


def ends(case: dict) -> dict:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    shutil.copytree(FAMILIES / case['family'], folder, dirs_exist_ok=True)
    config = json.loads((folder / 'config.json').read_text()) | {'eos_token_id': case['config']}
    if case['config'] == LEFT_OUT:
      del config['eos_token_id']
    write_files(folder, {'config.json': config})
    if case['generation'] is not None:
      write_files(folder, {'generation_config.json': case['generation']})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prepared, _ = model._prepare_generation_config(None)
    found = prepared.eos_token_id
    meant = model.config.eos_token_id
    return {**case, 'meant': meant, 'generate': found if isinstance(found, list) else [] if found is None else [found]}


def head_logits(matrices: dict) -> np.ndarray:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    shutil.copy(FAMILIES / 'smollm2' / 'config.json', folder)
    tensors = load_file(FAMILIES / 'smollm2' / 'model.safetensors')
    embed = tensors.pop('model.embed_tokens.weight')
    save_file(tensors | matrices(embed), folder / 'model.safetensors', metadata={'format': 'pt'})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager')
    with np.load(FAMILIES / 'smollm2' / 'logits.npz') as file:
      prompt = torch.from_numpy(file['prompt'][:16].astype(np.int64))[None]
    with torch.no_grad():
      return model.eval()(prompt).logits[0].numpy()


if __name__ == '__main__':
  transformers.utils.logging.set_verbosity_error()
  readings = {
    'transformers': transformers.__version__,
    'tokenizers': tokenizers.__version__,
    'chats': [render(case) for case in CHATS],
    'tokens': [read_tokens(files) for files in TOKENS],
    'ends': [ends(case) for case in ENDS],
  }
  (HERE / 'readings.json').write_text(json.dumps(readings, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
  np.savez_compressed(HERE / 'heads.npz', **{name: head_logits(matrices) for name, matrices in HEADS.items()})
