"""Fields and arguments are checked against their type hints, where they are made."""

import dataclasses
import enum
import fractions
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import pytest

from pdjax.types.checked import Count, Seconds, Share, check_fields, checks_arguments, hints_of
from pdjax.types.fitting import Fits, Misfit, Must, Remedy, at_least, fit, shown


class Colour(enum.StrEnum):
  RED = 'red'
  BLUE = 'blue'


class Draws(Protocol):
  """An object that draws."""

  @property
  def size(self) -> int:
    """Its size."""

  def draw(self) -> int:
    """Draw."""


class Pen:
  """Draws, and has no size."""

  def draw(self) -> int:
    return 1


@dataclasses.dataclass(frozen=True)
class Inner:
  """A dataclass in another."""

  size: Count = 1

  def __post_init__(self):
    check_fields(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Outer:
  """A field of each sort."""

  name: str = 'o'
  count: Count = 1
  share: Share = 0.5
  flag: bool = False
  colour: Colour = Colour.RED
  inner: Inner | None = None
  sizes: tuple[int, ...] = ()
  pair: tuple[int, str] | None = None
  pen: Draws = Pen()
  mode: Literal['auto', 'off'] | Count = 'auto'
  call: Callable[[int], int] | None = None

  def __post_init__(self):
    check_fields(self)


# By our contract: a value, and what is stored of it.
@pytest.mark.parametrize(
  ('hint', 'value', 'stored'),
  [
    (int, 3, 3),
    (int, np.int64(3), 3),
    (float, 3, 3),
    (float, 2.5, 2.5),
    (float, math.inf, math.inf),
    (float, np.float32(0.5), 0.5),
    (float, fractions.Fraction(1, 2), 0.5),
    (bool, True, True),
    (str, '', ''),
    (Colour, 'blue', Colour.BLUE),
    (Colour, Colour.BLUE, Colour.BLUE),
    (tuple[int, ...], [1, 2], (1, 2)),
    (tuple[int, ...], range(2), (0, 1)),
    (tuple[int, ...], np.array([1, 2]), (1, 2)),
    (tuple[int, ...], (one for one in (1, 2)), (1, 2)),
    (tuple[tuple[int, ...], ...], [[1], ()], ((1,), ())),
    (tuple[int, str], [1, 'a'], (1, 'a')),
    (int | None, None, None),
    (Literal['a', 1], 1, 1),
    (Literal['a'] | int, 7, 7),
    (Any, object, object),
    (object, 5, 5),
    (type, int, int),
    (Inner | int, Inner(2), Inner(2)),
    (Annotated[int | None, at_least(1)], 1, 1),
    (dict[str, int], {'a': 1}, {'a': 1}),
    ('a name of nothing', 5, 5),
  ],
)
def test_what_a_hint_takes_is_stored_as_the_hint_has_it(hint, value, stored):
  found = fit(value, hint)
  assert found == stored and type(found) is type(stored)


@pytest.mark.parametrize('hint', [Sequence[int], Iterable[int], list[int]])
def test_other_sequences_stay_what_they_are(hint):
  value = [1, 2]
  assert fit(value, hint) is value
  if hint != list[int]:
    assert fit(lazy := range(10**12), hint) is lazy


@pytest.mark.parametrize(
  ('hint', 'value', 'words'),
  [
    (int, True, 'True, expected an integer'),
    (int, 2.0, '2.0, expected an integer'),
    (int, np.True_, 'expected an integer'),
    (int, np.array([1.5]), 'expected an integer'),
    (int, '2', "'2', expected an integer"),
    (int, int, "<class 'int'>, expected an integer; pass int(...), not the class"),
    (float, math.nan, 'nan, expected a number'),
    (float, np.float32('nan'), 'nan, expected a number'),
    (float, 10**400, 'expected a number that a float can hold'),
    (float, True, 'True, expected a number'),
    (float, '2', "'2', expected a number"),
    (float, 1j, '1j, expected a number'),
    (bool, 1, '1, expected True or False'),
    (bool, 'no', "'no', expected True or False"),
    (str, b'a', "b'a', expected a text"),
    (Colour, 'green', "'green', expected one of 'red', 'blue'"),
    (Colour, [], "[], expected one of 'red', 'blue'"),
    (Literal['a', 1], True, "True, expected one of 'a', 1"),
    (Literal['a', 1], [], 'expected one of'),
    (Inner | None, {'size': 1}, "{'size': 1}, expected Inner(...) or None; pass Inner(**fields)"),
    (Inner, Inner, 'expected Inner(...); pass Inner(...), not the class'),
    (Draws, Pen, 'expected a Draws; pass Pen(...), not the class'),
    (Draws, 5, '5, expected a Draws'),
    (tuple[str, ...], 'text', "'text', expected a tuple of texts; write ('text',)"),
    (tuple[str, ...] | None, 'text', "'text', expected a tuple of texts, or None; write ('text',)"),
    (tuple[int, ...], b'hi', "b'hi', expected a tuple of integers"),
    (tuple[int, ...], {1, 2}, '{1, 2}, expected a tuple of integers'),
    (tuple[int, ...], {1: 2}, '{1: 2}, expected a tuple of integers'),
    (tuple[int, ...], 5, '5, expected a tuple of integers'),
    (tuple[int, ...], np.array(5), 'expected a tuple of integers'),
    (tuple[int, ...], range(10**12), 'expected a tuple of integers, at most 10,000,000 of them'),
    (tuple[int, ...], itertools.count(), 'count(0), expected a tuple of integers'),
    (tuple[int, ...], (1, 'a'), "[1]: 'a', expected an integer"),
    (tuple[Inner, ...], (Inner, 5), "[0]: <class 'tests.types.test_checked.Inner'>, expected Inner(...); pass"),
    (tuple[int, str], (1,), '(1,), expected a tuple of 2'),
    (Sequence[int], {1}, '{1}, expected a sequence of integers'),
    (Iterable[float], 'ab', "'ab', expected a list of numbers"),
    (Mapping[str, int], [], '[], expected a mapping'),
    (Callable[[], int], 5, '5, expected a function'),
    (Count | Literal['auto'], 0, "0, expected at least 1 or 'auto'"),
    (Count | None, 2.5, '2.5, expected an integer, at least 1, or None'),
    (Seconds, math.nan, 'nan, expected 0 or more seconds'),
    (Seconds, -1, '-1, expected 0 or more seconds'),
    (Seconds, 'x', "'x', expected a number, 0 or more seconds"),
    (Annotated[int, at_least(2), Remedy('take two')], 1, '1, expected at least 2; take two'),
    (Annotated[int | None, Remedy('take two')], 'x', "'x', expected an integer, or None; take two"),
  ],
)
def test_a_misfit_says_what_was_found_and_what_is_expected(hint, value, words):
  with pytest.raises(Misfit) as error:
    fit(value, hint)
  misfit = error.value
  said = misfit.says(f'{misfit.place}{": " if misfit.place else ""}{shown(misfit.value)}')
  assert words in said


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'name': 5}, 'Outer has name=5, expected a text.'),
    ({'count': 0}, 'Outer has count=0, expected at least 1.'),
    ({'share': 1.5}, 'Outer has share=1.5, expected a share above 0, at most 1.'),
    ({'sizes': (1, None)}, 'Outer has sizes[1]=None, expected an integer.'),
    ({'pen': None}, 'Outer has pen=None, expected a Draws.'),
    ({'inner': Inner}, "Inner'>, expected Inner(...) or None; pass Inner(...), not the class."),
    ({'mode': 'on'}, "Outer has mode='on', expected one of 'auto', 'off', or an integer, at least 1."),
    ({'pair': (1, 2)}, 'Outer has pair[1]=2, expected a text.'),
  ],
)
def test_a_field_is_named_with_its_class(fields, words):
  with pytest.raises(ValueError) as error:
    Outer(**fields)
  assert words in str(error.value)


def test_fields_are_stored_as_their_hints_have_them_and_defaults_are_taken_on_trust():
  one = Outer(count=np.int64(3), colour='blue', sizes=[1, 2], inner=Inner(2), call=abs)
  assert (one.count, one.colour, one.sizes) == (3, Colour.BLUE, (1, 2)) and type(one.count) is int and hash(one)

  @dataclasses.dataclass(frozen=True)
  class Lies:
    size: int = None

    def __post_init__(self):
      check_fields(self)

  assert Lies().size is None and Lies(3).size == 3
  with pytest.raises(ValueError, match=r'Lies has size=2\.5, expected an integer'):
    Lies(2.5)


def test_a_class_may_say_how_its_fields_are_named():
  @dataclasses.dataclass(frozen=True)
  class Named:
    _said: ClassVar[str] = 'the thing {name} has {field} {value}'
    name: str
    size: Count = 1

    def __post_init__(self):
      check_fields(self)

  with pytest.raises(ValueError, match="the thing 'a' has size 0, expected"):
    Named('a', 0)


def test_a_subclass_of_a_checked_class_has_its_own_fields_checked():
  @dataclasses.dataclass(frozen=True)
  class Wider(Inner):
    width: float = 1.0

  with pytest.raises(ValueError, match="Wider has width='wide', expected a number"):
    Wider(width='wide')
  with pytest.raises(ValueError, match='Wider has size=0, expected at least 1'):
    Wider(size=0)


def test_a_hint_that_is_not_to_be_found_takes_all_and_leaves_the_others():
  @dataclasses.dataclass(frozen=True)
  class Loose(Inner):
    other: 'NotThere' = None  # noqa: F821
    width: float = 1.0

  assert hints_of(Loose)['other'] is Any and hints_of(Loose)['width'] is float
  assert Loose(other=5).other == 5
  with pytest.raises(ValueError, match="Loose has width='x'"):
    Loose(width='x')


def test_a_function_may_look_at_values_instead():
  def fit_even(value):
    if value % 2:
      raise Misfit(value, 'an even number')
    return value

  assert fit(4, Annotated[int, Fits(fit_even)]) == 4
  with pytest.raises(Misfit):
    fit((3,), tuple[Annotated[int, Fits(fit_even)], ...])


def test_arguments_are_checked_before_a_function_does_anything():
  done = []

  @checks_arguments('free')
  def work(size: Count, *rest: int, free: int = 0, name: str | None = None, **more: int) -> str:
    """Do it."""
    done.append(size)
    return f'{size}{rest}{free}{name}{more}'

  assert work(np.int64(2), 3, free='x', name='n', other='y') == "2(3,)xn{'other': 'y'}"
  assert work.__doc__ == 'Do it.' and work.__name__ == 'work' and done == [2]
  for arguments, words in (
    ({'size': 0}, r'work\(\) is given size=0, expected at least 1'),
    ({'size': 1, 'name': 5}, r'work\(\) is given name=5, expected a text, or None'),
  ):
    with pytest.raises(ValueError, match=words):
      work(**arguments)
  with pytest.raises(TypeError, match='size'):
    work()
  assert done == [2]


def test_an_unknown_argument_is_told_with_the_function_and_what_it_takes():
  class Served:
    @checks_arguments()
    def __init__(self, count: Count, *, seed: int = 0):
      """Take them."""

  with pytest.raises(TypeError, match=r"^Served\(\): got an unexpected keyword argument 'sed'; it takes count, seed$"):
    Served(1, sed=2)
  with pytest.raises(TypeError, match=r'^Served\(\): too many positional arguments; it takes count, seed$'):
    Served(1, 2)


def test_a_constructor_is_named_by_its_class():
  class Box:
    @checks_arguments()
    def __init__(self, size: Count):
      self.size = size

  with pytest.raises(ValueError, match=r"Box\(\) is given size='big', expected an integer"):
    Box('big')
  assert Box(3).size == 3


class Unspeakable:
  def __repr__(self):
    raise RuntimeError('no')


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (5, '5'),
    (np.float32(0.5), '0.5'),
    (Unspeakable(), 'something of type Unspeakable'),
    ('a', "'a'"),
    (True, 'True'),
  ],
)
def test_any_value_can_be_shown(value, text):
  assert shown(value) == text


def test_a_number_of_more_digits_than_python_prints_is_named_by_its_type():
  assert shown(10**5000) == 'something of type int'


@pytest.mark.parametrize('value', ['x' * 10**6, list(range(10**6)), b'x' * 10**6, 10**200, {1: 'x' * 999}])
def test_a_value_is_shown_short(value):
  assert len(shown(value)) <= 100


def test_every_range_that_must_hold_is_looked_at():
  hint = Annotated[int, at_least(1), Must(lambda n: n < 10, 'below 10')]
  assert fit(9, hint) == 9
  with pytest.raises(Misfit, match='below 10'):
    fit(10, hint)
