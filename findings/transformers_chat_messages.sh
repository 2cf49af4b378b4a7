#!/usr/bin/env bash
# transformers' apply_chat_template renders other messages than it is given: None is dropped, `reasoning` gets a twin.
#
# Guess: it is the template rendered by jinja2 with `messages`, so a plain jinja2 rendering of the same file is equal.
# Instead: keys of a message whose value is None are taken out first, so `'tool_calls' in m` is false and
#   `m['content']` is undefined, which renders as nothing rather than as "None"; and a message with `reasoning` or
#   `thinking` has `reasoning_content` too.
# Versions: transformers 5.24.0, jinja2 3.1.6, Python 3.11; 2026-11-27.
# Seen:
#   None: transformers 'assistant: ;', jinja2 'assistant calls: None;'
#   reasoning: transformers 'why', jinja2 ''
# For pdjax: OpenAI clients write `"tool_calls": null`, and such chats were rendered, and so answered, differently.
#   pdjax/model/chat.py reads messages as transformers does.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
"$folder/venv/bin/python" -I - <<'END'
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({'<unk>': 0}, unk_token='<unk>'))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token='<unk>')


def both(template, messages):
  plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
  theirs = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
  return theirs, plain.render(messages=messages)


turn = "{{ m['role'] }}{% if 'tool_calls' in m %} calls{% endif %}: {{ m['content'] }};"
turns = '{% for m in messages %}' + turn + '{% endfor %}'
nothing = both(turns, [{'role': 'assistant', 'content': None, 'tool_calls': None}])
thought = both("{{ messages[0]['reasoning_content'] }}", [{'role': 'assistant', 'content': 'x', 'reasoning': 'why'}])
print(f'None: transformers {nothing[0]!r}, jinja2 {nothing[1]!r}')
print(f'reasoning: transformers {thought[0]!r}, jinja2 {thought[1]!r}')
assert nothing == ('assistant: ;', 'assistant calls: None;')
assert thought == ('why', '')
END
