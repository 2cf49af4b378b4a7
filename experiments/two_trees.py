"""Measurements of two source trees in turns, each in a process of its own that finds one tree only."""

import inspect
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parents[1]
"""The tree of this file."""

_CHILD = """
import json, pathlib, sys
call = json.load(sys.stdin)
import pdjax
found = pathlib.Path(pdjax.__path__[0]).resolve()
if not found.is_relative_to(call['tree']):
  sys.exit(f'pdjax was found in {found}, expected it in {call["tree"]}')
names = {}
exec(compile(call['source'], call['file'], 'exec'), names)
print('\\n' + json.dumps(names[call['function']](**call['arguments'])))
"""


def open_tree(path: str | os.PathLike) -> pathlib.Path:
  """The root of another source tree.

  Raises:
    ValueError: if there is no pdjax at this path.
  """
  tree = pathlib.Path(path).resolve()
  if not (tree / 'pdjax' / '__init__.py').is_file():
    raise ValueError(f'{str(path)!r} has no pdjax/__init__.py, expected the root of a checkout, as git worktree makes.')
  return tree


def measure(tree: pathlib.Path, function: Callable[..., Any], **arguments: Any) -> Any:
  """The answer of a function that runs in a process of its own, in a tree's root and with the tree first on its path.

  Args:
    tree: The tree whose pdjax and experiments the function imports.
    function: A function of a file's top level that names nothing of that file, so it imports what it uses itself: its
      source alone is handed over. Its arguments and its answer are data that JSON can say.
    arguments: Its arguments.

  Raises:
    RuntimeError: if the process fails; it says the end of what that wrote to stderr.
  """
  lines, first_line = inspect.getsourcelines(function)
  call = {
    'tree': str(tree), 'function': function.__name__, 'arguments': arguments, 'file': inspect.getsourcefile(function),
    'source': '\n' * (first_line - 1) + ''.join(lines),  # a traceback names the lines of the file
  }  # fmt: skip
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONSAFEPATH'}
  done = subprocess.run(
    [sys.executable, '-c', _CHILD], input=json.dumps(call), cwd=tree, env=environment, capture_output=True, text=True
  )
  if done.returncode:
    raise RuntimeError(f'{function.__name__} failed in {tree}:\n{done.stderr[-4000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def in_turns(
  trees: Sequence[pathlib.Path], repeats: int, function: Callable[..., Any], **arguments: Any
) -> list[tuple[Any, ...]]:
  """The answers of all trees, once a repeat: a machine that others load meanwhile is slow for each of them."""
  return [tuple(measure(tree, function, **arguments) for tree in trees) for _ in range(repeats)]
