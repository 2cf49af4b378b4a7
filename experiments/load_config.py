"""Loads files of a user: a config, `path.py` or `path.py:name=value,...`, and a policy, `path.py:Name`."""

import importlib.util
import inspect
import pathlib
import sys
import types
import zlib
from typing import Any

from pdjax.config import ServingConfig
from pdjax.overrides import parse_value
from pdjax.serving import Policy


def load_config(reference: str) -> ServingConfig:
  """The run that a config file makes.

  Args:
    reference: The file, with keyword arguments of its `get_config` behind a colon if any.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it has no `get_config`, or that takes no such argument or value.
  """
  head, dot, arguments = reference.partition('.py:')
  path = pathlib.Path(f'{head}.py' if dot else reference)
  if not path.is_file():
    near = ', '.join(sorted(str(file) for file in pathlib.Path('configs').glob('[a-z]*.py')))
    raise FileNotFoundError(f'config {str(path)!r} is not a file; expected e.g. one of {near or "your own .py file"}.')
  if path.suffix != '.py':
    raise ValueError(f'config {str(path)!r} is not a .py file; a config is a Python file with get_config().')
  module = _module(path)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'{path} has no get_config(); a config file defines get_config(**arguments) -> ServingConfig.')
  signature = inspect.signature(module.get_config, eval_str=True)
  given = {}
  for argument in filter(None, arguments.split(',')):
    name, equals, text = argument.partition('=')
    if not equals or name not in signature.parameters:
      raise ValueError(
        f'{path}: argument {argument!r} is not of the form name=value with one of {", ".join(signature.parameters)}.'
      )
    hint = signature.parameters[name].annotation
    given[name] = parse_value(text, Any if hint is inspect.Parameter.empty else hint, f'{path}: {name}')
  missing = [
    name for name, one in signature.parameters.items() if one.default is inspect.Parameter.empty and name not in given
  ]
  if missing:
    raise ValueError(f'{path} wants {", ".join(missing)}; write {path}:{missing[0]}=VALUE.')
  config = module.get_config(**given)
  if not isinstance(config, ServingConfig):
    raise ValueError(f'{path}: get_config() returned {type(config).__name__}, expected a ServingConfig.')
  return config


def load_policy(reference: str) -> Policy:
  """A policy that is defined in a file: an object, or a class that is called without arguments.

  Args:
    reference: The file and the name in it, `my.py:Mine`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file has no such policy, or the class cannot be called so.
  """
  head, dot, name = reference.rpartition('.py:')
  if not dot or not name:
    raise ValueError(f'policy {reference!r} is not of the form FILE.py:NAME, such as my.py:Mine.')
  path = pathlib.Path(f'{head}.py')
  if not path.is_file():
    raise FileNotFoundError(f'policy file {str(path)!r} is not a file; expected FILE.py:NAME, such as my.py:Mine.')
  module = _module(path)
  found: Any = getattr(module, name, None)
  if not callable(getattr(found, 'decide', None)):
    here = [
      key for key, one in vars(module).items()
      if callable(getattr(one, 'decide', None)) and getattr(one, '__module__', None) == module.__name__
    ]  # fmt: skip
    what = 'is no policy, which has a method decide(view)' if hasattr(module, name) else 'is not there'
    raise ValueError(f'{path}: {name} {what}; the policies in it are {", ".join(here) or "none"}.')
  if not isinstance(found, type):
    return found
  try:
    return found()
  except TypeError as error:
    raise ValueError(
      f'{path}: {name}() raised {error}; give its fields defaults, or name an object of the file instead.'
    ) from error


def _module(path: pathlib.Path) -> types.ModuleType:
  """The module that a file makes, imported anew."""
  root = str(pathlib.Path(__file__).resolve().parents[1])
  if root not in sys.path:
    sys.path.append(root)  # configs build on each other as `configs.name`
  name = f'pdjax_config_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}'  # files of one name are apart
  spec = importlib.util.spec_from_file_location(name, path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses of the file look their module up
  spec.loader.exec_module(module)
  return module
