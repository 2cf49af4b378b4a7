"""Going on with a run: what is answered stays, what is left is served, and what has changed is told or refused."""

import json
import os
import pathlib

import pytest

from pdjax.answers import read_answers
from pdjax.run_folder import RunFolder, read_run
from tests.experiments.conftest import ROOT
from tests.experiments.test_endings import CONFIG, lines, read, told, write


@pytest.fixture
def run(answered, tmp_path):
  """Runs the command on a file of these lines, by default in simulation and into one folder."""

  def run(rows, *arguments, folder='out', backend='simulator'):
    file = write(tmp_path / 'in.jsonl', rows)
    return answered(CONFIG, f'--requests={file}', f'--workdir={tmp_path / folder}', f'--backend={backend}', *arguments)

  return run


def keep_answers(out: pathlib.Path, keep) -> None:
  """Leave only answers for which that holds, as if the run had been killed."""
  rows = [row for row in read_answers(out / 'answers.jsonl') if keep(row)]
  (out / 'answers.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + '{"id": "torn')
  (out / 'requests.jsonl').unlink()


def test_what_is_left_is_served_and_all_answers_are_in_the_order_of_the_file(run, answered, tmp_path):
  out = tmp_path / 'out'
  rows = lines([0.5 * i for i in range(6)])
  rows[3] = {'promt': 'a line that is refused counts, too'}
  assert run(rows)[0] == 3
  whole, events = read(out / 'requests.jsonl'), (out / 'events.jsonl').read_text()
  assert [row['id'] for row in whole] == [
    'request-0', 'request-1', 'request-2', 'request-2#1', 'line-4', 'request-4', 'request-5',
  ]  # fmt: skip
  keep_answers(out, lambda row: row['id'] in ('request-1', 'request-2#1'))
  status, _, shown = answered(f'--resume={out}')
  assert status == 3 and 'Nothing is left' not in shown and '4 of 4 requests completed' in shown
  assert told(read(out / 'requests.jsonl')) == told(whole)
  arrivals = {row['id']: row['arrival_s'] for row in read(out / 'requests.jsonl')}
  assert arrivals['request-0'] == 0.0 and arrivals['request-2'] == 1.0 and arrivals['request-5'] == 2.5
  assert (out / 'before-1' / 'events.jsonl').read_text() == events != (out / 'events.jsonl').read_text()
  notes = json.loads((out / 'report.json').read_text())['notes']
  assert any(note.startswith('2 answers were there before; ') for note in notes)
  assert len(read(out / 'answers.jsonl')) == 6  # the torn line is gone, and nobody is there twice


def test_of_a_whole_run_nothing_is_left_and_its_report_stays(run, answered, tmp_path):
  out = tmp_path / 'out'
  assert run(lines([0.0] * 3))[0] == 0
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  for remove in ((), ('requests.jsonl',), ('report.html',)):  # as if it had been killed while it was written
    for name in remove:
      (out / name).unlink()
    status, said, shown = answered(f'--resume={out}')
    assert status == 0 and said == '' and 'Nothing is left' in shown
    if 'report.html' in remove:
      del before['report.html']
    assert ('ended before it had written report.html;' in ' '.join(shown.split())) == ('report.html' in remove)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_ended_with_an_error_is_served(run, answered, tmp_path):
  out = tmp_path / 'out'
  run(lines([0.0] * 4))
  whole = read(out / 'requests.jsonl')
  rows = [row | {'finish_reason': 'error', 'error': 'lost'} if row['id'] == 'request-1' else row for row in whole]
  (out / 'answers.jsonl').write_text(
    ''.join(json.dumps(row | {'prompt_hash': old['prompt_hash'], 'sampling': old['sampling']}) + '\n'
            for row, old in zip(rows, sorted(read(out / 'answers.jsonl'), key=lambda row: row['id']), strict=True))
  )  # fmt: skip
  status, _, shown = answered(f'--resume={out}')
  assert status == 0 and '1 of 1 requests completed' in shown
  assert told(read(out / 'requests.jsonl')) == told(whole)


def test_another_config_is_refused_with_the_difference_and_nothing_is_touched(run, answered, tmp_path):
  out = tmp_path / 'out'
  run(lines([0.0] * 3))
  keep_answers(out, lambda row: row['id'] == 'request-0')
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  for given in (('--set=page_size=8', '--set=seed=1'), (CONFIG, '--set=page_size=8', '--set=seed=1')):
    status, said, _ = answered(f'--resume={out}', *given)
    assert status == 1 and 'Traceback' not in said and said.count('\n') == 1
    assert 'config.seed was 0 and is 1' in said and 'config.page_size was 4 and is 8' in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
  free = (CONFIG, '--set=compilation_cache=cache', '--goodput=ttft:5', f'--workdir={out}/')
  assert answered(f'--resume={out}', *free)[0] == 0


def test_lines_that_were_mended_or_added_are_served_and_all_others_keep_their_answers(run, answered, tmp_path):
  out = tmp_path / 'out'
  rows = lines([0.0] * 4)
  broken = [*rows[:2], {'promt': 'x'}, rows[3]]
  assert run(broken)[0] == 3
  first = {row['id']: row for row in read(out / 'requests.jsonl')}
  longer = rows[0] | {'max_tokens': 13}
  write(tmp_path / 'in.jsonl', [longer, *rows[1:], rows[1] | {'id': 'new'}])
  status, _, shown = answered(f'--resume={out}')
  assert status == 0 and 'is not what it was when the run in' in ' '.join(shown.split())
  now = {row['id']: row for row in read(out / 'requests.jsonl')}
  assert [*now] == ['request-0', 'request-1', 'request-2', 'request-2#1', 'request-3', 'new']
  assert now['request-1'] == first['request-1'] and now['request-3'] == first['request-3']
  assert len(now['request-0']['output_token_ids']) == 13 and 'line-3' not in now
  assert '4 of 4 requests completed' in shown
  status, said, shown = answered(f'--resume={out}')  # with the file that was given last, of which nothing is left
  assert status == 0 and 'Nothing is left' in shown and 'is not what it was' not in shown, said
  assert [row['id'] for row in read(out / 'requests.jsonl')] == [*now]
  fewer = write(tmp_path / 'fewer.jsonl', [longer, *rows[1:3]])
  status, _, shown = answered(f'--resume={out}', f'--requests={fewer}')
  shown = ' '.join(shown.split())
  assert status == 0 and 'is not what it was' in shown and '3 answers in answers.jsonl are to lines that' in shown
  assert read_run(out)['command']['requests'] == str(fewer)


def test_a_file_that_has_nothing_to_do_with_the_answers_is_refused(run, answered, tmp_path):
  out = tmp_path / 'out'
  run(lines([0.0] * 2))
  other = write(tmp_path / 'other.jsonl', lines([0.0] * 5)[3:])
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  status, said, _ = answered(f'--resume={out}', f'--requests={other}')
  assert status == 1 and f'no answer in {out} is to what is asked now' in said and said.count('\n') == 1
  assert 'goes on' not in said and 'keep it' not in said
  assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_goes_on_from_another_folder(run, answered, tmp_path):
  """Its config and its requests were named by where they lie from the one in which it began."""
  out = tmp_path / 'out'
  command = read_run(out)['command'] if run(lines([0.0] * 2))[0] == 0 else None
  assert command['config'] == str(ROOT / 'tests/experiments/tiny_config.py')
  assert all(os.path.isabs(command[name]) for name in ('config', 'requests'))
  with_arguments = (f'{CONFIG}:too_long=1', f'--requests={tmp_path / "in.jsonl"}', '--compilation_cache=off')
  assert answered(*with_arguments, f'--workdir={tmp_path / "other"}', '--backend=simulator')[0] == 0
  command = read_run(tmp_path / 'other')['command']
  assert command['config'].endswith('tiny_config.py:too_long=1') and command['compilation_cache'] == 'off'


def test_users_of_whom_the_first_was_not_served_go_on(answered, tmp_path):
  """The requests are not known before, but they are those of the same config."""
  out = tmp_path / 'out'
  status, said, _ = answered(f'{CONFIG}:one_at_a_time=True', f'--workdir={out}')
  assert status == 0, said
  whole = read(out / 'requests.jsonl')
  rows = read_answers(out / 'answers.jsonl')
  rows[0]['finish_reason'] = 'error'
  (out / 'answers.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  status, said, shown = answered(f'--resume={out}')
  assert status == 0 and '1 of 1 requests completed' in shown, said
  assert told(read(out / 'requests.jsonl')) == told(whole)


def test_a_second_run_leaves_the_first_beside_it(run, tmp_path):
  assert run(lines([0.0] * 2))[0] == 0
  first = (tmp_path / 'out' / 'requests.jsonl').read_bytes()
  status, _, shown = run(lines([0.0] * 3))
  assert status == 0 and 'held an earlier run, which is in' in ' '.join(shown.split())
  assert (tmp_path / 'out.1' / 'requests.jsonl').read_bytes() == first
  assert len(read(tmp_path / 'out' / 'requests.jsonl')) == 4


def test_bad_ways_to_go_on_are_answered_in_a_line(run, answered, tmp_path):
  run(lines([0.0]))
  out = tmp_path / 'out'
  simulated = (CONFIG, '--backend=simulator')
  assert answered(*simulated, f'--workdir={tmp_path / "alone"}')[0] == 0
  compared = ('--config=configs/llama3_8b_simulated.py:num_requests=4', '--compare', '--budgets=512')
  assert answered(*compared, '--backend=simulator', f'--workdir={tmp_path / "both"}')[0] == 0
  RunFolder.begin(tmp_path / 'python', {'backend': 'engine', 'serves': 'requests', 'config': {}}).close()
  RunFolder.begin(tmp_path / 'session', {'backend': 'engine', 'serves': 'what is submitted', 'config': {}}).close()
  for words, arguments in {
    'holds no run that can go on': (f'--resume={tmp_path / "nowhere"}',),
    'holds no run that can': (f'--resume={tmp_path}',),
    'is another; leave it out': (f'--resume={out}', f'--workdir={tmp_path / "other"}'),
    'a single run': (f'--resume={out}', '--compare'),
    'was a simulation without a file of requests': (f'--resume={tmp_path / "alone"}',),
    'is a comparison, which does not go on': (f'--resume={tmp_path / "both"}', '--backend=engine'),
    'serves a file of requests; leave --prompt out': (f'--resume={out}', '--prompt=Hi'),
    'was begun from Python; go on with pdjax.run(': (f'--resume={tmp_path / "python"}',),
    'was a session, which does not go on': (f'--resume={tmp_path / "session"}',),
    'backend was "simulator" and is "engine"': (f'--resume={out}', '--backend=engine'),
    'is where the run is to write': (
      *simulated, f'--requests={out / "requests.jsonl"}', f'--workdir={out / ".." / "out"}',
    ),
    'has report.json, and nothing says that a run left that': (
      *simulated, f'--requests={tmp_path / "in.jsonl"}', f'--workdir={tmp_path / "mine"}',
    ),
  }.items():  # fmt: skip
    (tmp_path / 'mine').mkdir(exist_ok=True)
    (tmp_path / 'mine' / 'report.json').write_text('mine')
    status, said, _ = answered(*arguments)
    assert status == 1 and words in said and said.count('\n') == 1, (words, said)
  assert sorted(os.listdir(tmp_path / 'mine')) == ['report.json'] and not (tmp_path / 'out.1').exists()
  assert answered(f'--resume={out}')[0] == 0


@pytest.mark.slow
def test_a_workload_of_the_config_leaves_answers_and_goes_on(answered, tmp_path):
  out = tmp_path / 'out'
  status, said, _ = answered(CONFIG, f'--workdir={out}')
  assert status == 0, said
  whole = read(out / 'requests.jsonl')
  assert [row['id'] for row in whole] == [f'r{i}' for i in range(6)]
  keep_answers(out, lambda row: row['id'] in ('r1', 'r4'))
  status, _, shown = answered(f'--resume={out}')
  assert status == 0 and '4 of 4 requests completed' in shown
  assert told(read(out / 'requests.jsonl')) == told(whole)


@pytest.mark.parametrize(('too_long', 'code'), [(0, 0), (2, 3), (6, 1)])
def test_the_exit_code_says_whether_every_request_of_the_config_was_served(answered, tmp_path, too_long, code):
  status, said, _ = answered(f'{CONFIG}:too_long={too_long}', '--backend=simulator', f'--workdir={tmp_path / "out"}')
  assert status == code, said
