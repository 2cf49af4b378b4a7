"""Every part of a checkpoint that names an end of sequence counts, and the table says where that departs from others.

Each row gives what ends a sequence here, what ends it in transformers' `generate` and, for GGUF, in llama.cpp.
"""

import json
import pathlib
import shutil

import pytest
from tokenizers import AddedToken

from pdjax.model.checkpoint import GGUFCheckpoint, RandomCheckpoint, SafetensorsCheckpoint, open_checkpoint, save_orbax
from pdjax.model.end_tokens import EndTokens
from pdjax.model.tokenizer import Tokenizer
from tests.model.checkpoint.test_gguf import write as write_gguf
from tests.model.checkpoint.test_safetensors import write as write_safetensors
from tests.model.test_tokenizer import byte_level, sentencepiece
from tests.tiny import TINY

DATA = pathlib.Path(__file__).parents[1] / 'data'
READINGS = json.loads((DATA / 'readings.json').read_text(encoding='utf-8'))


# By the two configurations: (family, config.json's eos_token_id, generation_config.json) as readings.json has them.
UNIONS = [
  ('llama2', 'left out', None, (2,), 'goes on: it reads the key of config.json, and not the default of its class'),
  ('mistral', 'left out', None, (2,), 'goes on'),
  ('qwen2', 'left out', None, (), 'the same'),
  ('qwen3', 'left out', None, (), 'the same'),
  ('llama2', None, None, (), 'the same: a null says that there is none'),
  ('mistral', None, {'eos_token_id': 7}, (7,), 'the same'),
  ('llama2', 5, None, (5,), 'the same'),
  ('llama2', [5, 7], None, (5, 7), 'the same'),
  ('llama2', [], None, (), 'the same'),
  ('llama2', 5, {'eos_token_id': 7}, (5, 7), 'goes on past 5'),
  ('llama2', 5, {'eos_token_id': [7, 9]}, (5, 7, 9), 'goes on past 5'),
  ('llama2', 5, {'eos_token_id': None}, (5,), 'goes on'),
  ('llama2', 5, {}, (5,), 'goes on'),
  ('llama2', 'left out', {'eos_token_id': 7}, (2, 7), 'goes on past 2'),
  ('llama2', -1, None, (), 'the same: nothing is -1'),
  ('qwen3', 5, {'eos_token_id': -1}, (5,), 'goes on past 5'),
  ('mistral', 5, {'eos_token_id': [7, 5]}, (5, 7), 'the same, in another order'),
]


def test_the_table_has_every_reading():
  assert [row[:3] for row in UNIONS] == [(one['family'], one['config'], one['generation']) for one in READINGS['ends']]


@pytest.mark.parametrize(
  ('row', 'reading'), list(zip(UNIONS, READINGS['ends'], strict=True)), ids=lambda one: str(one)[:70]
)
def test_both_configurations_count(tmp_path, row, reading):
  family, eos, generation, expected, generate = row
  shutil.copytree(DATA / 'families' / family, tmp_path, dirs_exist_ok=True)
  config = json.loads((tmp_path / 'config.json').read_text()) | {'eos_token_id': eos}
  if eos == 'left out':
    del config['eos_token_id']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  if generation is not None:
    (tmp_path / 'generation_config.json').write_text(json.dumps(generation))
  checkpoint = SafetensorsCheckpoint(tmp_path)
  assert checkpoint.spec.eos_token_ids == checkpoint.end_tokens().ids == expected
  assert generate.startswith('the same') == (set(expected) == set(reading['generate']) - {-1})
  assert set(expected) >= set(reading['generate']) - {-1}  # wider, never narrower


# A tokenizer whose tokens below 64 are special: the model is `families/llama2`, or the tiny one with V=300.

IM = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
CHATML = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def folder(
  path: pathlib.Path, config=None, eos=None, generation=None, special=None, specials=(), V=320
) -> pathlib.Path:
  """A model with V tokens, and a tokenizer that begins with special ones."""
  write_safetensors(path, config={'eos_token_id': eos, 'vocab_size': V}, vocab_size=V)
  if generation is not None:
    (path / 'generation_config.json').write_text(json.dumps({'eos_token_id': generation}))
  metadata = byte_level(tokens=[*specials, *byte_level()['tokenizer.ggml.tokens'][4:]], **{
    'token_type': [3] * len(specials) + [1] * 262, 'bos_token_id': None, 'eos_token_id': None,
  })  # fmt: skip
  Tokenizer.from_gguf_metadata(metadata).save(path)
  (path / 'tokenizer_config.json').unlink()
  for name, content in (('tokenizer_config.json', config), ('special_tokens_map.json', special)):
    if content is not None:
      (path / name).write_text(json.dumps(content))
  return path


@pytest.mark.parametrize(
  ('files', 'ids', 'turn', 'sources', 'generate'),
  [
    ({'config': {'eos_token': '<|im_end|>'}}, (2,), (), {'tokenizer_config.json': [2]}, 'goes on'),
    ({'special': {'eos_token': '<|im_end|>'}}, (2,), (), {'special_tokens_map.json': [2]}, 'goes on'),
    ({'special': {'eos_token': {'content': '<|im_end|>'}}}, (2,), (), {'special_tokens_map.json': [2]}, 'goes on'),
    ({'config': {'eos_token': '<|endoftext|>'}, 'special': {'eos_token': '<|im_end|>'}}, (0, 2), (),
      {'tokenizer_config.json': [0], 'special_tokens_map.json': [2]}, 'goes on; its tokenizer takes the map'),
    ({'config': {'added_tokens_decoder': {}}, 'special': {'eos_token': '<|im_end|>'}}, (2,), (),
      {'special_tokens_map.json': [2]}, 'goes on; its tokenizer leaves the map aside'),
    ({'config': {'eos_token': '<|im_end|>'}, 'special': {'eos_token': None}}, (2,), (),
      {'tokenizer_config.json': [2]}, 'goes on; its tokenizer has no end'),
    ({'config': {'eos_token': None}}, (), (), {}, 'the same'),
    ({'config': {'eos_token': '<|im_end|>'}, 'eos': 0}, (0, 2), (),
      {'config.json': [0], 'tokenizer_config.json': [2]}, 'goes on past 2'),
    ({'config': {'eos_token': '<|im_end|>'}, 'eos': 0, 'generation': [2, 1]}, (0, 2, 1), (),
      {'config.json': [0], 'generation_config.json': [2, 1], 'tokenizer_config.json': [2]}, 'goes on past 0'),
    ({'config': {'eos_token': '<|endoftext|>', 'chat_template': CHATML}}, (0,), (2,),
      {'tokenizer_config.json': [0], 'chat template': [2]}, 'goes on past the turn'),
    ({'config': {'chat_template': CHATML}, 'eos': 0}, (0,), (2,), {'config.json': [0], 'chat template': [2]},
      'goes on past the turn'),
    ({'config': {'eos_token': '<|im_end|>', 'chat_template': CHATML}, 'eos': 2}, (2,), (2,),
      {'config.json': [2], 'tokenizer_config.json': [2], 'chat template': [2]}, 'the same'),
  ],
)  # fmt: skip
def test_the_tokenizer_and_its_template_count(tmp_path, files, ids, turn, sources, generate):
  checkpoint = open_checkpoint(folder(tmp_path, specials=IM, **files))
  ends = checkpoint.end_tokens()
  assert (ends.ids, ends.turn, ends.by_source()) == (ids, turn, sources), generate
  assert checkpoint.spec.eos_token_ids == checkpoint.tokenizer().eos_token_ids == ids
  assert json.loads(json.dumps(ends.by_source())) == sources
  assert ends.chat_ids == tuple(dict.fromkeys((*ids, *turn)))


def test_an_end_that_the_model_cannot_give_is_told_and_left_out(tmp_path, caplog):
  path = folder(tmp_path, specials=IM, eos=2, V=265)
  added = {'added_tokens_decoder': {'265': {'content': '<late>', 'special': True}}, 'eos_token': '<late>'}
  (path / 'tokenizer_config.json').write_text(json.dumps(added))
  assert SafetensorsCheckpoint(path).end_tokens().by_source() == {'config.json': [2]}
  assert 'tokenizer_config.json names token 265 as an end of sequence, but the model gives 0 to 264 only' in caplog.text


def test_an_end_that_the_tokenizer_lacks_is_refused(tmp_path):
  for name in ('config', 'special'):
    path = tmp_path / name
    path.mkdir()
    folder(path, specials=IM, **{name: {'eos_token': '<|nowhere|>'}})
    with pytest.raises(ValueError, match=r"lacks token '<\|nowhere\|>', .*(_config|_map)\.json names it as eos_token"):
      SafetensorsCheckpoint(path)


# What a chat template puts behind an assistant's message

LLAMA2 = (
  "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
  '{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}'
)
ALTERNATE = (
  "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('must alternate') }}{% endif %}{{ m.content }}</s>{% endfor %}"
)
TURN = '{% for m in messages %}<turn>{{ m.role }}{{ m.content }}{% endfor %}'
BETWEEN = '{% for m in messages %}{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}'
LAST = "{% for m in messages %}{{ m.content }}{{ '</s>' if loop.last else '<turn>' }}{% endfor %}"
THINK = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<turn>{% endfor %}"
IN_PARTS = '{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}'
SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
  ('template', 'expected', 'authority'),
  [
    (None, (), 'nothing to say'),
    (LLAMA2, (1,), 'Llama 2: a space, then the end of sequence'),
    (ALTERNATE, (1,), 'Mistral: roles alternate'),
    (TURN, (2,), 'GLM: its generation_config.json too ends answers with what opens the next turn'),
    (BETWEEN, (1,), 'the end stands between turns only'),
    (LAST, (1,), 'gpt-oss: the last message ends with a token of its own'),
    (THINK, (2,), 'Qwen 3: the answer is what follows its thoughts'),
    (IN_PARTS, (1,), 'a template that knows parts only'),
    ('{% for m in messages %}{{ m.content }}\n\n{% endfor %}', (), 'text alone ends no turn'),
    ('{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}', (), 'text alone ends no turn'),
    ('{% for m in messages %}{{ m.content }}<tool>{% endfor %}', (3,), 'an added token that is not special'),
    ('{% for m in messages %}{{ m.content }}ab{% endfor %}', (), 'a word of the vocabulary'),
    (SYSTEM, (), 'a template that refuses the chat'),
    (SYSTEM + '{% for m in messages %}{{ m.content }}<turn>{% endfor %}', (2,), 'a template that asks for a system'),
    ('{% for m in messages %}{{ m.content }}<tool>\n{% endfor %}</s>', (3,), 'Phi-3: <|end|> is not special, </s> is'),
    ('{% for m in messages %}{{ m.content }}.<turn>{% endfor %}', (2,), 'text before the end is still the message'),
    ('{% for m in messages %}{{ m.content }}\nab: {% endfor %}<turn>', (2,), 'the chat ends with it'),
    ('{{ raise_exception("never") }}', (), 'a template that refuses every chat'),
    ('{% if %}', (), 'no template'),
    ('{{ messages[0].content }}</s>', (), 'a template that leaves answers out'),
    ("{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}", (1,), 'Zephyr'),
  ],
)  # fmt: skip
def test_the_token_behind_an_answer_is_found(template, expected, authority):
  tokenizer = Tokenizer.from_gguf_metadata(byte_level(chat_template=template))
  assert tokenizer.turn_end_ids == expected, authority


@pytest.mark.parametrize(
  ('added', 'behind', 'expected', 'authority'),
  [
    ('</think>', '</think><turn>', (2,), 'Qwen 3: what closes a tag is part of the message'),
    ('</think>', '</think>\n\n<turn>', (2,), 'Qwen 3'),
    ('</think>', '</think>', True, 'nothing else stands there'),
    ('\n\n', '\n\n', (), 'Gemma has such tokens: a paragraph ends no turn'),
    ('\n\n', '\n\n<turn>', (2,), 'Gemma'),
    ('</p>', '</p> and more', True, 'the first that was added'),
  ],
)
def test_what_was_added_to_the_vocabulary_ends_a_turn_by_what_it_is(added, behind, expected, authority):
  template = '{% for m in messages %}{{ m.content }}' + behind + '{% endfor %}'
  tokenizer = Tokenizer.from_gguf_metadata(byte_level(chat_template=template))
  tokenizer.backend.add_tokens([AddedToken(added, special=False, normalized=False)])
  expected = (tokenizer.backend.token_to_id(added),) if expected is True else expected
  assert tokenizer.turn_end_ids == expected, authority


def test_the_token_behind_an_answer_is_found_behind_a_prepended_space():
  metadata = sentencepiece() | {'tokenizer.chat_template': '{% for m in messages %}{{ m.content }}<end>{% endfor %}'}
  tokenizer = Tokenizer.from_gguf_metadata(metadata)
  tokenizer.backend.add_tokens([AddedToken('<end>', normalized=True)])  # found once spaces are ▁
  assert tokenizer.turn_end_ids == (tokenizer.backend.token_to_id('<end>'),)


# GGUF: what llama.cpp ends with is by its source, src/llama-vocab.cpp: the three keys, and tokens by their spelling.

LLAMA3 = ['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>', '<|eom_id|>']
EOT = '{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}'


def gguf_file(path: pathlib.Path, pre: str, tokens: list[str], template: str | None, **ids: int) -> pathlib.Path:
  metadata = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': tokens + ['t', 'u', 'tu'] + [f't{i}' for i in range(37 - len(tokens))],
    'tokenizer.ggml.token_type': [3] * len(tokens) + [1] * (40 - len(tokens)),
    'tokenizer.ggml.merges': ['t u'],
    'tokenizer.ggml.eot_token_id': None,
    'tokenizer.chat_template': template,
  } | {f'tokenizer.ggml.{key}_token_id': token for key, token in ids.items()}
  write_gguf(path, metadata=metadata)
  return path


@pytest.mark.parametrize(
  ('pre', 'tokens', 'template', 'keys', 'ids', 'chat_ids', 'llama_cpp', 'beyond'),
  [
    ('llama-bpe', LLAMA3, EOT, {'eos': 1}, (1,), (1, 2), {1, 2, 3}, [3]),
    ('llama-bpe', LLAMA3, EOT, {'eos': 2}, (2, 1, 3), (2, 1, 3), {1, 2, 3}, []),
    ('llama-bpe', LLAMA3, None, {'eos': 1}, (1,), (1,), {1, 2, 3}, [2, 3]),  # a base model goes on past turns
    ('qwen2', IM, CHATML, {'eos': 0}, (0,), (0, 2), {0, 2}, []),
    ('qwen2', IM, CHATML, {'eos': 2}, (2, 0), (2, 0), {0, 2}, []),
    ('qwen2', IM, CHATML, {'eos': 0, 'eot': 2}, (0, 2), (0, 2), {0, 2}, []),
    ('smollm', IM, CHATML, {'eos': 2}, (2,), (2,), {0, 2}, [0]),
    ('smollm', IM, CHATML, {'eos': 0}, (0,), (0, 2), {0, 2}, []),
    ('tekken', ['<s>', '</s>', '<|im_end|>'], CHATML, {'eos': 1}, (1,), (1, 2), {1, 2}, []),
    ('falcon3', ['<|endoftext|>', '<|user|>'], '{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}',
      {'eos': 0}, (0,), (0,), {0}, []),
    ('deepseek-r1-qwen', ['<｜end▁of▁sentence｜>', '<｜User｜>'],
      '{% for m in messages %}<｜User｜>{{ m.content }}<｜end▁of▁sentence｜>{% endfor %}',
      {'eos': 0}, (0,), (0,), {0}, []),
    ('gpt-2', ['<end_of_turn>', '</s>'], '{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}',
      {'eos': 1}, (1,), (1, 0), {0, 1}, []),
    ('gpt-2', ['<custom_end>', '</s>'], '{% for m in messages %}{{ m.content }}<custom_end>{% endfor %}',
      {'eos': 1}, (1,), (1, 0), {1}, []),  # llama.cpp knows no such spelling and goes on
  ],
)  # fmt: skip
def test_a_gguf_chat_stops_at_the_end_of_its_turn(
  tmp_path, pre, tokens, template, keys, ids, chat_ids, llama_cpp, beyond
):
  """`beyond`: what llama.cpp ends with by its spelling alone, where neither a key nor the template names it."""
  checkpoint = GGUFCheckpoint(gguf_file(tmp_path / 'tiny.gguf', pre, tokens, template, **keys))
  ends = checkpoint.end_tokens()
  assert checkpoint.spec.eos_token_ids == ends.ids == ids
  assert ends.chat_ids == chat_ids
  assert sorted(llama_cpp - {*chat_ids}) == beyond


@pytest.mark.parametrize('types', [[1] * 40, None])
def test_an_end_of_turn_that_a_gguf_file_types_as_a_word_ends_chats_all_the_same(tmp_path, types):
  """As in llama.cpp, which goes by the spelling; in raw text it stays the word that the file calls it."""
  metadata = {'tokenizer.ggml.token_type': types, 'tokenizer.ggml.eos_token_id': 0, 'tokenizer.chat_template': CHATML}
  vocabulary = {
    'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'qwen2', 'tokenizer.ggml.merges': ['t u'],
    'tokenizer.ggml.tokens': [*IM, 't', 'u', 'tu', *(f't{i}' for i in range(37 - len(IM)))],
    'tokenizer.ggml.eot_token_id': None,
  }  # fmt: skip
  write_gguf(tmp_path / 'tiny.gguf', metadata=vocabulary | metadata)
  assert GGUFCheckpoint(tmp_path / 'tiny.gguf').end_tokens().by_source() == {
    'tokenizer.ggml.eos_token_id': [0], 'chat template': [2],
  }  # fmt: skip


def test_a_gguf_file_says_which_key_names_an_end(tmp_path):
  path = gguf_file(tmp_path / 'tiny.gguf', 'llama-bpe', LLAMA3, EOT, eos=2, eot=2, eom=3)
  assert GGUFCheckpoint(path).end_tokens().by_source() == {
    'tokenizer.ggml.eos_token_id': [2],
    'tokenizer.ggml.eot_token_id': [2],
    'tokenizer.ggml.eom_token_id': [3],
    'tokenizer.ggml.tokens': [1, 3],
    'chat template': [2],
  }


# Orbax


def test_a_converted_checkpoint_keeps_who_named_its_ends(tmp_path):
  source = tmp_path / 'source'
  source.mkdir()
  folder(source, specials=IM, config={'eos_token': '<|endoftext|>', 'chat_template': CHATML}, eos=1)
  original = open_checkpoint(source)
  converted = save_orbax(original, tmp_path / 'converted')
  assert converted.end_tokens() == original.end_tokens()
  assert converted.end_tokens().by_source() == {
    'config.json': [1], 'tokenizer_config.json': [0], 'chat template': [2],
  }  # fmt: skip
  # Folders of before name no sources, and the tokenizer's end did not count.
  path = tmp_path / 'converted' / 'pdjax.json'
  description = json.loads(path.read_text())
  del description['end_tokens']
  description['spec']['eos_token_ids'] = [1]
  path.write_text(json.dumps(description))
  older = open_checkpoint(tmp_path / 'converted')
  assert older.spec.eos_token_ids == older.tokenizer().eos_token_ids == (1, 0)
  assert older.end_tokens().by_source() == {'pdjax.json': [1], 'tokenizer_config.json': [0], 'chat template': [2]}


@pytest.mark.parametrize('ends', [5, [2], {'config.json': 2}, {'config.json': ['2']}, {'config.json': [7]}, {}])
def test_a_damaged_list_of_ends_is_refused(tmp_path, ends):
  save_orbax(RandomCheckpoint(TINY), tmp_path / 'converted')
  path = tmp_path / 'converted' / 'pdjax.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'end_tokens': ends}))
  with pytest.raises(ValueError, match=r'pdjax\.json has the end_tokens .* convert it again'):
    open_checkpoint(tmp_path / 'converted')


def test_random_weights_end_as_their_shape_says():
  assert RandomCheckpoint(TINY).end_tokens().by_source() == {'model': [1]}


def test_no_id_counts_twice():
  ends = EndTokens((('a', (3, 1)), ('b', (1, 2))), turn=(2, 5))
  assert (ends.ids, ends.chat_ids) == ((3, 1, 2), (3, 1, 2, 5))
