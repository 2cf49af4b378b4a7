r"""GPT-OSS-120B on H100s that are not here: a mixture of experts, half of whose layers keep a window of 128 tokens.

A request moves 36,864 bytes a token, and 4,718,592 for its windows however long it is. A step reads of the experts
those that its tokens are expected to choose. Weights count in bfloat16, 234 GB; the published checkpoint has its
experts in MXFP4, a quarter of that.

python -m experiments.run --config=configs/gpt_oss_120b_simulated.py --backend=simulator
python -m experiments.run --config=configs/gpt_oss_120b_simulated.py:split=1P3D,requests_per_s=4 --backend=simulator
"""

from pdjax.config import ServingConfig
from pdjax.cost import Roofline
from pdjax.policies import Disaggregated
from pdjax.types import SLO, ChipSpec, LinkSpec, ModelSpec, decode_pool, parse_split, prefill_pool
from pdjax.workload import Lognormal, Poisson


def get_config(split: str = '2P1D', tp: int = 8, requests_per_s: float = 4.0, num_requests: int = 300) -> ServingConfig:
  """The run.

  Args:
    split: Workers of either role, such as '2P1D'.
    tp: Chips of each worker.
    requests_per_s: Poisson arrivals.
    num_requests: The number of them.
  """
  num_prefill, num_decode = parse_split(split)
  sizes = {'tp': tp, 'max_sequences': 128, 'max_step_tokens': 4096, 'max_chunks': 32}
  return ServingConfig(
    model=ModelSpec.gpt_oss_120b(),
    workers=prefill_pool(num_prefill, **sizes) + decode_pool(num_decode, **sizes),
    policy=Disaggregated(max_prefill_tokens=4096),
    workload=Poisson(
      requests_per_s=requests_per_s,
      num_requests=num_requests,
      prompt=Lognormal(3000, 0.8, high=30_000),
      output=Lognormal(300, 0.9, high=4096),
    ),
    page_size=64,
    dtype='bfloat16',
    max_context=40_000,
    cost=Roofline(ChipSpec.h100(), LinkSpec(50e9, 0.001, 'one 400 Gb/s port, one way')),
    slo=SLO(ttft_ms=2000, tpot_ms=50),
  )
