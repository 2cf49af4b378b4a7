"""The log in memory and on disk."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from pdjax.metrics.event_log import EventLog, event_to_json, read_events
from pdjax.serving.events import (
  Arrived,
  Comeback,
  Delivered,
  Done,
  Failed,
  Occupancy,
  Result,
  RoleChanged,
  Started,
  Withdrawn,
  WorkerBack,
  WorkerLost,
  WorkerUse,
)
from pdjax.serving.orders import DecodeOrder, EndOrder, StepOrder
from pdjax.types.request import SLO, Request, SamplingParams, TokenLogprob
from pdjax.types.worker import Role


def _everything(disaggregated, stamps):
  return [
    *disaggregated(stamps),
    Arrived(
      Request('s', (1, 2), SamplingParams(temperature=0.5, stop_token_ids=(7,)), slo=SLO(ttft_ms=5), session='c')
    ),
    Withdrawn('s'),
    Started(3.0, EndOrder(9, 's', 'cancelled', 'no longer wanted')),
    Failed(10, 3.0, 'boom'),
    WorkerLost('p', 3.0, 'boom'),
    WorkerBack('p', 3.5, 2),
    RoleChanged(3.75, 'p', Role.DECODE, Role.PREFILL, 3.5),
    WorkerBack('p', 9.5, 3, Comeback(2, 1.0, 0.5, 0.75, 3.0, 0.25)),
    Occupancy(3.0, 1, (WorkerUse('d', 2, 1),)),
  ]


def test_a_last_line_that_was_cut_short_is_left_out_and_no_other(tmp_path):
  path = tmp_path / 'events.jsonl'
  path.write_text('{"event": "Turn", "now_s": 0.0}\n{"event": "Turn", "no')
  assert list(read_events(path)) == [{'event': 'Turn', 'now_s': 0.0}]
  path.write_text('{"event": "Turn", "no\n{"event": "Turn", "now_s": 0.0}\n')
  with pytest.raises(ValueError):
    list(read_events(path))


def test_the_file_holds_what_memory_holds(disaggregated, stamps, tmp_path):
  events = _everything(disaggregated, stamps)
  with EventLog(tmp_path / 'run' / 'events.jsonl') as log:
    for event in events:
      log.append(event)
  assert list(log) == events and len(log) == len(events)
  lines = list(read_events(tmp_path / 'run' / 'events.jsonl'))
  assert [line['event'] for line in lines] == [type(event).__name__ for event in events]
  assert lines == [_as_lists(event_to_json(event)) for event in events]


def _as_lists(value):
  if isinstance(value, dict):
    return {key: _as_lists(item) for key, item in value.items()}
  return [_as_lists(item) for item in value] if isinstance(value, tuple | list) else value


def test_lines_keep_lengths_sampling_and_page_numbers(disaggregated, stamps, tmp_path):
  with EventLog(tmp_path / 'events.jsonl') as log:
    for event in _everything(disaggregated, stamps):
      log.append(event)
  lines = list(read_events(tmp_path / 'events.jsonl'))
  arrived = [line['request'] for line in lines if line['event'] == 'Arrived']
  assert arrived[1]['prompt_len'] == 2 and 'prompt' not in arrived[1]
  assert arrived[1]['sampling'] == dataclasses.asdict(SamplingParams(temperature=0.5)) | {
    'stop_token_ids': [7], 'stop': [],
  }  # fmt: skip
  assert arrived[1]['slo']['ttft_ms'] == 5 and arrived[1]['session'] == 'c'
  prefill, transfer, decode, _, end = [line['order'] for line in lines if line['event'] == 'Started']
  (chunk,) = prefill['chunks']
  assert chunk == {
    'request': 'r',
    'start': 0,
    'length': 4,
    'pages': {'kv': [0, 1]},
    'limit': 4,
    'slot': None,
    'delivered': [],
  }
  assert (transfer['source_pages'], transfer['target_pages']) == ([0, 1], [7, 8])
  assert decode['decodes'][0]['admission'] == {
    'request': 'r', 'pages': {'kv': [7, 8]}, 'tokens': [100], 'limit': 4, 'copies': {},
  }  # fmt: skip
  assert end['order'] == 'EndOrder' and end['reason'] == 'no longer wanted'
  done = next(line for line in lines if line['event'] == 'Done')
  assert done['results'] == [
    {'request': 'r', 'tokens': [100], 'finish_reason': None, 'text': '', 'logprobs': [], 'error': None}
  ]


def test_what_a_step_brought_too_late_is_named_behind_it(tmp_path):
  results = Result('r', (5,)), Result('s', (6,))
  with EventLog(tmp_path / 'events.jsonl') as log:
    log.append(Delivered(1.5, 3, results[:1], results[1:]))
  assert list(read_events(tmp_path / 'events.jsonl')) == [
    {'event': 'Delivered', 'now_s': 1.5, 'order': 3, 'late': ['s']}
  ]


def test_what_is_written_field_by_field_has_every_field_in_its_order():
  step = StepOrder(1, 'w', decodes=(DecodeOrder('r', 0, 4),))
  (decode,) = event_to_json(Started(0.0, step))['order']['decodes']
  (result,) = event_to_json(Done(1, 0.0, 1.0, (Result('r', (5,)),)))['results']
  for line, kind in ((decode, DecodeOrder), (result, Result)):
    assert list(line) == [field.name for field in dataclasses.fields(kind)]


def test_numpy_integers_are_written_as_numbers(tmp_path):
  with EventLog(tmp_path / 'events.jsonl') as log:
    log.append(Done(1, 0.0, np.float32(1.0), (Result('r', (np.int32(5),)),)))
  (line,) = read_events(tmp_path / 'events.jsonl')
  assert line['results'][0]['tokens'] == [5] and line['ended_s'] == 1.0


def test_text_and_log_probabilities_are_written(tmp_path):
  told = (TokenLogprob(-0.5, ((5, -0.5), (3, -2.0))),)
  with EventLog(tmp_path / 'events.jsonl') as log:
    log.append(Done(1, 0.0, 1.0, (Result('r', (5,), 'stop', 'Bees', told),)))
  (line,) = read_events(tmp_path / 'events.jsonl')
  (result,) = line['results']
  assert result['text'] == 'Bees' and result['logprobs'] == [{'logprob': -0.5, 'top': [[5, -0.5], [3, -2.0]]}]


def test_metrics_import_no_jax():
  code = "import sys, pdjax.metrics; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
