"""Values against type hints: a hint says the type, and with `Annotated[int, Must(...)]` the range.

A truth value is no number, NaN neither, an integer is a float too, NumPy's numbers become Python's, lists become
tuples, and a text is no tuple of texts. For each hint a function is built once.
"""

import collections.abc
import dataclasses
import enum
import functools
import itertools
import numbers
import operator
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

_LONGEST = 80  # characters of a value in a message
_MOST_ITEMS = 10_000_000  # of what is made a tuple


@dataclasses.dataclass(frozen=True, slots=True)
class Must:
  """A range that values of a type must be in: `Annotated[int, Must(lambda n: n >= 1, 'at least 1')]`.

  Attributes:
    holds: Whether a value is in it.
    expected: The range in words; where they begin with an article, they name the type too.
  """

  holds: Callable[[Any], bool]
  expected: str


@dataclasses.dataclass(frozen=True, slots=True)
class Fits:
  """A function that looks at values instead: it gives them as the type has them, or raises `Misfit`."""

  fit: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Remedy:
  """A remedy behind all that a message says of a field: `Annotated[Workload, Remedy('use Given(requests)')]`."""

  words: str


def at_least(least: int, expected: str = '') -> Must:
  """A number from this one on."""
  return Must(lambda value: value >= least, expected or f'at least {least}')


class Misfit(ValueError):
  """A value that is not of its type, or not in its range.

  Attributes:
    value: The value, or the item of it that is wrong.
    expected: The type or range in words.
    place: The place of the item in the whole, such as '[1]'.
    close: Whether the value is of the type, and only out of its range.
    remedy: A way to write it instead, in words, if that can be told.
  """

  def __init__(self, value: Any, expected: str, place: str = '', *, close: bool = False, remedy: str = ''):
    super().__init__(value, expected, place)
    self.value = value
    self.expected = expected
    self.place = place
    self.close = close
    self.remedy = remedy

  def says(self, what: str) -> str:
    """The sentence that begins with what was found."""
    return f'{what}, expected {self.expected}{"; " if self.remedy else ""}{self.remedy}.'


def fit(value: Any, hint: Any) -> Any:
  """The value as a type hint has it.

  Raises:
    Misfit: if it is of another type, or out of the range that the hint names.
  """
  return fit_of(hint)(value)


def alternatives(hint: Any) -> tuple[Any, ...]:
  """The types of a union, or the one that it is; ranges are left out."""
  if typing.get_origin(hint) is Annotated:
    return alternatives(typing.get_args(hint)[0])
  return tuple(one for part in _parts(hint) for one in (alternatives(part) if part is not hint else (part,)))


def shown(value: Any) -> str:
  """A value in a message: short, and whatever it is."""
  try:
    if isinstance(value, str | bytes | list | tuple | dict | set) and len(value) > _LONGEST:
      return reprlib.repr(value)  # all of it might take minutes
    plain = isinstance(value, numbers.Number) and not isinstance(value, bool)
    text = str(value) if plain and not isinstance(value, enum.Enum) else repr(value)
  except Exception:  # a number of too many digits, or an object that cannot say what it is
    return f'something of type {type(value).__name__}'
  text = re.sub(r'\s*\n\s*', ' ', text)  # as an array has it
  return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}…'


def fit_of(hint: Any) -> Callable[[Any], Any]:
  """A function that gives a value as the hint has it, or raises `Misfit`."""
  try:
    return _fit_of(hint)
  except TypeError:  # a hint that cannot be hashed
    return _fit_of.__wrapped__(hint)


def expected_of(hint: Any) -> str:
  """The values that a hint takes, in words."""
  if hint is None or hint is type(None):
    return 'None'
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    words = expected_of(args[0])
    if ranges := [one.expected for one in args[1:] if isinstance(one, Must)]:
      words = ranges[0] if ranges[0].startswith(('a ', 'an ')) else f'{words}, {ranges[0]}'
    return words
  if origin is Literal:
    return _one_of(args)
  parts = _parts(hint)
  if len(parts) > 1:
    return _either([expected_of(part) for part in parts])
  if origin in (tuple, collections.abc.Sequence):
    if origin is tuple and args[-1:] != (...,):
      return f'a tuple of {len(args)}'
    named = 'tuple' if origin is tuple else 'sequence'
    is_enum = isinstance(args[0], type) and issubclass(args[0], enum.Enum)
    return f'a {named} of {_plural(args[0])}{f", each {expected_of(args[0])}" if is_enum else ""}'
  if origin in (list, collections.abc.Iterable):
    return f'a list of {_plural(args[0])}'
  if origin is collections.abc.Mapping or origin is dict:
    return 'a mapping'
  if origin is collections.abc.Callable or hint is Callable:
    return 'a function'
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    return _one_of([member.value for member in hint])
  known = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a text'}
  if hint in known:
    return known[hint]
  name = getattr(hint, '__name__', str(hint).replace('typing.', ''))
  if isinstance(hint, type) and not getattr(hint, '_is_protocol', False) and dataclasses.is_dataclass(hint):
    return f'{name}(...)'
  return f'{"an" if name[:1] in "AEIOU" else "a"} {name}'


def _one_of(values: Sequence[Any]) -> str:
  names = [repr(value) for value in values]
  return names[0] if len(names) == 1 else f'one of {", ".join(names)}'


def _either(parts: list[str]) -> str:
  parts = [part for part in parts if part != 'None'] + (['None'] if 'None' in parts else [])
  if len(parts) == 2 and ',' not in parts[0] and (parts[1] != 'None' or ' ' not in parts[0]):
    return ' or '.join(parts)
  return f'{", ".join(parts[:-1])}, or {parts[-1]}'


def _plural(hint: Any) -> str:
  words = expected_of(hint)
  known = {'a text': 'texts', 'an integer': 'integers', 'a number': 'numbers'}
  if words.startswith('a token id'):
    return 'token ids'
  if typing.get_origin(hint) is Annotated:
    return _plural(typing.get_args(hint)[0])
  return known.get(words) or str(getattr(hint, '__name__', words))


def _parts(hint: Any) -> tuple[Any, ...]:
  union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
  return typing.get_args(hint) if union else (hint,)


@functools.cache
def _fit_of(hint: Any) -> Callable[[Any], Any]:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is None or hint is type(None):
    return _of_kind(type(None), 'None')
  if origin is Annotated:
    return _in_range(hint, args[0], args[1:])
  if origin is Literal:
    return _among(args, expected_of(hint))
  if len(parts := _parts(hint)) > 1:
    return _any_of(parts, expected_of(hint))
  if hint is int:
    return _integer
  if hint is float:
    return _number
  if origin in (tuple, list, collections.abc.Sequence, collections.abc.Iterable) and args:
    return _several(hint, origin, args)
  if origin is collections.abc.Mapping or origin is dict:
    return _of_kind(Mapping, 'a mapping')
  if origin is collections.abc.Callable or hint is collections.abc.Callable:
    return _that(callable, 'a function')
  if isinstance(origin, type) and origin is not type:  # of a generic class, such as os.PathLike[str]
    return fit_of(origin)
  if isinstance(hint, type) and hint is not Any:  # which is a class, from Python 3.11 on
    if issubclass(hint, enum.Enum):
      return _member(hint)
    if getattr(hint, '_is_protocol', False):
      return _that(_does(hint), expected_of(hint))
    if not typing.is_typeddict(hint):
      return _of_kind(hint, expected_of(hint))
  return _anything


def _anything(value: Any) -> Any:
  return value


def _integer(value: Any) -> int:
  if type(value) is int:
    return value
  try:
    if not isinstance(value, bool):
      return operator.index(value)
  except TypeError:
    pass
  raise _misfit(value, 'an integer')


def _number(value: Any) -> Any:
  kind = type(value)
  if kind is float:
    if value == value:
      return value
    raise Misfit(value, 'a number', close=True)
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    raise _misfit(value, 'a number')
  try:
    as_float = float(value)
  except (OverflowError, ValueError):
    raise Misfit(value, 'a number that a float can hold', close=True) from None
  if as_float != as_float:
    raise Misfit(value, 'a number', close=True)
  return value if kind is int else as_float


def _misfit(value: Any, expected: str) -> Misfit:
  """The misfit of a value of another type; a class in place of an object is told apart."""
  if isinstance(value, type):
    return Misfit(value, expected, remedy=f'pass {value.__name__}(...), not the class')
  if isinstance(value, dict) and expected.endswith('(...)'):
    return Misfit(value, expected, remedy=f'pass {expected.removesuffix("(...)")}(**fields)')
  return Misfit(value, expected)


def _of_kind(kind: Any, expected: str) -> Callable[[Any], Any]:
  def of_kind(value: Any) -> Any:
    if isinstance(value, kind):
      return value
    raise _misfit(value, expected)

  return of_kind


def _that(holds: Callable[[Any], bool], expected: str) -> Callable[[Any], Any]:
  def that(value: Any) -> Any:
    if holds(value):
      return value
    raise _misfit(value, expected)

  return that


def _does(protocol: type) -> Callable[[Any], bool]:
  """Whether an object has the methods of a protocol; its class alone does not count."""
  methods = {
    name
    for owner in protocol.__mro__
    if getattr(owner, '_is_protocol', False)
    for name, member in vars(owner).items()
    if not name.startswith('_') and callable(member)
  }
  return lambda value: not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in methods)


def _member(kind: type[enum.Enum]) -> Callable[[Any], Any]:
  def member(value: Any) -> Any:
    if isinstance(value, kind):
      return value
    try:
      return kind(value)
    except (ValueError, TypeError):
      raise _misfit(value, expected_of(kind)) from None

  return member


def _among(names: tuple[Any, ...], expected: str) -> Callable[[Any], Any]:
  def among(value: Any) -> Any:
    for name in names:
      if type(value) is type(name) and value == name:
        return value
    raise Misfit(value, expected)

  return among


def _in_range(hint: Any, inner: Any, extras: tuple[Any, ...]) -> Callable[[Any], Any]:
  own = [one.fit for one in extras if isinstance(one, Fits)]
  if own:
    return own[0]
  fit_inner, ranges = fit_of(inner), tuple(one for one in extras if isinstance(one, Must))
  remedy = '; '.join(one.words for one in extras if isinstance(one, Remedy))
  expected = expected_of(hint)

  def in_range(value: Any) -> Any:
    try:
      value = fit_inner(value)
    except Misfit as misfit:
      words = misfit.expected if misfit.place or misfit.close else expected
      if misfit.close and not misfit.place and ranges:  # NaN, or a number too large
        words = ranges[0].expected
      close, own_remedy = misfit.close, misfit.remedy or remedy
      raise Misfit(misfit.value, words, misfit.place, close=close, remedy=own_remedy) from None
    for one in ranges:
      if not one.holds(value):
        raise Misfit(value, one.expected, close=True, remedy=remedy)
    return value

  if inner not in (int, float) or len(ranges) != 1:
    return in_range
  holds = ranges[0].holds

  def plain_in_range(value: Any) -> Any:  # a million requests are made of these
    return value if type(value) is inner and value == value and holds(value) else in_range(value)

  return plain_in_range


def _any_of(parts: tuple[Any, ...], expected: str) -> Callable[[Any], Any]:
  fits = [fit_of(part) for part in parts if part is not type(None)]
  takes_none = len(fits) < len(parts)
  others = [expected_of(part) for part in parts if typing.get_origin(part) is Literal] + ['None'] * takes_none

  def any_of(value: Any) -> Any:
    if takes_none and value is None:
      return None
    nearest, remedy = None, ''
    for fit_one in fits:
      try:
        return fit_one(value)
      except Misfit as misfit:
        remedy = remedy or misfit.remedy
        if nearest is None and (misfit.close or misfit.place):
          nearest = misfit
    if nearest is None:
      raise Misfit(value, expected, remedy=remedy)
    words = nearest.expected if nearest.place else _either([nearest.expected, *others])
    raise Misfit(nearest.value, words, nearest.place, close=True, remedy=nearest.remedy)

  return any_of


def _several(hint: Any, origin: Any, args: tuple[Any, ...]) -> Callable[[Any], Any]:
  """Of tuples and lists, each item is looked at; another sequence is taken for what it says it is."""
  expected = expected_of(hint)
  item_fits = None if args[-1:] == (...,) or origin is not tuple else [fit_of(arg) for arg in args]
  fit_item = fit_of(args[0])

  def items_of(value: Sequence[Any]) -> Iterator[Any]:
    if item_fits is not None and len(item_fits) != len(value):
      raise Misfit(value, expected)
    for index, item in enumerate(value):
      try:
        yield (fit_item if item_fits is None else item_fits[index])(item)
      except Misfit as misfit:
        place = f'[{index}]{misfit.place}'
        raise Misfit(misfit.value, misfit.expected, place, remedy=misfit.remedy) from None

  def several(value: Any) -> Any:
    if isinstance(value, str):
      short = value if len(value) <= 20 else f'{value[:20]}…'
      raise Misfit(value, expected, remedy=f'write ({short!r},)' if _is_item(value, args[0]) else '')
    if isinstance(value, type | bytes | bytearray | Mapping | collections.abc.Set):
      raise _misfit(value, expected)
    if origin is tuple or isinstance(value, tuple | list):
      items = tuple(items_of(value if isinstance(value, tuple | list) else _whole(value, expected)))
      if origin is not tuple:
        return value
      return value if isinstance(value, tuple) and _same(items, value) else items
    if not hasattr(value, '__iter__' if origin is collections.abc.Iterable else '__getitem__'):
      raise Misfit(value, expected)
    if origin is list or (origin is collections.abc.Sequence and not hasattr(value, '__len__')):
      raise Misfit(value, expected)
    return value

  return several


def _is_item(text: str, hint: Any) -> bool:
  """Whether a text alone is what the items of a tuple are."""
  if not (hint is str or typing.get_origin(hint) is Literal or (isinstance(hint, type) and issubclass(hint, str))):
    return False
  try:
    fit(text, hint)
  except Misfit:
    return False
  return True


def _whole(value: Any, expected: str) -> tuple[Any, ...]:
  """All items of an array, a range or a generator, unless they are more than there is memory for."""
  if isinstance(value, itertools.count | itertools.cycle | itertools.repeat):
    raise Misfit(value, expected)
  try:
    if hasattr(value, '__len__') and len(value) > _MOST_ITEMS:
      raise Misfit(value, f'{expected}, at most {_MOST_ITEMS:,} of them', close=True)
    return tuple(value)
  except TypeError:  # neither that nor any other sequence
    raise Misfit(value, expected) from None


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
  return all(one is other for one, other in zip(some, others, strict=True))
