"""Overrides of a config's fields by dotted names, and values read from text."""

import ast
import contextlib
import dataclasses
import difflib
import enum
import inspect
import typing
from collections.abc import Iterable
from typing import Any

from pdjax.types import fitting
from pdjax.types.checked import checks_arguments


@checks_arguments()
def apply_overrides(config: Any, overrides: Iterable[str]) -> Any:
  """A copy of the config with fields replaced, each override written `name.of.field=value`.

  A value is a Python literal, or else text; roles have commas between: `workers.decode0.may_become=prefill,both`, and a
  chip may be named, of `ChipSpec.PRESETS`: `workers.decode0.chip=h100`. Items of a tuple go by index, workers also by
  name: `workers.decode0.tp=3`.

  Raises:
    ValueError: if an override is malformed, names an unknown field or has a value of another type; the message lists
      the fields there are.
  """
  for override in overrides:
    path, equals, text = override.partition('=')
    if not equals or not path:
      raise ValueError(f'override {override!r} is not of the form field=value, e.g. page_size=64.')
    config = _replace(config, path.strip().split('.'), _literal(text.strip()), override)
  return config


def parse_value(text: str, hint: Any, what: str) -> Any:
  """Read a value of a type: a Python literal, or else text.

  Raises:
    ValueError: if it is of another type; `what` names it in the message.
  """
  return _fit(_literal(text), hint, what)


def _literal(text: str) -> Any:
  if text in ('inf', '-inf', 'nan', 'Infinity', '-Infinity', 'NaN'):
    return float(text)
  try:
    return ast.literal_eval({'none': 'None', 'true': 'True', 'false': 'False'}.get(text, text))
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval may raise
    return text


def _replace(node: Any, path: list[str], value: Any, override: str) -> Any:
  name, *rest = path
  if isinstance(node, tuple):
    index = _index(node, name, override)
    old = node[index]
    new = _replace(old, rest, value, override) if rest else _fit(value, type(old), f'override {override!r}: {name}')
    return (*node[:index], new, *node[index + 1 :])
  if not dataclasses.is_dataclass(node) or isinstance(node, type):
    raise ValueError(f'override {override!r}: {node!r} has no fields, so {name!r} cannot be set in it.')
  fields = list(inspect.signature(type(node)).parameters)  # of the constructor, which may take more
  if name not in fields:
    close = difflib.get_close_matches(name, fields, 1)
    meant = f' (did you mean {close[0]!r}?)' if close else ''
    raise ValueError(
      f'override {override!r}: {type(node).__name__} has no field {name!r}{meant}; it has {", ".join(fields)}.'
    )
  hint = typing.get_type_hints(type(node).__init__)[name]
  if rest:
    child = getattr(node, name)
    is_unset = child is None or isinstance(child, str)  # as 'auto' is
    value = _replace(_empty(hint) or child if is_unset else child, rest, value, override)
  else:
    value = _fit(value, hint, f'override {override!r}: {name}')
  try:
    return dataclasses.replace(node, **{name: value})
  except ValueError as error:
    raise ValueError(f'override {override!r}: {error}') from error


def _empty(hint: Any) -> Any:
  """The value of a field without an object when something within is set, such as limits of which there were none."""
  for kind in typing.get_args(hint):
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
      with contextlib.suppress(TypeError):  # a field has no default
        return kind()
  return None


def _index(items: tuple, name: str, override: str) -> int:
  names = [getattr(item, 'name', str(index)) for index, item in enumerate(items)]
  if name in names:
    return names.index(name)
  if name.isdigit() and int(name) < len(items):
    return int(name)
  raise ValueError(f'override {override!r}: there is no item {name!r}; there are {", ".join(names)}.')


def _fit(value: Any, hint: Any, what: str) -> Any:
  """The value as the type has it; raise if it is of another."""
  try:
    return fitting.fit(_meant(value, hint), hint)
  except fitting.Misfit as misfit:
    objects = [kind for kind in fitting.alternatives(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    if objects:
      field, path = dataclasses.fields(objects[0])[0].name, what.rpartition(': ')[2]
      named = ', '.join(getattr(objects[0], 'PRESETS', ()))
      misfit.remedy = f'{f"name one of {named}, or " if named else ""}set its fields one by one, such as {path}.{field}'
    raise ValueError(misfit.says(f'{what}{misfit.place} is {fitting.shown(misfit.value)}')) from None


def _meant(value: Any, hint: Any) -> Any:
  """A literal as it may be meant: a whole number as a float, any number as text, a name as the object of that name."""
  kinds = fitting.alternatives(hint)
  for kind in kinds:
    if isinstance(value, str) and value in getattr(kind, 'PRESETS', ()):
      return getattr(kind, value)()
  if type(value) in (int, float) and int not in kinds:
    if float in kinds:
      return float(value)
    if str in kinds:
      return str(value)
  items = next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple), None)
  if isinstance(value, list | tuple):
    return value if items is None else tuple(_meant(item, items[0]) for item in value)
  if isinstance(value, str) and items is not None and isinstance(items[0], type) and issubclass(items[0], enum.Enum):
    return tuple(name.strip() for name in value.split(','))
  return value
