r"""The baseline of smollm2_cpu.py: the same questions on as many devices, every worker prefilling and decoding.

Prompt chunks are fused with decodes under a token budget, and nothing moves between workers.

python -m experiments.run --config=configs/smollm2_colocated.py:workers=2 --set=policy.token_budget=128
"""

import dataclasses

from configs import smollm2_cpu
from pdjax.config import ServingConfig
from pdjax.policies import Colocated
from pdjax.types import colocated_pool


def get_config(workers: int = 2, tp: int = 1, page_size: int = 16, pool_tokens: int = 16_384) -> ServingConfig:
  """The run.

  Args:
    workers: Workers, each with both roles.
    tp: Devices of each: 1, 3 or 9 for this model.
    page_size: Tokens per KV page.
    pool_tokens: Tokens that each worker has pages for; one needs 46 kB in float32.
  """
  return dataclasses.replace(
    smollm2_cpu.get_config(page_size=page_size),
    workers=colocated_pool(workers, tp=tp, num_pages=pool_tokens // max(page_size, 1)),
    policy=Colocated(),
  )
