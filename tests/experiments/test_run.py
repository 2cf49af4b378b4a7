"""The command: files in and out, answers, and what a careless user types."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.compiling import quick_environment
from tests.experiments.conftest import ROOT
from tests.tiny import TINY, prompt

SIMULATED = ('--config=configs/llama3_8b_simulated.py:num_requests=4', '--backend=simulator')


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.run', *arguments],
    cwd=ROOT, env=quick_environment(), capture_output=True, text=True, timeout=300,
  )  # fmt: skip


def test_a_requests_file_is_served_in_order_and_refused_lines_do_not_stop_the_others(checkpoint, tmp_path):
  rows = [
    {'prompt_token_ids': prompt(9), 'max_tokens': 5, 'ignore_eos': True},
    {'prompt_token_ids': []},
    {'prompt_token_ids': prompt(70)},
    {'prompt_token_ids': prompt(9), 'max_tokens': 5, 'ignore_eos': True, 'arrival_s': 0.2, 'id': 'late'},
    {'prompt_token_ids': [5, TINY.vocab_size], 'max_tokens': 1},
    {'prompt_token_ids': prompt(3), 'max_tokens': 0},
    {'prompt_token_ids': prompt(33), 'max_tokens': 30},
    {'prompt_token_ids': prompt(5), 'max_tokens': 6, 'temperature': 1.0, 'seed': 3, 'ignore_eos': True},
  ]
  file = tmp_path / 'in.jsonl'
  file.write_text('\n'.join(json.dumps(row) for row in rows) + '\n')
  done = command(
    f'--config=configs/cpu.py:checkpoint={checkpoint},page_size=4', '--set=workers.prefill0.num_pages=16',
    '--set=workers.prefill0.max_step_tokens=32', '--set=workers.decode0.num_pages=12', f'--requests={file}',
    f'--workdir={tmp_path / "out"}',
    '--goodput', 'ttft:100000 tpot:100000',
  )  # fmt: skip
  assert done.returncode == 3, done.stderr  # some were served
  out = [json.loads(line) for line in (tmp_path / 'out' / 'requests.jsonl').read_text().splitlines()]
  reasons = [row['finish_reason'] for row in out]
  assert reasons == ['length', 'rejected', 'rejected', 'length', 'rejected', 'rejected', 'rejected', 'length']
  assert [row['prompt_token_ids'] for row in out] == [list(row['prompt_token_ids']) for row in rows]
  assert out[0]['output_token_ids'] == out[3]['output_token_ids']
  assert len(out[0]['output_token_ids']) == 5
  assert out[3]['id'] == 'late'
  assert out[3]['arrival_s'] == 0.2
  assert out[3]['ttft_s'] > 0
  assert out[0]['text'] is None
  for row, words in [
    (1, 'prompt is empty'),
    (2, 'context'),
    (4, str(TINY.vocab_size)),
    (5, 'max_tokens'),
    (6, 'num_pages'),
  ]:
    assert words in out[row]['error']
    assert out[row]['output_token_ids'] == []
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert report['completed'] == 3
  assert report['request_goodput'] > 0
  keys = (
    'request_throughput', 'output_throughput', 'total_token_throughput', 'mean_ttft_ms', 'median_ttft_ms',
    'p99_tpot_ms', 'mean_itl_ms', 'p90_e2el_ms', 'mean_handoff_ms', 'duration', 'total_input_tokens',
    'total_output_tokens',
  )  # fmt: skip
  assert all(isinstance(report[key], float | int) for key in keys)
  events = [json.loads(line) for line in (tmp_path / 'out' / 'events.jsonl').read_text().splitlines()]
  assert {event['event'] for event in events} >= {'Turn', 'Arrived', 'Started', 'Done', 'Finished'}
  assert 'TTFT' in done.stdout
  assert 'hand-off' in done.stdout


def test_a_comparison_from_the_command_line_says_who_wins_and_leaves_a_page(tmp_path):
  done = command(
    '--config=configs/llama3_8b_simulated.py:num_requests=12,requests_per_s=20', '--backend=simulator', '--compare',
    '--rates=20,40', '--splits=2P1D,1P2D', '--budgets=512', f'--workdir={tmp_path}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'At 20 req/s, on the same 12 devices,' in ' '.join(done.stdout.split())
  assert '12C tp1 cannot be' in done.stdout
  assert all(f'{line}\n' in done.stdout for line in json.loads((tmp_path / 'compare.json').read_text())['verdict'])
  data = json.loads((tmp_path / 'compare.json').read_text())
  assert {case['system'] for case in data['cases']} >= {f'{name}, 512 tokens' for name in ('2P1D', '1P2D', '3C tp4')}
  assert (tmp_path / 'report.html').stat().st_size < 5e6
  cases = [json.loads(line) for line in (tmp_path / 'cases.jsonl').read_text().splitlines()]
  assert {case['system'] for case in cases} == {case['system'] for case in data['cases']}


def test_the_exit_code_of_a_comparison_says_whether_everyone_was_served(answered, tmp_path):
  served = {}
  for too_long in (0, 2, 6):
    tiny = f'--config=tests/experiments/tiny_config.py:too_long={too_long}'
    served[too_long] = answered(tiny, '--backend=simulator', '--compare', f'--workdir={tmp_path / str(too_long)}')[0]
  assert served == {0: 0, 2: 3, 6: 1}


def test_a_simulation_runs_from_the_command_line_and_says_that_it_is_uncalibrated(tmp_path):
  done = command(
    '--config=configs/llama3_8b_simulated.py:num_requests=20', '--backend=simulator', f'--workdir={tmp_path}'
  )
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['completed'] == 20
  assert 'Uncalibrated estimate' in done.stdout


@pytest.mark.parametrize('log', ['full', 'summary', 'off'])
def test_the_log_that_was_asked_for_is_left_and_no_other(answered, tmp_path, log):
  file = tmp_path / 'in.jsonl'
  file.write_text('{"prompt_token_ids": [3], "max_tokens": 4}\n')
  config = '--config=tests/experiments/tiny_config.py'
  status, said, printed = answered(
    config, '--backend=simulator', f'--requests={file}', f'--workdir={tmp_path / "out"}', f'--log={log}'
  )
  assert status == 0, said
  found = {path.name for path in (tmp_path / 'out').iterdir()}
  reports = {'report.json', 'report.html', 'trace.json', 'metrics.prom'}
  left = {'full': {'events.jsonl', *reports}, 'summary': reports, 'off': set()}[log]
  assert found == {'run.json', 'answers.jsonl', 'requests.jsonl', *left} and '1 of 1 requests completed' in printed
  assert json.loads((tmp_path / 'out' / 'run.json').read_text())['command']['log'] == log


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], ['--config']),
    (['--config=configs/smolm2_cpu.py'], ['smolm2_cpu.py', 'configs/smollm2_cpu.py']),
    (['--config=configs/smollm2_cpu.py:splt=1P1D'], ['splt', 'split']),
    (['--config=configs/smollm2_cpu.py:split=1P'], ['1P', '2P1D']),
    (['--config=configs/smollm2_cpu.py:decode_tp=2'], ['tp=2', '9 query heads', '1, 3']),
    (['--config=configs/smollm2_cpu.py:requests_per_s=-1'], ['-1', 'requests_per_s']),
    (
      ['--config=configs/smollm2_cpu.py', '--set=policy.max_prefil_tokens=1'],
      ['max_prefil_tokens', 'max_prefill_tokens'],
    ),
    (['--config=configs/smollm2_cpu.py', '--set=page_size=big'], ['page_size', 'big', 'an integer']),
    (['--config=configs/smollm2_cpu.py', '--goodput=latency:5'], ['latency', 'ttft']),
    (['--config=configs/cpu.py:checkpoint=nowhere.gguf', '--prompt=Hi'], ['nowhere.gguf']),
    (['--config=configs/smollm2_cpu.py', '--prompt=Hi', '--requests=x.jsonl'], ['--prompt', '--requests']),
    (['--config=configs/smollm2_cpu.py', '--set=max_context=9000', '--prompt=Hi'], ['9000', '8192']),
    (['--config=configs/smollm2_cpu.py', '--requests=tests/tiny.jsonl'], ['tests/tiny.jsonl', 'not a file']),
    (['--config=configs/smollm2_cpu.py', '--requests=x.jsonl', '--workdir=runs/none'], ['x.jsonl', 'not a file']),
    (['--config=configs/smollm2_cpu.py', '--requests=/dev/null'], ['/dev/null', 'has no requests']),
    (['--config=configs/smollm2_cpu.py', '--workdir=README.md'], ['README.md', 'folder']),
    (['--config=configs/smollm2_cpu.py', '--prompt='], ['empty']),
    (['--config=configs/smollm2_cpu.py:page_size=0'], ['page_size', '0']),
    (['--config=configs/smollm2_cpu.py', '--set=policy.decode_steps=32'], ['decode_steps=32', '16']),
    (['--config=configs/smollm2_cpu.py', '--set=policy.max_prefill_tokens=0'], ['max_prefill_tokens=0']),
    (['--config=configs/smollm2_cpu.py', '--set=platform=gpu'], ["'gpu'", 'platform']),
    (['--config=README.md'], ['README.md', '.py']),
    ([*SIMULATED, '--ray_address=auto'], ['--ray_address', '--backend=engine']),
    (['--config=configs/smollm2_ray.py', '--set=transfer.transport=host_staged'], ["'host_staged'", "'cross_process'"]),
    (['--config=configs/smollm2_ray.py', '--set=processes.host=all'], ["host is 'all'", "'node'"]),
    ([*SIMULATED, '--compare', '--splits=2P'], ["'2P'", '2P1D']),
    ([*SIMULATED, '--compare', '--rates=1,0'], ['rate=0', '--rates=1,2,4']),
    ([*SIMULATED, '--compare', '--rates=1,fast'], ['--rates=1,fast', 'numbers']),
    ([*SIMULATED, '--rates=1,2'], ['--rates', '--compare']),
    (['--config=configs/smollm2_cpu.py', '--compare', '--prompt=Hi'], ['--compare', '--prompt']),
    ([*SIMULATED, '--policy=my.py'], ["'my.py'", 'FILE.py:NAME']),
    ([*SIMULATED, '--policy=experiments/rows.py:row'], ['row is no policy', 'none']),
    ([*SIMULATED, '--log=summary'], ['--log=summary', '--workdir']),
    ([*SIMULATED, '--log=half'], ['--log=half', 'full|summary|off']),
    ([*SIMULATED, '--compare', '--log=off'], ['--log=off', '--log=summary']),
  ],
)
def test_bad_input_is_answered_in_one_clear_line(answered, arguments, words):
  status, said, _ = answered(*arguments)
  assert status != 0
  assert 'Traceback' not in said
  assert all(word in said for word in words), said


@pytest.mark.parametrize(
  ('lines', 'code'),
  [
    (['{"prompt_token_ids": [3]}'], 0),
    (['{"prompt_token_ids": [3]}', '{"prompt_token_ids": [3], "max_token": 4}', '{"id": "\\ud83d"}', '[', ''], 3),
    (['{"prompt_token_ids": [3], "max_token": 4}', 'null', '{"prompt": "text"}'], 1),
    (['{"prompt_token_ids": [95, 96]}'], 1),
    (['{"prompt_token_ids": [3], "id": "good"}', f'{{"prompt_token_ids": {[3] * 65}}}'], 3),  # the cluster refuses it
    (['{"prompt_token_ids": [3]}', '{"prompt_token_ids": [3], "arrival_s": 1e9}'], 3),  # nobody waits for it
    (['{"prompt_token_ids": [3]}', '{"prompt_token_ids": [3], "arrival_s": 2e6}'], 0),
  ],
)
def test_the_exit_code_says_whether_every_line_was_served(checkpoint, tmp_path, lines, code):
  file = tmp_path / 'in.jsonl'
  file.write_text('\n'.join(lines))
  done = command(
    f'--config=configs/cpu.py:checkpoint={checkpoint}', f'--requests={file}', f'--workdir={tmp_path / "out"}',
    '--backend=simulator',
  )  # fmt: skip
  assert done.returncode == code, done.stderr
  rows = [json.loads(line) for line in (tmp_path / 'out' / 'requests.jsonl').read_text().splitlines()]
  assert len(rows) == len([line for line in lines if line])
  for number, row in enumerate(rows, start=1):
    if row['finish_reason'] == 'rejected':
      assert row['id'] == f'line-{number}' and row['error'].startswith(f'line {number}: ')
      assert row['seed'] is row['arrival_s'] is None
  if len(rows) > 3:
    assert "line-2 was refused: line 2: unknown key 'max_token'; did you mean 'max_tokens'?" in done.stdout


@pytest.mark.parametrize('text', ['', '\n \n'])
def test_a_file_without_requests_is_refused_and_leaves_no_folder(checkpoint, tmp_path, text):
  (tmp_path / 'in.jsonl').write_text(text)
  done = command(
    f'--config=configs/cpu.py:checkpoint={checkpoint}', f'--requests={tmp_path / "in.jsonl"}',
    f'--workdir={tmp_path / "out"}', '--backend=simulator',
  )  # fmt: skip
  assert done.returncode == 1 and 'has no requests, expected a JSON object a line' in done.stdout + done.stderr
  assert not (tmp_path / 'out').exists()


def test_the_report_tells_how_many_lines_were_refused(checkpoint, tmp_path):
  (tmp_path / 'in.jsonl').write_text('\n'.join(['{"prompt_token_ids": [3]}', *['{}'] * 14]))
  done = command(
    f'--config=configs/cpu.py:checkpoint={checkpoint}', f'--requests={tmp_path / "in.jsonl"}', '--backend=simulator',
    f'--workdir={tmp_path}',
  )  # fmt: skip
  assert done.returncode == 3 and 'and 2 more lines were refused; requests.jsonl has all of them.' in done.stdout
  assert '14 of 15 lines were refused as they were read.' in json.loads((tmp_path / 'report.json').read_text())['notes']


def test_a_report_that_cannot_be_written_takes_no_answer_with_it(checkpoint, tmp_path):
  (tmp_path / 'in.jsonl').write_text('{"prompt_token_ids": [3], "max_tokens": 4}')
  (tmp_path / 'report.json').mkdir()
  done = command(
    f'--config=configs/cpu.py:checkpoint={checkpoint}', f'--requests={tmp_path / "in.jsonl"}', '--backend=simulator',
    f'--workdir={tmp_path}',
  )  # fmt: skip
  assert done.returncode == 1 and 'Is a directory' in done.stderr and 'Traceback' not in done.stderr
  assert json.loads((tmp_path / 'requests.jsonl').read_text())['finish_reason'] == 'length'


def test_a_run_that_is_interrupted_leaves_the_answers_that_it_has(checkpoint, tmp_path):
  first, late = (
    {'prompt_token_ids': [3], 'max_tokens': 4, 'ignore_eos': True},
    {'prompt_token_ids': [3], 'arrival_s': 1e3},
  )
  (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, (first, late, {}))))
  with subprocess.Popen(
    [sys.executable, '-m', 'experiments.run', f'--config=configs/cpu.py:checkpoint={checkpoint}',
     '--set=workers.prefill0.max_step_tokens=32', f'--requests={tmp_path / "in.jsonl"}', f'--workdir={tmp_path}'],
    cwd=ROOT, env=quick_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  ) as process:  # fmt: skip
    while process.poll() is None and not (tmp_path / 'events.jsonl').exists():  # it begins with the run
      time.sleep(0.05)
    time.sleep(3.0)  # the first line takes milliseconds, the second a quarter of an hour
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
  assert process.returncode == 130 and 'Traceback' not in errors, errors
  rows = [json.loads(line) for line in (tmp_path / 'requests.jsonl').read_text().splitlines()]
  assert [row['finish_reason'] for row in rows] == ['length', 'error', 'rejected']
  assert len(rows[0]['output_token_ids']) == 4 and rows[1]['error'] == 'the run ended before it did.'


def test_one_prompt_without_a_seed_has_an_answer_a_line_and_each_can_be_repeated(checkpoint, tmp_path):
  line = {'prompt_token_ids': prompt(9), 'max_tokens': 12, 'temperature': 1.5, 'ignore_eos': True}

  def served(lines, *arguments):
    (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    done = command(
      f'--config=configs/cpu.py:checkpoint={checkpoint}', '--set=workers.prefill0.max_step_tokens=32',
      f'--requests={tmp_path / "in.jsonl"}', f'--workdir={tmp_path / "out"}', *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / 'out' / 'requests.jsonl').read_text().splitlines()]
    logged = [json.loads(line) for line in (tmp_path / 'out' / 'events.jsonl').read_text().splitlines()]
    seeds = [event['request']['sampling']['seed'] for event in logged if event['event'] == 'Arrived']
    assert {*seeds} <= {row['seed'] for row in rows} and len(seeds) == len(lines)
    return {row['id']: (row['output_token_ids'], row['seed']) for row in rows}

  answers = served([line, line, line | {'n': 2}, line])
  assert len({tuple(tokens) for tokens, _ in answers.values()}) == 5
  again = served([line | {'id': name, 'seed': seed} for name, (_, seed) in reversed(answers.items())], '--set=seed=3')
  assert again == answers


def test_text_without_a_tokenizer_is_refused_with_a_way_out(checkpoint):
  done = command(f'--config=configs/cpu.py:checkpoint={checkpoint}', '--prompt=Hello')
  assert done.returncode != 0
  assert 'token ids' in done.stderr
