r"""The run of smollm2_cpu.py with a process for each worker, placed by Ray (`pip install pdjax[cluster]`).

The answers are the same. Prompts are computed in one process and tokens decoded in another, so that neither waits for
the other's computations even on CPU; KV goes from process to process over a socket. Ray is started on this machine and
stopped in the end, unless there is a cluster to use. docs/security.md says what listens where.

python -m experiments.run --config=configs/smollm2_ray.py --workdir=runs/ray
python -m experiments.run --config=configs/smollm2_ray.py:split=2P1D --prompt="What is the capital of France?"
python -m experiments.run --config=configs/smollm2_ray.py --ray_address=10.0.0.1:6379 --set=processes.host=node
"""

import dataclasses

from configs import smollm2_cpu
from pdjax.config import ServingConfig
from pdjax.types import RayCluster


def get_config(split: str = '1P1D', page_size: int = 16, requests_per_s: float = 1.0) -> ServingConfig:
  """The run.

  Args:
    split: Workers of either role, such as '2P1D'; each has a process of its own.
    page_size: Tokens per KV page.
    requests_per_s: The rate at which questions come.
  """
  config = smollm2_cpu.get_config(split=split, page_size=page_size, requests_per_s=requests_per_s)
  return dataclasses.replace(config, processes=RayCluster())
