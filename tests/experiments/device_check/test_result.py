"""A result says of which code it is, changes that were not committed included."""

import subprocess

from experiments.device_check.result import commit, load, same, save, sources


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


def test_results_of_another_device_or_format_are_others(tmp_path):
  file = tmp_path / 'result.json'
  assert load(file) is None
  save(file, {'format': 1, 'device': 'a'})
  assert load(file) is None
  save(file, {'format': 2, 'device': 'a'})
  found = load(file)
  assert same(found, {'format': 2, 'device': 'a', 'date': 'another'})
  assert not same(found, {'format': 2, 'device': 'b'})
