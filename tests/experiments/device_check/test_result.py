"""A result says of which code it is, changes that were not committed included."""

import json
import subprocess

from experiments.device_check.result import (
  SETTINGS,
  commit,
  differences,
  load,
  save,
  set_aside,
  settings,
  sources,
)
from pallas_kernels import tuning


def git(folder, *arguments):
  identity = ('-c', 'user.name=a', '-c', 'user.email=a@example.invalid')
  subprocess.run(['git', *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_commit_with_other_changes_is_another(tmp_path):
  git(tmp_path, 'init')
  (tmp_path / 'a.py').write_text('1')
  git(tmp_path, 'add', '.')
  git(tmp_path, 'commit', '-m', 'first')
  clean = commit(tmp_path)
  assert len(clean) == 40
  (tmp_path / 'a.py').write_text('2')
  changed = commit(tmp_path)
  (tmp_path / 'b.py').write_text('3')
  more = commit(tmp_path)
  assert changed.startswith(f'{clean}+changes ') and more.startswith(f'{clean}+changes ')
  assert len({clean, changed, more, commit(tmp_path)}) == 3


def test_without_a_repository_there_is_no_commit_but_a_digest_of_the_code(tmp_path):
  (tmp_path / 'pdjax').mkdir()
  (tmp_path / 'pdjax' / 'a.py').write_text('1')
  assert commit(tmp_path) is None
  before = sources(tmp_path)
  (tmp_path / 'pdjax' / 'a.py').write_text('2')
  assert sources(tmp_path) != before


def test_results_of_another_device_format_or_setting_are_others(tmp_path, monkeypatch):
  file = tmp_path / 'result.json'
  assert load(file) is None
  save(file, {'format': 1, 'device': 'a', 'parts': []})
  assert load(file) is None
  monkeypatch.setenv('XLA_FLAGS', '--xla_one')
  save(file, {'format': 2, 'device': 'a', 'parts': [], 'environment': settings()})
  found = load(file)
  assert differences(found, {'format': 2, 'device': 'a', 'environment': settings(), 'commit': 'b', 'date': 'c'}) == []
  assert differences(found, {'format': 2, 'device': 'b', 'environment': settings()}) == ['device']
  monkeypatch.setenv('XLA_FLAGS', '--xla_two')
  assert differences(found, {'format': 2, 'device': 'a', 'environment': settings()}) == ['environment']


def test_settings_are_those_of_xla_its_memory_and_the_kernels():
  assert {tuning.FORM, tuning.WITHOUT, 'XLA_FLAGS', 'XLA_CLIENT_MEM_FRACTION'} < set(SETTINGS)


def test_a_result_is_kept_by_its_commit_or_its_date_and_takes_no_name_that_is_there(tmp_path):
  file, commit = tmp_path / 'result.json', '0123456789abcdef' + 24 * '0'
  dated = {'commit': None, 'date': '2026-11-28T01:02:03+00:00'}
  texts = [json.dumps({'commit': commit})] * 3 + [json.dumps({'commit': f'{commit}+changes a1b2'}), json.dumps(dated)]
  names = []
  for text in [*texts, '{"comm']:
    file.write_text(text, encoding='utf-8')
    names.append(set_aside(file).name)
    assert not file.exists() and (tmp_path / names[-1]).read_text(encoding='utf-8') == text
  assert names == [
    'result-0123456789ab.json', 'result-0123456789ab-2.json', 'result-0123456789ab-3.json',
    'result-0123456789ab-changes-a1b2.json', 'result-2026-11-28T01-02-03-00-00.json', 'result-damaged.json',
  ]  # fmt: skip
