r"""Llama 3.1 8B on TPU v5e chips that are not here: two prefill workers feed one decode worker, in virtual time.

The seconds come from a roofline of published peaks, so read ratios and orderings, not absolute figures; the report says
so. The best colocated division of the same chips is a token budget away.

python -m experiments.run --config=configs/llama3_8b_simulated.py --backend=simulator
python -m experiments.run --config=configs/llama3_8b_simulated.py:split=1P2D,requests_per_s=6 --backend=simulator
python -m experiments.run --config=configs/llama3_8b_simulated.py:split=colocated --backend=simulator \
    --set=policy.token_budget=512
"""

from pdjax.config import ServingConfig
from pdjax.cost import Roofline
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import Policy
from pdjax.types import SLO, ChipSpec, LinkSpec, ModelSpec, colocated_pool, decode_pool, parse_split, prefill_pool
from pdjax.workload import Lognormal, Poisson


def get_config(split: str = '2P1D', tp: int = 4, requests_per_s: float = 4.0, num_requests: int = 500) -> ServingConfig:
  """The run.

  Args:
    split: Workers of either role, such as '2P1D', or 'colocated' for three of both.
    tp: Chips of each worker.
    requests_per_s: Poisson arrivals.
    num_requests: The number of them.
  """
  sizes = {'tp': tp, 'max_sequences': 64, 'max_step_tokens': 2048, 'max_chunks': 32}
  policy: Policy
  if split == 'colocated':
    workers, policy = colocated_pool(3, **sizes), Colocated(token_budget=1024)
  else:
    num_prefill, num_decode = parse_split(split)
    workers = prefill_pool(num_prefill, **sizes) + decode_pool(num_decode, **sizes)
    policy = Disaggregated(max_prefill_tokens=2048, decode_steps=1)
  return ServingConfig(
    model=ModelSpec.llama3_8b(),
    workers=workers,
    policy=policy,
    workload=Poisson(
      requests_per_s=requests_per_s,
      num_requests=num_requests,
      prompt=Lognormal(1020, 0.8, high=8192),
      output=Lognormal(129, 0.9, high=1024),
    ),
    page_size=64,
    dtype='bfloat16',
    max_context=16_384,
    cost=Roofline(ChipSpec.tpu_v5e(), LinkSpec(45e9, 0.001, 'jax-ml/scaling-book tpus.md, one way')),
    slo=SLO(ttft_ms=2000, tpot_ms=100),
  )
