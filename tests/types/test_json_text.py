"""All that a run holds becomes strict JSON."""

import dataclasses
import enum
import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdjax.types.json_text import json_text, plain_data


def strict(text: str):
  return json.loads(text, parse_constant=pytest.fail)


class Colour(enum.Enum):
  RED = math.inf


@dataclasses.dataclass
class Point:
  x: float
  y: object = None


# By RFC 8259, which has no numbers but finite ones, and our contract for their names; what is finite, by Python's json.
@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    (math.nan, 'NaN'),
    (math.inf, 'Infinity'),
    (-math.inf, '-Infinity'),
    ([1.5, {'a': -math.nan}], [1.5, {'a': 'NaN'}]),
    (np.float32('-inf'), '-Infinity'),
    (ml_dtypes.bfloat16('nan'), 'NaN'),
    (np.array([1.0, math.inf], np.float16), [1.0, 'Infinity']),
    (np.int64(3), 3),
    ({math.nan: 1, 1.5: 2, None: 3, (1, 2): 4}, {'NaN': 1, '1.5': 2, 'null': 3, '[1, 2]': 4}),
    ({Colour.RED: 5}, {'Infinity': 5}),
    (Point(math.nan, Point(1.0, frozenset({2}))), {'x': 'NaN', 'y': {'x': 1.0, 'y': [2]}}),
    (Colour.RED, 'Infinity'),
    (range(2), [0, 1]),
    ('half \ud83d', 'half \ud83d'),
    (b'bytes', "b'bytes'"),
    (True, True),
  ],
)
def test_anything_is_strict_json(value, expected):
  assert strict(json_text(value)) == expected
  assert strict(json_text([value], indent=1, separators=(',', ':'))) == [expected]
  assert plain_data(value) == expected


def test_names_of_numbers_are_read_back_by_float():
  for value in (math.inf, -math.inf):
    assert float(strict(json_text(value))) == value
  assert math.isnan(float(strict(json_text(math.nan))))


def test_half_a_surrogate_pair_is_an_escape_that_a_file_can_hold():
  assert json_text('\ud83d').encode() == b'"\\ud83d"'


@given(
  st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  )
)
def test_plain_data_is_written_as_the_json_module_writes_it(value):
  assert json_text(value) == json.dumps(value)
  assert plain_data(value) == value
