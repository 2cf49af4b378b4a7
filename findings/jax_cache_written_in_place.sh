#!/usr/bin/env bash
# JAX writes an entry of its persistent compilation cache in place, under its final name.
#
# Guess: the entry is written under another name and renamed once it is whole, as caches that processes share do, so
#   that whoever finds it finds all of it.
# Instead: the file is opened for writing under the name by which others look it up; nothing is renamed, and without a
#   size limit there is no lock. A process that looks meanwhile reads the beginning of a program; one that is
#   killed meanwhile leaves it, and since an entry that is there is never written again, everybody after it compiles.
# Versions: jax 0.10.2 on CPU, Python 3.11; 2026-11-28.
# Seen:
#   opened for writing: ['jit_f-*-cache'], renamed: []
# For pdjax: processes of workers keep their programs in one folder. pdjax/engine/kept_programs.py takes away an entry
#   that cannot be read, so that it is written anew; in the tests, whose warnings are errors, the one that tells of a
#   half-written entry is let through (pyproject.toml).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
CACHE="$folder/cache" JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'END'
import os
import re
import sys

cache = os.environ['CACHE']
opened, renamed = [], []


def watch(event, arguments):
  """Note what is opened for writing in the cache's folder, and what is renamed there."""
  if event == 'open' and str(arguments[0]).startswith(cache) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
    opened.append(os.path.basename(str(arguments[0])))
  elif event == 'os.rename' and str(arguments[1]).startswith(cache):
    renamed.append(os.path.basename(str(arguments[1])))


sys.addaudithook(watch)
import jax

jax.config.update('jax_compilation_cache_dir', cache)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)


@jax.jit
def f(x):
  return x * 2 + 1


f(1.0).block_until_ready()
mine = [re.sub('-[0-9a-f]+-', '-*-', name) for name in opened if name.startswith('jit_f-')]
print(f'opened for writing: {mine}, renamed: {renamed}')
assert (mine, renamed) == (['jit_f-*-cache'], [])
assert [name for name in os.listdir(cache) if name.startswith('jit_f-')][0] in opened
END
