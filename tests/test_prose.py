"""No docstring of the packages begins with a relative clause or a question: its subject comes first."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROOTS = ('pdjax', 'pallas_kernels', 'experiments', 'configs')
OPENERS = {
  'What', 'Who', 'Whom', 'Whose', 'Which', 'Where', 'When', 'How', 'Why', 'That', 'Whoever', 'Whatever', 'Whichever',
}  # fmt: skip
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(source: str) -> Iterator[tuple[int, str]]:
  """Every docstring of a module, with the line of what it describes: 1 for the module itself."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
      yield getattr(node, 'lineno', 1), text


def offenders(source: str) -> list[tuple[int, str]]:
  """The line, and the first line of a docstring that begins with one of `OPENERS`, or an entry in it that does."""
  found = []
  for line, text in docstrings(source):
    word = re.match(r'\W*(\w+)', text)
    if word and word[1].capitalize() in OPENERS:
      found.append((line, text.splitlines()[0]))
    for entry in re.finditer(r'^ +[\w, ]+: (\w+).*$', text, re.MULTILINE):  # of Args and Attributes
      if entry[1] in OPENERS:
        found.append((line, entry[0].strip()))
  return sorted(found)


MADE_UP = '''
"""What a module is for."""


class Broken:
  """How it is broken.

  Attributes:
    what: What it is.
    whole: Whether all of it is there.
  """

  @property
  def reason(self) -> str:
    """*Why* it broke."""

  async def wait(self) -> None:
    r"""when it is over."""

    def until() -> None:
      """Whose turn it is."""


class Whole:
  """Whether this is whole is asked of bools, and is allowed."""

  def whereabouts(self) -> str:
    """Whereabouts of a thing: not where it is."""

  def silent(self) -> str:
    text = """What is no docstring."""
    return text
'''


def test_the_walker_finds_modules_classes_properties_and_functions_within_functions():
  assert offenders(MADE_UP) == [
    (1, 'What a module is for.'),
    (5, 'How it is broken.'),
    (5, 'what: What it is.'),
    (14, '*Why* it broke.'),
    (17, 'when it is over.'),
    (20, 'Whose turn it is.'),
  ]


@pytest.mark.parametrize('opener', sorted(OPENERS))
def test_every_opener_is_found(opener):
  assert offenders(f'def f():\n  """{opener} it is."""\n') == [(1, f'{opener} it is.')]


@pytest.mark.parametrize('root', ROOTS)
def test_no_docstring_begins_with_a_relative_clause_or_a_question(root):
  files = sorted((ROOT / root).rglob('*.py'))
  sources = {path.relative_to(ROOT): path.read_text(encoding='utf-8') for path in files}
  assert sum(1 for source in sources.values() for _ in docstrings(source)) >= len(files) > 0
  found = [f'{path}:{line} {text}' for path, source in sources.items() for line, text in offenders(source)]
  assert not found, f'{len(found)} docstrings of {root} begin with a clause; name the subject:\n' + '\n'.join(found)


def test_every_public_class_of_pdjax_has_a_docstring():
  classes = [
    (path.relative_to(ROOT), node)
    for path in sorted((ROOT / 'pdjax').rglob('*.py'))
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
    if isinstance(node, ast.ClassDef) and not node.name.startswith('_')
  ]
  assert len(classes) > 100
  assert [f'{path}:{node.lineno} {node.name}' for path, node in classes if not ast.get_docstring(node)] == []
