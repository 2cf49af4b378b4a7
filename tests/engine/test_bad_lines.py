"""Lines of a requests file that cannot be served change no answer of the others, on the engine itself."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdjax.types import Completion, Request
from pdjax.workload import read_requests
from tests.engine.conftest import shared
from tests.tiny import TINY, byte_tokenizer, prompt
from tests.workload.test_requests_file import BAD, as_line

GOOD = (
  {'prompt_token_ids': prompt(9), 'id': 'first', 'logprobs': 2},
  {'prompt': 'ab', 'temperature': 1.5},
  {'prompt': 'ab', 'temperature': 1.5, 'n': 2, 'repetition_penalty': 1.2},
  {'prompt_token_ids': prompt(17), 'id': 'request-3', 'stop_token_ids': [40, 41]},
  {'prompt': 'c', 'temperature': 0.7, 'top_k': 5, 'arrival_s': 0.01, 'stop': ['x', 'yz']},
  {'prompt_token_ids': prompt(30), 'temperature': 1.5},
)
# What only the cluster refuses, beside what is refused as it is read.
WAYS = {way: change for way, (change, _) in BAD.items() if way != 'id of another'} | {
  'no such token': lambda row: {'prompt_token_ids': [TINY.vocab_size]},
  'too long': lambda row: {'prompt_token_ids': prompt(65)},
  'too many stops': lambda row: {'prompt_token_ids': [5], 'stop_token_ids': [*range(5, 30)]},
}


def answers(folder, rows) -> list[list[tuple] | str]:
  """Of each line what its samples got, or why it was refused."""
  path = folder / 'in.jsonl'
  path.write_bytes(b'\n'.join(row if isinstance(row, bytes) else as_line(row).encode() for row in rows))
  found = read_requests(path, byte_tokenizer().encode, lambda messages: byte_tokenizer().encode(messages[0]['content']))
  served = shared('2P2D').serve(row for row in found if isinstance(row, Request)).by_id

  def told(one: Completion) -> tuple | str:
    return one.error or (one.token_ids, one.text, one.finish_reason, one.request.sampling.seed, len(one.logprobs))

  return [[told(served[s.id]) for s in row.samples()] if isinstance(row, Request) else row.error for row in found]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ways=st.lists(st.none() | st.sampled_from(sorted(WAYS)), min_size=len(GOOD), max_size=len(GOOD)))
def test_any_lines_made_bad_leave_the_answers_of_the_others_as_they_were(tmp_path, ways):
  rows = [{'max_tokens': 6} | row for row in GOOD]
  undisturbed = answers(tmp_path, rows)
  got = answers(tmp_path, [row if way is None else WAYS[way](row) for row, way in zip(rows, ways, strict=True)])
  for answer, expected, way in zip(got, undisturbed, ways, strict=True):
    if way is None:
      assert answer == expected
    else:
      assert isinstance(answer, str) or all(isinstance(one, str) for one in answer), (way, answer)
