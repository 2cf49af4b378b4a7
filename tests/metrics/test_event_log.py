"""The log in memory and on disk."""

import dataclasses
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from pdjax.metrics.event_json import event_to_json
from pdjax.metrics.event_log import EventLog, read_events
from pdjax.metrics.event_text import event_text
from pdjax.metrics.lines_file import LinesFile
from pdjax.serving.batch import Batch
from pdjax.serving.events import (
  AllBlocksCleared,
  Arrived,
  BlockRemoved,
  BlockStored,
  Comeback,
  Decoded,
  Delivered,
  Done,
  Ended,
  Failed,
  Finished,
  Occupancy,
  PrefixHit,
  Result,
  RoleChanged,
  Started,
  Trip,
  Turn,
  Withdrawn,
  WorkerBack,
  WorkerLost,
  WorkerUse,
)
from pdjax.serving.orders import (
  Admission,
  ChunkOrder,
  EndOrder,
  Growth,
  Join,
  LeaveOrder,
  StepOrder,
  TransferOrder,
)
from pdjax.types.json_text import json_text
from pdjax.types.request import SLO, Request, SamplingParams, TokenLogprob
from pdjax.types.span import Span
from pdjax.types.worker import Role

FORMAT = '{"event": "Log", "version": 2}\n'


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
    Occupancy(3.0, 1, (WorkerUse('d', 2, 1, 3),)),
    PrefixHit(3.0, 's', 'd', 16, 'decode'),
  ]


def test_a_last_line_that_was_cut_short_is_left_out_and_no_other(tmp_path):
  path = tmp_path / 'events.jsonl'
  path.write_text(FORMAT + '{"event": "Turn", "now_s": 0.0}\n{"event": "Turn", "no')
  assert list(read_events(path)) == [{'event': 'Turn', 'now_s': 0.0}]
  path.write_text(FORMAT + '{"event": "Turn", "no\n{"event": "Turn", "now_s": 0.0}\n')
  with pytest.raises(json.JSONDecodeError):
    list(read_events(path))


@pytest.mark.parametrize(
  ('line', 'found'),
  [
    ('{"event": "Turn", "now_s": 0.0}', 'no version'),
    ('{"event": "Log", "version": 1}', 'version 1'),
    ('{"event": "Log", "version": 3}', 'version 3'),
    ('not JSON', 'no version'),
    ('[1]', 'no version'),
  ],
)
def test_a_file_of_another_format_is_refused(line, found, tmp_path):
  path = tmp_path / 'events.jsonl'
  path.write_text(line + '\n{"event": "Turn", "now_s": 0.0}\n')
  with pytest.raises(ValueError, match=f'names {found} of the log in its first line, expected 2'):
    list(read_events(path))


def test_a_run_that_kept_no_events_has_none_to_read(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"found no events at .*, expected the events.jsonl .* log='full'"):
    list(read_events(tmp_path / 'events.jsonl'))


@pytest.mark.parametrize('begun', ['', '{"event": "Lo'])
def test_a_file_that_was_cut_short_at_once_has_no_events(begun, tmp_path):
  path = tmp_path / 'events.jsonl'
  path.write_text(begun)
  assert list(read_events(path)) == []


def test_the_text_of_an_event_is_its_data(disaggregated, stamps):
  told = (TokenLogprob(-0.5, ((5, -0.5), (3, -2.0))),)
  decoded = Decoded(
    np.array([[5, 6], [7, -1]], np.int32), np.array([2, 1]), (Ended(0, 'stop'), Ended(1, 'error', 'not "finite"')),
    ('a"\n', 'é'), {1: told}, (0.5, math.nan),
  )  # fmt: skip
  request = Request('odd "id" ☃', (1, 2))
  chunk = ChunkOrder(request, 0, 2, {'kv': (0, 1), 'state': (3,)}, 4, 1, (5, 6), {'kv': ((7, 1),)})
  admission = Admission(request, {'kv': (1,)}, (7,), 9, {'kv': ((0, 1),)})
  joins = Join('r', 0, 4, 9), Join('s', 1, 5, 8, 12, admission)
  step = StepOrder(
    3, 'w "0"', (chunk,), joins, (2,), (Growth(0, {'kv': (3, (4, 5))}, 24),), True, 1, True, 2, ((0, 2), (2, 4))
  )
  transfer = TransferOrder(4, 'r', 'p', 'd', Span((0,), (1,), 0, 8, (0, 2), 'latent'), 3, (1, 2), 512)
  events = [
    *_everything(disaggregated, stamps),
    Started(0.25, step), Started(0.25, transfer), Started(0.5, LeaveOrder(5, 'r', 'd')), Turn(math.inf), Turn(3),
    Done(3, 0.0, 1.0, (Result('r', (5,), 'length', 'x', told),), decoded, None, 2),
    Done(4, 0.0, math.nan, trip=Trip(0.0, math.inf, 2), wire_bytes=3),
    Delivered(1.0, 3, (Result('r', (5,)),), (Result('s', (6,)),)),
    Delivered(1.0, 3, batch=Batch(('r', 's'), (0, 1)), decoded=decoded, late_rows=frozenset({1})),
    Finished(1.0, 'r', 'error', (1, 2), 'a "quoted" one'), Finished(1.0, 'r', 'stop', ()),
    Occupancy(math.nan, 0, ()), BlockStored(1.0, 'd', bytes(range(32)), bytes(16), 16, (5, 6)),
    BlockRemoved(1.0, 'd', bytes(range(16))), AllBlocksCleared(2.0, 'd'),
  ]  # fmt: skip
  for event in events:
    assert json.loads(event_text(event)) == json.loads(json_text(event_to_json(event))), event


def test_events_of_blocks_have_the_fields_of_vllm():
  stored = BlockStored(1.0, 'decode0', bytes(range(32)), bytes(range(16, 32)), 16)
  assert event_to_json(stored) == {
    'event': 'BlockStored', 'now_s': 1.0, 'token_ids': (), 'block_size': 16, 'lora_id': None, 'medium': 'decode0',
    'block_hashes': ['000102030405060708090a0b0c0d0e0f', '101112131415161718191a1b1c1d1e1f'],
    'parent_block_hash': '101112131415161718191a1b1c1d1e1f',
  }  # fmt: skip
  assert event_to_json(dataclasses.replace(stored, parent=bytes(16)))['parent_block_hash'] is None
  assert event_to_json(BlockRemoved(1.0, 'decode0', bytes(16))) == {
    'event': 'BlockRemoved', 'now_s': 1.0, 'block_hashes': ['00' * 16], 'medium': 'decode0',
  }  # fmt: skip
  assert event_to_json(AllBlocksCleared(2.0, 'd')) == {'event': 'AllBlocksCleared', 'now_s': 2.0, 'medium': 'd'}


def test_hits_and_cached_pages_are_in_their_lines():
  assert json.loads(event_text(PrefixHit(1.5, 'r "0"', 'host', 32, 'prefill'))) == {
    'event': 'PrefixHit', 'now_s': 1.5, 'request': 'r "0"', 'place': 'host', 'tokens': 32, 'side': 'prefill',
  }  # fmt: skip
  (use,) = json.loads(event_text(Occupancy(1.0, 0, (WorkerUse('d', 2, 1, 3),))))['workers']
  assert use == {'worker': 'd', 'pages': 2, 'decoding': 1, 'cached': 3}


def test_a_file_without_cached_pages_is_read_as_it_is(tmp_path):
  path = tmp_path / 'events.jsonl'
  older = {'event': 'Occupancy', 'now_s': 0.25, 'waiting': 3, 'workers': [{'worker': 'd', 'pages': 4, 'decoding': 2}]}
  path.write_text(FORMAT + json.dumps(older) + '\n')
  assert list(read_events(path)) == [older]


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
    'copies': {},
    'begins': False,
  }
  assert (transfer['source_pages'], transfer['target_pages']) == ([0, 1], [7, 8])
  assert decode['joins'][0]['admission'] == {
    'request': 'r', 'pages': {'kv': [7, 8]}, 'tokens': [100], 'limit': 4, 'copies': {},
  }  # fmt: skip
  assert end['order'] == 'EndOrder' and end['reason'] == 'no longer wanted'
  done = next(line for line in lines if line['event'] == 'Done')
  assert done['results'] == [
    {'request': 'r', 'tokens': [100], 'finish_reason': None, 'text': '', 'logprobs': [], 'error': None}
  ]


def test_an_arrival_tells_who_shares_what_and_keeps_a_salt_to_itself():
  plain = Request('r', (1, 2, 3))
  said = {'tenant': None, 'has_cache_salt': False, 'cache_prefix': True, 'num_block_hashes': 0, 'block_size': None}
  assert said.items() <= json.loads(event_text(Arrived(plain)))['request'].items()
  salted = Request('r', (1, 2, 3), tenant='ann', cache_salt='s3cret', block_hashes=(7, 2**63), block_size=2)
  line = event_text(Arrived(dataclasses.replace(salted, cache_prefix=False)))
  told = {'tenant': 'ann', 'has_cache_salt': True, 'cache_prefix': False, 'num_block_hashes': 2, 'block_size': 2}
  assert told.items() <= json.loads(line)['request'].items()
  assert 's3cret' not in line and str(2**63) not in line


def test_an_arrival_tells_class_priority_and_deadline():
  request = Request('r', (1, 2, 3), class_name='chat', priority=-1, deadline_s=2.5)
  told = {'class_name': 'chat', 'priority': -1, 'deadline_s': 2.5}
  assert told.items() <= json.loads(event_text(Arrived(request)))['request'].items()
  plain = json.loads(event_text(Arrived(Request('r', (1, 2, 3)))))['request']
  assert {'class_name': None, 'priority': 0, 'deadline_s': None}.items() <= plain.items()


def test_what_a_step_brought_too_late_is_named_behind_it(tmp_path):
  results = Result('r', (5,)), Result('s', (6,))
  with EventLog(tmp_path / 'events.jsonl') as log:
    log.append(Delivered(1.5, 3, results[:1], results[1:]))
  assert list(read_events(tmp_path / 'events.jsonl')) == [
    {'event': 'Delivered', 'now_s': 1.5, 'order': 3, 'late': ['s']}
  ]


def test_what_is_written_field_by_field_has_every_field_in_its_order():
  decoded = Decoded(np.array([[5, 6]], np.int32), np.array([1, 0]), (Ended(0, 'stop'),))
  done = event_to_json(Done(1, 0.0, 1.0, (Result('r', (5,)),), decoded))
  for line, kind in ((done['results'][0], Result), (done['decoded'], Decoded), (done['decoded']['ended'][0], Ended)):
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


def test_a_slow_disk_is_waited_for_and_nothing_is_lost(tmp_path, monkeypatch):
  """So slow that much is waiting, while the thread that writes asks for what is pending."""
  monkeypatch.setattr('pdjax.metrics.lines_file._MOST_WAITING', 1 << 12)
  monkeypatch.setattr('pdjax.metrics.lines_file._STALL_S', 1.0)
  monkeypatch.setattr('pdjax.metrics.lines_file._DELAY_S', 0.001)
  monkeypatch.setattr('pdjax.metrics.event_log._PIECE', 8)
  write = LinesFile._write
  monkeypatch.setattr(LinesFile, '_write', lambda *args: (time.sleep(0.003), write(*args))[1])
  with EventLog(tmp_path / 'events.jsonl', keep=False) as log:
    for number in range(20_000):
      log.append(Turn(float(number)))
  assert log.notes == ()
  assert [event['now_s'] for event in read_events(tmp_path / 'events.jsonl')] == list(range(20_000))
