#!/usr/bin/env bash
# What Orbax does when a restore asks for another shape than is stored: three answers in three versions.
#
# Guess: a target of another shape is refused, or, as one remembers, the array is padded with zeros or cut.
# Instead: it depends on the version and on where the shape is said. Up to 0.7.0 `global_shape` pads or cuts in silence,
#   from 0.8.0 on only with strict=False. The shape of the target itself (a jax.ShapeDtypeStruct as `item`) is ignored
#   up to 0.11.31, so that what comes has the stored shape, and refused from 0.11.37 on at the latest.
# Versions: orbax-checkpoint 0.7.0 with jax 0.4.38, 0.11.20 with jax 0.6.2, 0.12.8 with jax 0.10.2, Python 3.11;
#   2026-11-27.
# Seen, of a weight that is stored as (2, 3) and asked for as (3, 4):
#   orbax-checkpoint==0.7.0: item (2, 3), global_shape (3, 4)
#   orbax-checkpoint==0.11.20: item (2, 3), global_shape refused, with strict=False (3, 4)
#   orbax-checkpoint==0.12.8: item refused, global_shape refused, with strict=False (3, 4)
# For pdjax: a model description that does not belong to the weights must not be served. OrbaxCheckpoint in
#   pdjax/model/checkpoint/orbax.py compares every shape itself and asks Orbax for none.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/restore.py" <<'END'
import importlib.metadata
import pathlib
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def shape_of(folder, target, **asked):
  """The shape that comes of asking for another, or 'refused'."""
  item = {'a': jax.ShapeDtypeStruct(target, np.float32, sharding=SHARDING)}
  args = {'a': ocp.ArrayRestoreArgs(sharding=SHARDING, **asked)}
  try:
    restored = ocp.PyTreeCheckpointer().restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args))
  except ValueError:
    return 'refused'
  return str(restored['a'].shape)


with tempfile.TemporaryDirectory() as parent:
  folder = pathlib.Path(parent) / 'saved'
  ocp.PyTreeCheckpointer().save(folder, {'a': np.ones((2, 3), np.float32)})
  found = ['item ' + shape_of(folder, (3, 4)), 'global_shape ' + shape_of(folder, (3, 4), global_shape=(3, 4))]
  if importlib.metadata.version('orbax-checkpoint') != '0.7.0':
    found.append('with strict=False ' + shape_of(folder, (3, 4), global_shape=(3, 4), strict=False))
print(', '.join(found))
END
check() { # expected, then the packages
  "${PYTHON:-python3}" -m venv --clear "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "${@:2}"
  seen=$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I "$folder/restore.py")
  echo "$2: $seen"
  [[ "$seen" == "$1" ]]
}
check 'item (2, 3), global_shape (3, 4)' orbax-checkpoint==0.7.0 jax==0.4.38 jaxlib==0.4.38
check 'item (2, 3), global_shape refused, with strict=False (3, 4)' orbax-checkpoint==0.11.20 jax==0.6.2 jaxlib==0.6.2
check 'item refused, global_shape refused, with strict=False (3, 4)' orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
