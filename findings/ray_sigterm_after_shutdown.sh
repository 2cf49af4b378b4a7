#!/usr/bin/env bash
# After ray.shutdown() a program's own SIGTERM handler is there for Python, and the signal ends the process anyway.
#
# Guess: a handler that signal.signal installed handles what signal.getsignal names it for, behind ray.shutdown() too.
# Instead: ray.init() puts a handler of its own in its place, which Python knows of. ray.shutdown() sets what the
#   system does with SIGTERM back to the default beneath Python: getsignal still names the program's handler, which is
#   not called any more. Installing it again behind ray.shutdown() helps.
# Versions: ray 2.60.0, Python 3.11; 2026-11-28.
# Seen:
#   nothing done behind it: getsignal names our handler, ended by signal 15
#   installed again: getsignal names our handler, it was called
# For pdjax: a SIGTERM while a run on Ray wrote its report ended it without one. _sigterm_kept in pdjax/deployment.py
#   installs the handler again behind Ray's beginning and its end.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
cat >"$folder/signals.py" <<'END'
import os
import signal
import sys
import time

import ray


def handle(number, frame):
  print('it was called', flush=True)
  os._exit(0)


def main():
  options = {'log_to_driver': False, 'configure_logging': False, 'include_dashboard': False}
  ray.init(address='local', num_cpus=1, object_store_memory=80 * 2**20, **options)
  signal.signal(signal.SIGTERM, handle)
  ray.shutdown()
  named = signal.getsignal(signal.SIGTERM) is handle
  print(f'getsignal names {"our handler" if named else "another"}', end=', ', flush=True)
  if sys.argv[1:] == ['again']:
    signal.signal(signal.SIGTERM, handle)
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(5)
  print('nothing happened', flush=True)


main()
END
told() {
  local code=0
  RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_TOKEN="$(printf 'ab%.0s' {1..32})" \
    "$folder/venv/bin/python" -I "$folder/signals.py" "$@" 2>"$folder/errors" >"$folder/out" || code=$?
  tail -n 1 "$folder/out"
  if ((code > 128)); then echo "ended by signal $((code - 128))"; fi
}
as_it_is=$(told | tr -d '\n')
again=$(told again | tr -d '\n')
echo "nothing done behind it: $as_it_is"
echo "installed again: $again"
[[ "$as_it_is" == 'getsignal names our handler, ended by signal 15' ]]
[[ "$again" == 'getsignal names our handler, it was called' ]]
