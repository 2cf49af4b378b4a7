"""A result says of which code it is, changes that were not committed included."""

import io
import json
import re
import subprocess

import pytest
from rich.console import Console

from experiments.device_check.result import (
  SETTINGS,
  commit,
  differences,
  load,
  save,
  set_aside,
  settings,
  show,
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


ROW = {
  'name': 'a', 'value': 1.0, 'unit': 's', 'peer': None, 'peer_value': None, 'ratio': 'NaN', 'floor_share': None,
}  # fmt: skip
PART = {
  'part': 'ceilings', 'status': 'passed', 'reason': None, 'seconds': 1.0, 'compile_s': None, 'date': '2026',
  'rows': [ROW], 'notes': [], 'printed': [],
}  # fmt: skip


def whole(**changes) -> dict:
  fixed = ('device', 'count', 'platform', 'compute_capability', 'sources', 'environment')
  found = {'format': 2, 'dry_run': False, 'versions': {'jax': '1'}, 'commit': None, 'date': '2026', 'parts': []}
  return found | dict.fromkeys(fixed, 'x') | changes


def test_results_of_another_device_format_or_setting_are_others(tmp_path, monkeypatch):
  file = tmp_path / 'result.json'
  assert load(file) is None
  save(file, whole(format=1))
  assert load(file) is None
  monkeypatch.setenv('XLA_FLAGS', '--xla_one')
  save(file, whole(environment=settings()))
  found = load(file)
  assert differences(found, whole(environment=settings(), commit='b', date='c')) == []
  assert differences(found, whole(environment=settings(), device='b')) == ['device']
  monkeypatch.setenv('XLA_FLAGS', '--xla_two')
  assert differences(found, whole(environment=settings())) == ['environment']


@pytest.mark.parametrize(
  'parts',
  [
    None,
    [None],
    [{}],
    [PART | {'rows': None}],
    [PART | {'rows': [{}]}],
    [PART | {'seconds': None}],
    [PART | {'rows': [ROW | {'ratio': 'much'}]}],
    [PART | {'rows': [ROW | {'note': 1}]}],
  ],
)
def test_a_result_of_which_something_is_missing_or_of_another_kind_is_damaged(parts, tmp_path):
  file = tmp_path / 'result.json'
  save(file, whole(parts=[PART]))
  assert load(file) == whole(parts=[PART])
  save(file, whole(parts=parts))
  assert load(file) is None and set_aside(file).name == 'result-damaged.json'


def shown(result: dict) -> str:
  text = io.StringIO()
  show(Console(file=text, width=150), result)
  return text.getvalue()


def test_a_table_says_of_how_many_answers_one_is_the_worst_and_has_far_ends_and_four_bits_always():
  def checked(name: str, error: float) -> dict:
    return ROW | {'name': name, 'unit': 'relative error', 'value': error, 'ratio': error}

  rows = [
    checked('decode automatic, bfloat16, page 16, plain', 0.1),
    checked('decode automatic, bfloat16, page 64, plain', 0.2),
    checked('decode automatic, bfloat16, at the end of 9 elements', 0.01),
    checked('quantized_matmul xla, bfloat16, int8', 0.5),
    checked('quantized_matmul xla, bfloat16, int4', 0.3),
  ]
  text = shown(whole(parts=[PART | {'rows': rows}]))
  assert 'page 64, plain, worst of 2' in text and 'page 16' not in text
  assert 'at the end of 9 elements' in text and 'int4' in text and 'int8' in text and '\n1 part passed' in text


def test_parts_without_figures_have_a_heading_with_the_reason_and_mfu_a_column():
  failed = PART | {'part': 'decode', 'status': 'failed', 'reason': 'no [GPU]', 'rows': []}
  text = shown(whole(parts=[PART | {'rows': [ROW | {'mfu_of_data_sheet': 0.5}]}, failed]))
  assert 'decode: failed, 1 s, no [GPU]' in text and 'MFU of data sheet' in text and '50.0%' in text
  assert 'None' not in text and 'no repository, sources x' in text and 'ratio: ' in text and 'DRY RUN' not in text


def test_settings_are_those_of_xla_its_memory_and_the_kernels():
  assert {tuning.FORM, tuning.WITHOUT, 'XLA_FLAGS', 'XLA_CLIENT_MEM_FRACTION'} < set(SETTINGS)


def test_a_result_is_kept_by_its_commit_or_its_date_and_what_it_is_of_and_takes_no_name_that_is_there(tmp_path):
  file, commit = tmp_path / 'result.json', '0123456789abcdef' + 24 * '0'
  dated = whole(date='2026-11-28T01:02:03+00:00')
  changed, other = whole(commit=f'{commit}+changes a1b2'), whole(commit=commit, device='y')
  texts = [json.dumps(one) for one in (whole(commit=commit), whole(commit=commit), other, changed, dated)]
  names = []
  for text in [*texts, '{"comm', 'null']:
    file.write_text(text, encoding='utf-8')
    names.append(set_aside(file).name)
    assert not file.exists() and (tmp_path / names[-1]).read_text(encoding='utf-8') == text
  digest = re.fullmatch(r'result-0123456789ab-([0-9a-f]{8})\.json', names[0])[1]
  assert names[1] == f'result-0123456789ab-{digest}-2.json' and digest not in names[2]
  assert names[3:] == [
    f'result-0123456789ab-changes-a1b2-{digest}.json', f'result-2026-11-28T01-02-03-00-00-{digest}.json',
    'result-damaged.json', 'result-damaged-2.json',
  ]  # fmt: skip
