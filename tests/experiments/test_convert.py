"""The command that converts a checkpoint, and what it says when it cannot."""

import pathlib
import subprocess
import sys

import ml_dtypes

import pdjax

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.convert', *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
  )


def test_a_checkpoint_is_converted_once(tmp_path):
  arguments = ('--checkpoint=tests/data/families/qwen3', f'--out={tmp_path / "new"}', '--dtype=bfloat16')
  done = command(*arguments)
  assert done.returncode == 0, done.stderr
  assert 'qwen3' in done.stdout and 'in bfloat16, without a tokenizer' in done.stdout
  checkpoint = pdjax.load(tmp_path / 'new')
  assert checkpoint.spec == pdjax.load(ROOT / 'tests' / 'data' / 'families' / 'qwen3').spec
  assert checkpoint.dtype == ml_dtypes.bfloat16
  again = command(*arguments)
  assert again.returncode == 1
  assert again.stderr.strip().splitlines()[-1].startswith('error: ') and 'give another folder' in again.stderr
