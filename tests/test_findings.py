"""Findings have one form: pinned packages in a folder that goes again, a head that says what was seen, no pdjax."""

import ast
import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / 'findings').glob('*.sh'))
WIDTH = 120

pytestmark = pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.stem)


def head_and_body(path: pathlib.Path) -> tuple[list[str], str]:
  """The comment that a script opens with, without its marks, and the rest."""
  lines = path.read_text(encoding='utf-8').splitlines()
  assert lines[0] == '#!/usr/bin/env bash'
  length = next(place for place, line in enumerate(lines[1:]) if not line.startswith('#'))
  return [line[1:] for line in lines[1 : 1 + length]], '\n'.join(lines[1 + length :])


def test_the_head_says_what_one_guesses_what_happens_and_what_it_means(path):
  head, _ = head_and_body(path)
  assert head[0].endswith('.') and head[1] == '', 'a sentence, then the rest'
  keys = [line.split(':')[0].split(',')[0].strip() for line in head[2:] if re.match(r' [A-Z][^:]*:', line)]
  assert keys == ['Guess', 'Instead', 'Versions', 'Seen', 'For pdjax']
  assert re.search(r'; \d{4}-\d{2}-\d{2}\.', ' '.join(line.strip() for line in head)), 'the day on which it was seen'
  seen = head.index(next(line for line in head if line.startswith(' Seen')))
  assert head[seen + 1].startswith('   '), 'the output'
  assert len(head) < 30 and max(map(len, path.read_text(encoding='utf-8').splitlines())) <= WIDTH


def test_packages_are_pinned_in_a_folder_that_goes_again(path):
  _, body = head_and_body(path)
  first, made, goes = body.replace('\n\n', '\n').strip().splitlines()[:3]
  assert first == 'set -euo pipefail'
  assert (made, goes) == ('folder=$(mktemp -d)', """trap 'rm -rf "$folder"' EXIT""")
  calls = [line for line in body.replace('\\\n', ' ').splitlines() if re.match(r'check [\'"]|.*bin/pip" install', line)]
  packages = [
    word for call in calls for word in re.sub(r"^check '[^']*'", '', call).split() if re.match(r'[a-z]', word)
  ]
  packages = [word for word in packages if word != 'install']
  assert packages, 'nothing is installed'
  assert all(re.fullmatch(r'[a-z][\w-]*==[\w.]+', package) for package in packages), packages
  head = ' '.join(head_and_body(path)[0])
  name, version = packages[0].split('==')
  assert name.removesuffix('-checkpoint') in head and version in head


def test_it_runs_without_pdjax_and_names_no_machine(path):
  head, body = head_and_body(path)
  assert 'pdjax' not in body
  assert any(line.startswith(' For pdjax:') for line in head)
  text = path.read_text(encoding='utf-8')
  assert not re.search(r'://(?!127\.0\.0\.1:)|--(extra-)?index|--find-links', text)
  assert set(re.findall(r'(?<![\w.}:"/])/[a-z][\w/.]*', text)) <= {'/usr/bin/env', '/v1/completions'}, (
    'no path of a machine'
  )
  assert ' -I ' in body, 'Python takes nothing of what is around it'


def test_it_is_a_script_of_bash_with_python_in_it(path):
  assert os.access(path, os.X_OK)
  subprocess.run(['bash', '-n', str(path)], check=True)
  programs = re.findall(r"<<'END'\n(.*?)\nEND$", path.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
  assert programs
  for program in programs:
    ast.parse(program)


def test_it_fails_when_what_it_saw_has_changed(path):
  _, body = head_and_body(path)
  assert re.search(r'^assert |^\s*\[\[ ', body, re.MULTILINE)


def test_it_has_its_row_in_the_table(path):
  readme = (path.parent / 'README.md').read_text(encoding='utf-8')
  rows = re.findall(r'^\| \[([\w.]+)\]\(([\w.]+)\) \| (.+?) \| (.+?) \| (.+?) \|$', readme, re.MULTILINE)
  assert [name for name, *_ in rows] == [script.name for script in SCRIPTS]
  (row,) = (row for row in rows if row[0] == path.name)
  assert row[1] == path.name
  for version in re.findall(r'\d+\.\d+\.\d+', row[3]):
    assert f'=={version}' in path.read_text(encoding='utf-8')
  named = re.search(r'`((?:pdjax|pallas_kernels)/[\w/.]+)`', row[4])
  assert named and (ROOT / named[1]).exists(), 'where pdjax mends it'
