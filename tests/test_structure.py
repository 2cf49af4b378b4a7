"""The files and names in docs/structure.md are there, every one."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'docs' / 'structure.md').read_text(encoding='utf-8')
NAMED = sorted(set(re.findall(r'`([\w/]+\.py):([A-Za-z_.]+)`', TEXT)))
PATHS = sorted(set(re.findall(r'`([\w/]+(?:\.py|\.md|/))`', TEXT)))


@functools.cache
def names(file: str) -> set[str]:
  """The names that a file of `pdjax/` defines, those in its classes too."""
  found: set[str] = set()

  def walk(body: list[ast.stmt], prefix: str) -> None:
    for node in body:
      match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
          found.add(prefix + name)
          if isinstance(node, ast.ClassDef):
            walk(node.body, f'{prefix}{name}.')
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
          found.add(prefix + name)
        case ast.ImportFrom(names=aliases):
          found.update(prefix + (alias.asname or alias.name) for alias in aliases)

  walk(ast.parse((ROOT / 'pdjax' / file).read_text(encoding='utf-8')).body, '')
  return found


def test_it_names_much():
  assert len(NAMED) > 40 and len(PATHS) > 15


@pytest.mark.parametrize(('file', 'name'), NAMED, ids=lambda value: value)
def test_every_name_is_in_its_file(file, name):
  assert (ROOT / 'pdjax' / file).is_file(), f'there is no pdjax/{file}'
  assert name in names(file), f'pdjax/{file} has no {name}'


@pytest.mark.parametrize('path', PATHS)
def test_every_file_and_folder_is_there(path):
  assert (ROOT / 'pdjax' / path).exists() or (ROOT / path).exists()
