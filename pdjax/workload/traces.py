"""Traces: recorded requests, of which lengths, times and ids of blocks are known, and not a token.

| format     | file | arrival | ids of blocks |
|------------|------|---------|---------------|
| `mooncake` | JSON lines (Qin et al., FAST 2025) | `timestamp`, ms | `hash_ids`, of 512 tokens |
| `bailian`  | JSON lines (Wang et al., ATC 2025) | `timestamp`, s | `hash_ids`, of 16 tokens |
| `weka`     | JSON lines, each a session of an agent (kv-cache-tester) | `t`, s | `hash_ids`, of `block_size` tokens |
| `azure`    | CSV (Patel et al., ISCA 2024) | `TIMESTAMP`, a date | none |
| `burstgpt` | CSV (Wang et al., KDD 2025) | `Timestamp`, s | none |
"""

import dataclasses
import datetime
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NoReturn, TypeAlias, get_args

from pdjax.types.checked import checks_arguments
from pdjax.types.checks import is_whole
from pdjax.types.request import Request, SamplingParams
from pdjax.workload.request_fields import described
from pdjax.workload.tokens import BlockTokens, RandomTokens

TraceFormat: TypeAlias = Literal['mooncake', 'bailian', 'weka', 'azure', 'burstgpt']

_GZIP = b'\x1f\x8b'
_VOCABULARY = 256  # of the random tokens of prompts
_MOST_TOKENS = 2**31 - 1
_IDS = 2**64
_LATEST = 1e18
_NO_CHAT = -1
_SECOND = datetime.timedelta(seconds=1)
_MOONCAKE_BLOCK, _BAILIAN_BLOCK = 512, 16
_KEYS: dict[str, TraceFormat] = {'requests': 'weka', 'chat_id': 'bailian', 'hash_ids': 'mooncake'}  # in this order
_COLUMNS: dict[TraceFormat, tuple[str, str, str]] = {  # time, tokens of the prompt, tokens of the answer
  'azure': ('TIMESTAMP', 'ContextTokens', 'GeneratedTokens'),
  'burstgpt': ('Timestamp', 'Request tokens', 'Response tokens'),
}


@dataclasses.dataclass(frozen=True)
class Trace:
  """A file of recorded requests.

  Attributes:
    name: The name of the file.
    format: Its format.
    requests: In the order of arrival, the first at 0 s; those that come at one time are in the order of the file. Each
      may generate as many tokens as the longest answer of the file has.
    output_lens: Tokens that each request generated, by its id; 1 where the file says 0, as no fewer can be asked for.
  """

  name: str
  format: TraceFormat
  requests: tuple[Request, ...]
  output_lens: Mapping[str, int]


@checks_arguments()
def read_trace(path: str | os.PathLike[str], format: TraceFormat | None = None) -> Trace:
  """Read a trace, plain or compressed with gzip.

  Prompts are random tokens, which nobody pays for until they are read; equal ids of blocks have equal ones. Requests
  are called `request-0`, `request-1`, ... by row; those of an agent's session by the session, `trace_0010-0` and so on,
  those of its subagents where they stand in the file.

  * `Request.session` is that of an agent, or the first chat that a chat goes back to by `parent_chat_id`.
  * The times of a subagent's requests count from when it began, which is told within what it is part of.
  * Ids that mean something within a session only become ids of the whole trace: the first 8 bytes of the BLAKE2b hash
    of the session's id, as a little-endian number, are added to each, modulo 2**64.
  * Of `bailian` and `weka`, ids behind the end of a prompt are left out; of `mooncake` they are refused, since they
    are of another size of block.

  Args:
    path: The file.
    format: Its format; None tells it from the first line.

  Raises:
    OSError: if there is no such file, or it cannot be read.
    ValueError: if it is empty or of another format, or a line lacks something or has it of another kind.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    kind = 'a folder' if path.is_dir() else 'no file'
    raise FileNotFoundError(f'the trace {str(path)!r} is {kind}, expected a file of requests; check the path.')
  lines = _lines(path)
  try:
    first = next(lines)
  except StopIteration:
    raise ValueError(f'{path} is empty, expected a request a line.') from None
  format = format or _format_of(first)
  lines = itertools.chain([first], lines)
  recorded = list(_read_csv(lines, format) if format in _COLUMNS else _read_json(lines, format))
  if not recorded:
    raise ValueError(f'{path} has no request, expected at least one.')
  start_s = min(one.arrival_s for one in recorded)
  longest = max(one.output_len for one in recorded)
  sampling = SamplingParams(max_tokens=longest, ignore_eos=True)
  requests = [
    Request(
      one.id,
      prompt_of(one.input_len, _VOCABULARY, seed, one.block_hashes, one.block_size),
      sampling,
      one.arrival_s - start_s,
      session=one.session,
      block_hashes=one.block_hashes,
      block_size=one.block_size if one.block_hashes else None,
    )
    for seed, one in enumerate(recorded)
  ]
  requests.sort(key=lambda request: request.arrival_s)
  return Trace(path.name, format, tuple(requests), {one.id: one.output_len for one in recorded})


def prompt_of(
  length: int,
  vocab_size: int,
  seed: int,
  block_hashes: tuple[int, ...] = (),
  block_size: int | None = None,
  tenant: str | None = None,
) -> RandomTokens | BlockTokens:
  """The random tokens of a recorded prompt, which follow its ids of blocks where it has some; see `BlockTokens`."""
  if not block_hashes or block_size is None:
    return RandomTokens(length, vocab_size, seed)
  return BlockTokens(length, vocab_size, block_hashes, block_size, tenant or '', seed)


@dataclasses.dataclass(frozen=True, slots=True)
class _Recorded:
  id: str
  arrival_s: float
  input_len: int
  output_len: int
  session: str | None = None
  block_hashes: tuple[int, ...] = ()
  block_size: int | None = None


# ---------------------------------------------------------------------------- lines and fields


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
  """A line of a file."""

  place: str  # the file and the number of the line, counted from 1
  text: str

  def refuse(self, found: str, expected: str) -> NoReturn:
    raise ValueError(f'{self.place}: {found}, expected {expected}.')


def _lines(path: pathlib.Path) -> Iterator[_Line]:
  """The lines of a file that are not blank."""
  with path.open('rb') as file:
    opened = gzip.open if file.read(len(_GZIP)) == _GZIP else open
  number = 0
  with opened(path, 'rb') as file:
    try:
      for number, data in enumerate(file, start=1):
        place = f'{path}, line {number}'
        try:
          text = data.decode('utf-8-sig' if number == 1 else 'utf-8').strip()
        except UnicodeDecodeError as error:
          raise ValueError(f'{place}: found no text ({error}), expected UTF-8.') from None
        if text:
          yield _Line(place, text)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(
        f'{path}, behind line {number}: found no whole gzip ({error}), expected one; fetch the file again.'
      ) from None


class _Fields:
  """The fields of a line, or of an entry in it, each looked at as it is read."""

  def __init__(self, line: _Line, values: Any, place: str = ''):
    self._line, self._place = line, place
    if not isinstance(values, dict):
      line.refuse(f'{place}found {described(values)}', 'a JSON object')
    self.values: dict[str, Any] = values

  def refuse(self, key: str, expected: str) -> NoReturn:
    found = f'{key} is {described(self.values[key])}' if key in self.values else f'there is no {key}'
    self._line.refuse(f'{self._place}{found}', expected)

  def count(self, key: str, least: int = 0) -> int:
    if (value := self.integer(key, least)) > _MOST_TOKENS:
      self.refuse(key, f'an integer from {least} to 2**31 - 1')
    return value

  def integer(self, key: str, least: int) -> int:
    value = self.values.get(key)
    if type(value) is not int or value < least:
      self.refuse(key, f'an integer of at least {least}')
    return value

  def seconds(self, key: str) -> float:
    value = self.values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LATEST:
      self.refuse(key, f'a time from 0 to {_LATEST:g}')
    return float(value)

  def name(self, key: str) -> str:
    value = self.values.get(key)
    if not isinstance(value, str) or not value or not is_whole(value):
      self.refuse(key, 'a text of whole characters that is not empty')
    return value

  def ids(self, key: str) -> list[int]:
    value: Any = self.values.get(key)
    are_ints = isinstance(value, list) and {*map(type, value)} <= {int}
    if not are_ints or min(value, default=0) < 0 or max(value, default=0) >= _IDS:
      self.refuse(key, 'a list of ids from 0 to 2**64 - 1')
    return value

  def entries(self, key: str) -> 'Iterator[_Fields]':
    value = self.values.get(key)
    if not isinstance(value, list):
      self.refuse(key, 'a list of requests')
    for number, one in enumerate(value):
      yield _Fields(self._line, one, f'{self._place}{key}[{number}]: ')


def _parsed(line: _Line) -> _Fields:
  try:
    return _Fields(line, json.loads(line.text))
  except (ValueError, RecursionError) as error:  # of an integer of thousands of digits, too
    line.refuse(f'found {described(line.text)}, which is no JSON ({error})', 'a JSON object')


def _format_of(first: _Line) -> TraceFormat:
  """The format of a file by its first line."""
  if first.text.startswith('{'):
    keys = _parsed(first).values
    for key, named in _KEYS.items():
      if key in keys:
        return named
  for named, columns in _COLUMNS.items():
    if {*first.text.split(',')} >= {*columns}:
      return named
  first.refuse(
    f'found {described(first.text)}, which begins no known format', f'one of {", ".join(get_args(TraceFormat))}'
  )


class _Ids(dict[int, int]):
  """Ids of a whole trace by those of the file: each is one object, however often it comes."""

  def __init__(self, base: int = 0):
    super().__init__()
    self._base = base

  def __missing__(self, local: int) -> int:
    self[local] = found = (self._base + local) % _IDS
    return found

  def of(self, local: Iterable[int]) -> tuple[int, ...]:
    return tuple(map(self.__getitem__, local))


# ---------------------------------------------------------------------------- formats


def _read_json(lines: Iterable[_Line], format: TraceFormat) -> Iterator[_Recorded]:
  read: Callable[[Iterator[_Fields]], Iterator[_Recorded]] = {
    'mooncake': _read_mooncake, 'bailian': _read_bailian, 'weka': _read_weka,
  }[format]  # fmt: skip
  return read(map(_parsed, lines))


def _read_mooncake(rows: Iterable[_Fields]) -> Iterator[_Recorded]:
  known = _Ids()
  for index, row in enumerate(rows):
    input_len, hashes = row.count('input_length', 1), row.ids('hash_ids')
    if len(hashes) > (blocks := -(-input_len // _MOONCAKE_BLOCK)):
      row.refuse('hash_ids', f'at most {blocks} ids, one for each {_MOONCAKE_BLOCK} of {input_len} tokens')
    output_len = max(row.count('output_length'), 1)
    yield _Recorded(
      f'request-{index}', row.seconds('timestamp') / 1000, input_len, output_len, None, known.of(hashes),
      _MOONCAKE_BLOCK,
    )  # fmt: skip


def _read_bailian(rows: Iterable[_Fields]) -> Iterator[_Recorded]:
  known = _Ids()
  parents: dict[int, int] = {}  # by chat
  found = []
  for index, row in enumerate(rows):
    chat, parent = row.integer('chat_id', 0), row.integer('parent_chat_id', _NO_CHAT)
    if chat not in parents and _root_of(parent, parents) == chat:
      row.refuse('parent_chat_id', 'a chat that does not come from this one')
    parents.setdefault(chat, parent)
    input_len = row.count('input_length', 1)
    hashes = known.of(row.ids('hash_ids')[: -(-input_len // _BAILIAN_BLOCK)])
    output_len = max(row.count('output_length'), 1)
    one = _Recorded(
      f'request-{index}', row.seconds('timestamp'), input_len, output_len, None, hashes, _BAILIAN_BLOCK
    )  # fmt: skip
    found.append((chat, one))
  for chat, one in found:
    yield dataclasses.replace(one, session=str(_root_of(chat, parents)))


def _root_of(chat: int, parents: Mapping[int, int]) -> int:
  """The chat that one goes back to, the earliest that the file names."""
  while (parent := parents.get(chat, _NO_CHAT)) != _NO_CHAT:
    chat = parent
  return chat


def _read_weka(rows: Iterable[_Fields]) -> Iterator[_Recorded]:
  sessions = set()
  everywhere = _Ids()
  for row in rows:
    session, block_size = row.name('id'), row.count('block_size', 2)
    if session in sessions:
      row.refuse('id', 'a session of its own a line')
    sessions.add(session)
    scope = row.values.get('hash_id_scope', 'local')
    if scope not in ('local', 'global'):
      row.refuse('hash_id_scope', "'local' or 'global'")
    hashed = hashlib.blake2b(session.encode(), digest_size=8).digest()
    known = everywhere if scope == 'global' else _Ids(int.from_bytes(hashed, 'little'))
    try:
      entries = [*_agents(row, 0.0)]
    except RecursionError:
      row.refuse('requests', 'subagents that nest some hundred deep at most')
    for index, (arrival_s, entry) in enumerate(entries):
      input_len = entry.count('in', 1)
      hashes = entry.ids('hash_ids')[: -(-input_len // block_size)]
      yield _Recorded(
        f'{session}-{index}', arrival_s, input_len, max(entry.count('out'), 1), session, known.of(hashes), block_size
      )


def _agents(entry: _Fields, start_s: float) -> Iterator[tuple[float, _Fields]]:
  """The requests of an agent and its subagents, each with the seconds after its session began."""
  for one in entry.entries('requests'):
    arrival_s = start_s + one.seconds('t')
    if 'requests' in one.values:
      yield from _agents(one, arrival_s)
    else:
      yield arrival_s, one


def _read_csv(lines: Iterable[_Line], format: TraceFormat) -> Iterator[_Recorded]:
  time, input_len, output_len = _COLUMNS[format]
  lines = iter(lines)
  first = next(lines)
  columns = first.text.split(',')
  if missing := [name for name in _COLUMNS[format] if name not in columns]:
    first.refuse(f'found the columns {described(first.text)}', f'{", ".join(missing)} among them')
  began: datetime.datetime | None = None
  for index, line in enumerate(lines):
    values = line.text.split(',')
    if len(values) != len(columns):
      line.refuse(f'found {described(line.text)}', f'{len(columns)} values, as in the first line')
    row = _Fields(line, dict(zip(columns, map(_value_of, values), strict=True)))
    if format == 'azure':
      date = _date_of(row, time)
      began = began or date
      arrival_s = (date - began) / _SECOND  # of differences, as a float has not enough digits for those from 1970
    else:
      arrival_s = row.seconds(time)
    yield _Recorded(f'request-{index}', arrival_s, row.count(input_len, 1), max(row.count(output_len), 1))


def _value_of(text: str) -> int | float | str:
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text


def _date_of(row: _Fields, key: str) -> datetime.datetime:
  """A date; one without a zone is UTC, and what is below a microsecond is left out."""
  try:
    date = datetime.datetime.fromisoformat(row.values[key])
  except (TypeError, ValueError):
    row.refuse(key, 'a date such as 2023-11-16 18:15:46.6805900')
  return date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
