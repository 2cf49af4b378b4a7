"""Checks of what users write, where it is made: fields and arguments against their type hints and the ranges in these.

A frozen dataclass calls `check_fields(self)`; a function that users call is `@checks_arguments()`. What a hint takes is
in `pdjax.types.fitting`.
"""

import dataclasses
import functools
import inspect
import math
import operator
import os
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

from pdjax.types.fitting import Misfit, Must, at_least, fit_of, shown

P = ParamSpec('P')
R = TypeVar('R')

SOME = Must(lambda items: len(items) > 0, 'at least one')
Count = Annotated[int, at_least(1)]
Index = Annotated[int, at_least(0)]
Size = Annotated[int, at_least(1, 'an integer of at least 1')]
Positive = Annotated[float, Must(lambda value: 0 < value < math.inf, 'a positive number')]
Rate = Annotated[float, Must(lambda value: value > 0, 'a positive number')]  # an infinite one takes no time
Share = Annotated[float, Must(lambda value: 0 < value <= 1, 'a share above 0, at most 1')]
Seconds = Annotated[float, Must(lambda value: 0 <= value < math.inf, '0 or more seconds')]
Patience = Annotated[float, Must(lambda value: value > 0, 'more than 0 seconds; inf waits for ever')]
Seed = Annotated[int, Must(lambda value: 0 <= value < 2**63, 'an integer from 0 to 2**63 - 1')]
TokenId = Annotated[int, Must(lambda value: 0 <= value < 2**31, 'a token id from 0 to 2**31 - 1')]


def check_fields(one: Any) -> None:
  """See that every field of a dataclass is what its hint says; a default is taken on trust.

  Values that a hint has in another form are stored in that: lists as tuples, texts as members of an enumeration,
  NumPy's numbers as Python's. The class may say in `_said` how messages name a field; without, it is 'Class has
  field=value', for instance `_said = 'worker {name} has {field}={value}'`.

  Raises:
    ValueError: if one is not; the message names the class, the field, the value and what was expected.
  """
  kind = type(one)
  values, checks = _CHECKS.get(kind) or _checks_of(kind)
  for value, (default, fit, name) in zip(values(one), checks, strict=True):
    if value is not default:
      try:
        fitted = fit(value)
      except Misfit as misfit:
        raise refusal(one, name, misfit) from None
      if fitted is not value:
        object.__setattr__(one, name, fitted)


def refusal(one: Any, field: str, misfit: Misfit) -> ValueError:
  """The error that names a field of an object, its value, and what was expected."""
  said = getattr(type(one), '_said', '{kind} has {field}={value}')
  name = shown(getattr(one, 'name', getattr(one, 'id', None)))
  found = said.format(kind=type(one).__name__, name=name, field=f'{field}{misfit.place}', value=shown(misfit.value))
  return ValueError(misfit.says(found))


def checks_arguments(*but: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Have a function see that its arguments are what their hints say, before it does anything.

  Args:
    but: The names of arguments that the function checks by itself.
  """

  def decorate(function: Callable[P, R]) -> Callable[P, R]:
    signature = inspect.signature(function)

    @functools.cache
    def fits() -> dict[str, Callable[[Any], Any]]:
      hints = hints_of(function)
      kinds = {name: one.kind for name, one in signature.parameters.items()}
      several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
      return {name: fit_of(hints[name]) for name in kinds if name in hints and kinds[name] not in several}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
      try:
        bound = signature.bind(*args, **kwargs)
      except TypeError as error:
        takes = ', '.join(name for name in signature.parameters if name != 'self')
        raise TypeError(f'{_called(function)}(): {error}; it takes {takes}') from None
      for name, value in bound.arguments.items():
        if name in but or name not in fits() or value is signature.parameters[name].default:
          continue
        bound.arguments[name] = _fit_argument(function, name, value, fits()[name])
      return function(*bound.args, **bound.kwargs)

    return checked

  return decorate


def fit_argument(function: Callable[..., Any], name: str, value: Any, hint: Any) -> Any:
  """An argument of a function as a type hint has it.

  Raises:
    ValueError: if it is of another type, or out of the range that the hint names.
  """
  return _fit_argument(function, name, value, fit_of(hint))


def _fit_argument(function: Callable[..., Any], name: str, value: Any, fits: Callable[[Any], Any]) -> Any:
  try:
    return fits(value)
  except Misfit as misfit:
    raise ValueError(
      misfit.says(f'{_called(function)}() is given {name}{misfit.place}={shown(misfit.value)}')
    ) from None


def _called(function: Callable[..., Any]) -> str:
  return function.__qualname__.rpartition('<locals>.')[2].removesuffix('.__init__')


def as_path(value: Any) -> Any:
  """A path of `pathlib` as text; anything else as it is."""
  return os.fspath(value) if isinstance(value, os.PathLike) else value


# ---------------------------------------------------------------------------- built once a class

_NO_DEFAULT = object()
_Check = tuple[Any, Callable[[Any], Any], str]  # its default, what fits a value, its name
_CHECKS: dict[type, tuple[Callable[[Any], tuple[Any, ...]], tuple[_Check, ...]]] = {}


def _checks_of(kind: type) -> tuple[Callable[[Any], tuple[Any, ...]], tuple[_Check, ...]]:
  hints = hints_of(kind)
  checks: list[_Check] = []
  for field in dataclasses.fields(kind):
    default = _NO_DEFAULT if field.default is dataclasses.MISSING else field.default
    checks.append((default, fit_of(hints[field.name]), field.name))
  names = [name for _, _, name in checks]
  values = operator.attrgetter(*names) if len(names) > 1 else lambda one: tuple(getattr(one, name) for name in names)
  _CHECKS[kind] = values, tuple(checks)
  return _CHECKS[kind]


def hints_of(thing: Any) -> dict[str, Any]:
  """The type hints of a class or a function, ranges included; Any where a name in one is not to be found."""
  try:
    return typing.get_type_hints(thing, include_extras=True)
  except Exception:  # hints are evaluated, and may raise anything: one names what is imported for type checkers only
    pass
  found: dict[str, Any] = {}
  for owner in reversed(thing.__mro__) if isinstance(thing, type) else (thing,):
    names = vars(sys.modules.get(owner.__module__, typing))
    for name, hint in getattr(owner, '__annotations__', {}).items():
      single = types.SimpleNamespace(__annotations__={name: hint})
      try:
        found[name] = typing.get_type_hints(single, dict(names), include_extras=True)[name]
      except Exception:
        found[name] = Any
  return found
