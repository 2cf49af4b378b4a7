"""Chats become the text that transformers makes of them; what we serve beyond it, and what we refuse, is told here."""

import json
import pathlib

import pytest

from pdjax.model.tokenizer import Tokenizer
from tests.model.test_tokenizer import byte_level, user

READINGS = json.loads((pathlib.Path(__file__).parents[1] / 'data' / 'readings.json').read_text(encoding='utf-8'))
FIND = {'type': 'function', 'function': {'name': 'find', 'parameters': {}}}
FIRST = '{{ messages[0].content }}'


def with_template(template: str | None, **changes) -> Tokenizer:
  return Tokenizer.from_gguf_metadata(byte_level(chat_template=template, **changes))


def rendered(template: str, messages: list, tools: list | None = None) -> str:
  tokenizer = with_template(template)
  ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tools=tools)
  return tokenizer.decode(ids, skip_special=False)


@pytest.mark.parametrize('case', READINGS['chats'], ids=lambda case: str(case['messages'][-1])[:60])
def test_messages_mean_what_they_mean_to_transformers(case):
  assert rendered(case['template'], case['messages'], case.get('tools')) == case['text']


def test_the_messages_given_stay_as_they_are():
  messages = [{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}], 'name': None, 'reasoning': 'r'}]
  copy = json.loads(json.dumps(messages))
  rendered(FIRST, messages)
  assert messages == copy


JOINED = '{% for m in messages %}{{ m.content }};{% endfor %}'
LLAMA4 = '{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}'
LLAMA4 += "{{ p['text'] }}|{% endfor %}{% endif %};{% endfor %}"
MACRO = '{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for p in content %}{{ p.text }}|'
MACRO += '{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ show(m.content) }};{% endfor %}'


def text(words: str, **more) -> dict:
  return {'type': 'text', 'text': words} | more


def of_each(body: str) -> str:
  """A template that writes this for each message."""
  return '{% for m in messages %}' + body + '{% endfor %}'


def each(before: str, parts: str, behind: str = '') -> str:
  """A template that writes the text of each part of each message, after it has put the parts somewhere."""
  return of_each(before + '{% for i in ' + parts + ' %}{{ i.text }}|{% endfor %}' + behind)


AB, SAME = [text('a'), text('b')], 'transformers'


@pytest.mark.parametrize(
  ('template', 'content', 'expected', 'authority'),
  [
    (JOINED, [text('a'), text('b')], 'ab;', 'the contract; transformers would write the list'),
    (JOINED, ['a', text('b')], 'ab;', 'the contract: strings are parts, as servers of the OpenAI API take them'),
    (JOINED, [{'text': 'a'}], 'a;', 'the contract: a part with text alone is text'),
    (JOINED, [], ';', 'the contract'),
    (JOINED, [text('a', cache_control={'type': 'ephemeral'})], 'a;', 'the contract: other keys of a part say nothing'),
    (JOINED, (text('a'), text('b')), 'ab;', 'the contract'),
    # A template that goes through the parts gets them, in each of its ways.
    (LLAMA4, [text('a'), text('b')], 'a|b|;', 'transformers'),
    (LLAMA4, ['a', {'text': 'b'}], 'a|b|;', 'the contract: each part a mapping with its type'),
    (each('{% with c = m.content %}', 'c', '{% endwith %}'), AB, 'a|b|', SAME),
    (each('{% set ns = namespace(c=m.content) %}', 'ns.c'), AB, 'a|b|', SAME),
    (each('{% set x, c = m.role, m.content %}', 'c'), AB, 'a|b|', SAME),
    (each("{% set d = {'c': m.content} %}", 'd.c'), AB, 'a|b|', SAME),
    (each("{% for k, v in m.items() if k == 'content' %}", 'v', '{% endfor %}'), AB, 'a|b|', SAME),
    (each('', '[] + m.content'), AB, 'a|b|', SAME),
    (each('', 'm.content[:1]'), AB, 'a|', SAME),
    (each('{% if m.content is iterable and m.content is not string %}', 'm.content', '{% endif %}'), AB, 'a|b|', SAME),
    (of_each('{% set p = m.content[0] %}{{ p.text }}'), AB, 'a', SAME),
    (of_each('{{ (m.content | first).text }}'), AB, 'a', SAME),
    (of_each("{{ m.content | join('-', attribute='text') }}"), AB, 'a-b', SAME),
    (of_each("{{ '<' + m.content + '>' }}"), AB, '<ab>', 'the contract: the template takes it for text'),
    (of_each('{{ m.content | trim | upper }}'), [text(' a'), text('b ')], 'AB', 'the contract'),
    (LLAMA4, 'a', 'a;', 'transformers'),
    (MACRO, [text('a'), text('b')], 'a|b|;', 'transformers'),
    (MACRO.replace('show(m.content)', 'show(content=m["content"])'), [text('a')], 'a|;', 'transformers'),
    ("{% for p in messages[0]['content'] %}{{ p.text }}|{% endfor %}", [text('a'), text('b')], 'a|b|', 'transformers'),
    ('{% for p in messages[0].get("content") %}{{ p.text }}|{% endfor %}', [text('a')], 'a|', 'transformers'),
    ('{% set c = messages[0].content %}{% for p in c %}{{ p.text }}|{% endfor %}', [text('a')], 'a|', 'transformers'),
    ('{% set c = messages[0].content %}{% set d = c %}{% for p in d %}{{ p.text }}|{% endfor %}', [text('a')], 'a|',
      'transformers'),
    ('{% set n = namespace(c=none) %}{% set n.c = messages[0].content %}{% for p in n.c %}{{ p.text }}|{% endfor %}',
      [text('a')], 'a|', 'transformers'),
    ('{% for p in messages[0].content | selectattr("type", "equalto", "text") %}{{ p.text }}|{% endfor %}',
      [text('a'), text('b')], 'a|b|', 'transformers'),
    ("{{ messages[0].content | map(attribute='text') | join('|') }}", [text('a'), text('b')], 'a|b', 'transformers'),
    ("{{ messages[0]['content'][0]['text'] }}", [text('a'), text('b')], 'a', 'transformers'),
    ('{% for p in (messages[0].content or []) %}{{ p.text }}|{% endfor %}', [text('a')], 'a|', 'transformers'),
    # These go through something else, so they get text.
    ("{{ messages[0].content | trim }}", [text(' a'), text('b ')], 'ab', 'the contract'),
    ("{% for w in (messages[0].content | trim).split('b') %}{{ w }}|{% endfor %}", [text('ab'), text('c')], 'a|c|',
      'the contract'),
    ("{% set c = messages[0].content.split('</think>')[-1] %}{{ c }}", [text('a</think>'), text('b')], 'b',
      'the contract'),
    ('{% for m in messages[0:1] %}{{ m.content }}{% endfor %}', [text('a'), text('b')], 'ab', 'the contract'),
  ],
)  # fmt: skip
def test_content_in_parts_is_joined_unless_the_template_goes_through_it(template, content, expected, authority):
  assert rendered(template, [{'role': 'user', 'content': content}]) == expected, authority


@pytest.mark.parametrize('template', [JOINED, LLAMA4])
@pytest.mark.parametrize(
  ('part', 'message'),
  [
    ({'type': 'image_url', 'image_url': {'url': 'cat.png'}}, r"messages\[1\]\['content'\]\[1\] is of type 'image_url'"),
    ({'type': 'input_audio', 'input_audio': {}}, "of type 'input_audio', expected 'text'"),
    ({'type': 'file', 'file': {'file_id': 'f'}}, "of type 'file', expected 'text'"),
    ({'type': 'refusal', 'refusal': 'no'}, "of type 'refusal', expected 'text'"),
    ({'type': 'image', 'text': 'a'}, "of type 'image', expected 'text'"),
    ({'type': 'text'}, "of type 'text' with the text None, expected a string"),
    ({'type': 'text', 'text': 5}, "of type 'text' with the text 5, expected a string"),
    ({'type': None, 'text': 'a'}, 'of type None, expected'),
    (5, 'is 5, expected a part like'),
    (None, 'is None, expected a part like'),
  ],
)
def test_a_part_that_is_no_text_is_refused_by_name(template, part, message):
  messages = [*user('a'), {'role': 'user', 'content': [text('b'), part]}]
  with pytest.raises(ValueError, match=message):
    rendered(template, messages)


CALLS = [{'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}]
RAISES = 'the contract, where transformers raises UndefinedError'
JOINING = of_each("{{ '<' + m.role + '>' + m.content + ';' }}")


@pytest.mark.parametrize(
  ('template', 'message', 'expected', 'authority'),
  [
    (
      JOINING,
      {'content': None, 'tool_calls': CALLS},
      '<assistant>;',
      RAISES,
    ),
    (JOINING, {'tool_calls': CALLS}, '<assistant>;', RAISES),
    (JOINING, {'content': None}, '<assistant>;', RAISES),
    (of_each('{{ m.content | trim }};'), {'content': None, 'tool_calls': CALLS}, ';', 'transformers'),
    (of_each("{{ m.content.split('x')[0] }};"), {'content': None}, ';', RAISES),
    (
      of_each('{{ m.tool_calls[0].function.name }}{{ m.content }};'),
      {'content': None, 'tool_calls': CALLS},
      'f;',
      SAME,
    ),
    (
      of_each("{{ m.content if 'content' in m else 'calls' }};"),
      {'content': None, 'tool_calls': CALLS},
      'calls;',
      SAME,
    ),
  ],
)
def test_a_message_without_content_is_served(template, message, expected, authority):
  assert rendered(template, [{'role': 'assistant'} | message]) == expected, authority


def test_a_message_without_content_changes_nothing_for_content_in_parts():
  messages = [{'role': 'user', 'content': AB}, {'role': 'assistant', 'content': None, 'tool_calls': CALLS}]
  assert rendered(JOINING, messages) == '<user>ab;<assistant>;'
  for_user = "{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}|{% endfor %}"
  assert rendered(of_each(for_user + "{% else %}{{ '<' + m.content }}{% endif %}"), messages) == 'a|b|<'


FOR_USER = "{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
UNLIKE = of_each(FOR_USER + "{% else %}{{ 'A:' + m.content }}{% endif %};")


def test_a_template_that_fails_at_one_content_loses_no_other():
  user, answer = ({'role': role, 'content': [text('a'), text('b')]} for role in ('user', 'assistant'))
  assert rendered(UNLIKE, [user, answer, user]) == 'ab;A:ab;ab;'
  assert rendered(UNLIKE, [answer, user, answer, user]) == 'A:ab;ab;A:ab;ab;'
  with pytest.raises(ValueError, match='refuses these messages'):
    rendered(UNLIKE + '{{ raise_exception("never") }}', [user, answer])


@pytest.mark.parametrize(
  'read', ['dict(i).text', 'i.copy().text', "'{text}'.format(**i)", "i.get('text')", '(i.values() | list)[1]']
)
def test_a_part_may_be_read_in_any_way(read):
  template = each('', 'm.content').replace('i.text', read)
  assert rendered(template, [{'role': 'user', 'content': AB}]) == 'a|b|'


@pytest.mark.parametrize(
  ('template', 'used', 'authority'),
  [
    ('{{ tools }}', True, 'transformers'),
    ('{% if tools is defined and tools %}{{ tools | tojson }}{% endif %}', True, 'transformers'),
    ('{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}', True, 'Llama 3.1'),
    ('{% set functions = tools or [] %}{{ functions }}', True, 'transformers'),
    ('{% for tool in tools %}{{ tool.function.name }}{% endfor %}', True, 'transformers'),
    ('{% macro show(given) %}{{ given }}{% endmacro %}{{ show(tools) }}', True, 'transformers'),
    ('tools', False, 'transformers shows them to nobody'),
    ('{{ messages[0].tools }}', False, 'a key of a message'),
    ("{{ messages[0]['tools'] }}", False, 'a key of a message'),
    ('{# tools #}', False, 'a comment'),
    ('{% set tools = 5 %}{{ tools }}', False, 'a variable of its own'),
  ],
)
def test_tools_for_a_template_without_tools_are_refused(template, used, authority):
  if used:
    assert 'find' in rendered(template, user('a'), [FIND]), authority
  else:
    with pytest.raises(
      ValueError, match='tools are given, but the chat template of the GGUF metadata does not use any'
    ):
      rendered(template, user('a'), [FIND])
    rendered(template, user('a'), [])  # none to be shown


@pytest.mark.parametrize('tools', ['find', {'name': 'find'}, [5], ['find'], 5])
def test_tools_of_another_form_are_refused(tools):
  with pytest.raises(ValueError, match=r'tools are .*, expected a list of JSON schemas'):
    rendered('{{ tools }}', user('a'), tools)


def test_a_template_for_tools_is_taken_for_chats_with_tools():
  metadata = byte_level(chat_template='plain') | {'tokenizer.chat_template.tool_use': '{{ tools[0].function.name }}'}
  tokenizer = Tokenizer.from_gguf_metadata(metadata)
  assert tokenizer.decode(tokenizer.apply_chat_template(user('a'))) == 'plain'
  assert tokenizer.decode(tokenizer.apply_chat_template(user('a'), tools=[FIND])) == 'find'


HALF = 'smile \ud83d'


@pytest.mark.parametrize(
  ('messages', 'tools', 'place'),
  [
    (user(HALF), None, r"messages\[0\]\['content'\] has half a surrogate pair, '\\ud83d', at position 6"),
    (user('\udc00'), None, r"messages\[0\]\['content'\] .* at position 0"),
    ([*user('a'), {'role': HALF, 'content': 'a'}], None, r"messages\[1\]\['role'\]"),
    (user([text(HALF)]), None, r"messages\[0\]\['content'\]\[0\]\['text'\]"),
    ([{'role': 'user', 'content': 'a', 'name': HALF}], None, r"messages\[0\]\['name'\]"),
    ([{'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': {HALF: 1}}}]}], None, 'a key of'),
    (user('a'), [{'function': {'description': HALF}}], r"tools\[0\]\['function'\]\['description'\]"),
  ],
)  # fmt: skip
def test_half_a_surrogate_pair_is_refused_with_its_place(messages, tools, place):
  with pytest.raises(ValueError, match=place):
    rendered('{{ messages }}{{ tools }}', messages, tools)


@pytest.mark.parametrize(
  ('words', 'position'), [(HALF, 6), ('\ud83d\ud83d\ude00', 0), ('a\udfff', 1), ('\ude00\ud83d', 0)]
)
def test_raw_text_with_half_a_surrogate_pair_is_refused(words, position):
  with pytest.raises(ValueError, match=f'the text has half a surrogate pair, .* at position {position},'):
    with_template(None).encode(words)


def test_whole_characters_beyond_the_first_plane_are_text():
  tokenizer = with_template(FIRST)
  words = json.loads('"smile \\ud83d\\ude00"')  # a pair in JSON is one character
  assert tokenizer.decode(tokenizer.encode(words)) == 'smile 😀'
  assert rendered(FIRST, user(words)) == 'smile 😀'


def test_half_a_pair_that_the_template_writes_is_refused():
  with pytest.raises(ValueError, match='the rendered chat has half a surrogate pair'):
    rendered('{{ "\\ud83d" }}', user('a'))


@pytest.mark.parametrize(
  'messages', [[], (), [{'role': None, 'content': 'a'}], [{'content': 'a'}], [user('a')], 5, None]
)
def test_what_is_no_chat_is_refused(messages):
  with pytest.raises(ValueError, match=r'messages are .* expected a list like'):
    with_template(FIRST).apply_chat_template(messages)
