"""The command in processes of its own: a checkpoint for it, and a quick way to call it."""

import json
import pathlib
import subprocess
import sys

import pytest

from pdjax.model.checkpoint import RandomCheckpoint
from tests.compiling import quick_environment
from tests.hf import write_folder
from tests.tiny import TINY

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> pathlib.Path:
  """A folder as Hugging Face writes it, with the tiny model's weights and no tokenizer."""
  folder = tmp_path_factory.mktemp('checkpoint')
  write_folder(folder, RandomCheckpoint(TINY))
  return folder


# Reads arguments as JSON lines and runs the command with each in a process forked from this one, where all of it is
# imported but JAX has not started.
FORKING = """
import json, os, signal, sys, tempfile
from absl import app
from experiments import run

for line in sys.stdin:
  with tempfile.TemporaryFile('w+') as printed, tempfile.TemporaryFile('w+') as shown:
    child = os.fork()
    if not child:
      signal.alarm(300)
      os.dup2(shown.fileno(), 1)
      os.dup2(printed.fileno(), 2)
      sys.argv = ['experiments.run', *json.loads(line)]
      app.run(run.main)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    printed.seek(0), shown.seek(0)
    print(json.dumps([status, printed.read(), shown.read()]), flush=True)
"""


@pytest.fixture(scope='module')
def answered():
  """The command's exit status, and what it says on stderr and on stdout."""
  with subprocess.Popen(
    [sys.executable, '-c', FORKING], cwd=ROOT, env=quick_environment(), text=True, stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as process:  # fmt: skip

    def answer(*arguments: object) -> tuple[int, str, str]:
      process.stdin.write(json.dumps(list(map(str, arguments))) + '\n')
      process.stdin.flush()
      line = process.stdout.readline()
      assert line, 'the process that forks the others has ended'
      return tuple(json.loads(line))

    yield answer
