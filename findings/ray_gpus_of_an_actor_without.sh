#!/usr/bin/env bash
# A Ray actor with num_gpus=0 sees every GPU that its node shows: CUDA_VISIBLE_DEVICES is left as it was.
#
# Guess: an actor for which no GPU is set aside sees none: Ray empties its CUDA_VISIBLE_DEVICES, as 2.40.0 does.
# Instead: it inherits the variable of the process that started Ray, and so the GPUs that Ray gives to other actors.
#   RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1 brings the empty one back.
# Versions: ray 2.60.0, Python 3.11; 2026-11-27. No GPU is needed: Ray is told of two.
# Seen:
#   num_gpus=0, 0, 1, 1: ['0,1', '0,1', '0', '1']
#   the same with RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1: ['', '', '0', '1']
# For pdjax: two workers whose platform is None could take one GPU. RayCluster.refusal in pdjax/types/processes.py
#   refuses them where the cluster has accelerators, and asks for 'cpu', 'gpu' or 'tpu'.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
cat >"$folder/visible.py" <<'END'
import os

import ray


class Actor:
  def visible(self):
    return os.environ.get('CUDA_VISIBLE_DEVICES')


def main():
  options = {'log_to_driver': False, 'configure_logging': False, 'include_dashboard': False}
  ray.init(address='local', num_cpus=2, num_gpus=2, object_store_memory=80 * 2**20, **options)
  actors = [ray.remote(num_cpus=0.1, num_gpus=gpus)(Actor).remote() for gpus in (0, 0, 1, 1)]
  print(repr(ray.get([actor.visible.remote() for actor in actors], timeout=60)))
  ray.shutdown()


main()
END
visible() {
  env CUDA_VISIBLE_DEVICES=0,1 RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_TOKEN="$(printf 'ab%.0s' {1..32})" "$@" \
    "$folder/venv/bin/python" -I "$folder/visible.py" | tail -n 1
}
as_it_is=$(visible)
with_override=$(visible RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1)
echo "num_gpus=0, 0, 1, 1: $as_it_is"
echo "the same with RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1: $with_override"
[[ "$as_it_is" == "['0,1', '0,1', '0', '1']" || "$as_it_is" == "['0,1', '0,1', '1', '0']" ]]
[[ "$with_override" == "['', '', '0', '1']" || "$with_override" == "['', '', '1', '0']" ]]
