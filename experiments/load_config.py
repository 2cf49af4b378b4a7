"""Loads a config file: `path.py` or `path.py:name=value,...`, whose get_config makes the run."""

import importlib.util
import inspect
import pathlib
import sys
from typing import Any

from pdjax.config import ServingConfig
from pdjax.overrides import parse_value


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
  root = str(pathlib.Path(__file__).resolve().parents[1])
  if root not in sys.path:
    sys.path.append(root)  # configs build on each other as `configs.name`
  if path.suffix != '.py':
    raise ValueError(f'config {str(path)!r} is not a .py file; a config is a Python file with get_config().')
  spec = importlib.util.spec_from_file_location(f'pdjax_config_{path.stem}', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses of the file look their module up
  spec.loader.exec_module(module)
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
