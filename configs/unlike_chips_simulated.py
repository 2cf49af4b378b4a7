r"""Llama 3.1 70B on two kinds of chips that are not here: H100s prefill, and what has more bandwidth a dollar decodes.

A prompt is bound by FLOPs, a token by bandwidth: the A100 has half the FLOPs a byte of the H100, at less than half its
price, and the H200 has more bandwidth than either. Which pays, the report says in requests a dollar and joules a token;
swapped, the chips do what they are worse at. The seconds come from a roofline of published peaks, and prices change:
read ratios and orderings.

python -m experiments.run --config=configs/unlike_chips_simulated.py --backend=simulator
python -m experiments.run --config=configs/unlike_chips_simulated.py:decode=h200 --backend=simulator
python -m experiments.run --config=configs/unlike_chips_simulated.py:prefill=a100,decode=h100 --backend=simulator
"""

import dataclasses
from typing import Literal

from pdjax.config import ServingConfig
from pdjax.cost import Roofline
from pdjax.policies import Disaggregated
from pdjax.types import SLO, ChipSpec, LinkSpec, ModelSpec, decode_pool, parse_split, prefill_pool
from pdjax.workload import Lognormal, Poisson

# Dollars: the middle of the range of on-demand prices of specialised clouds, mercatus-ai.com/blog/cloud-gpu-pricing,
# May 2026. Watts: the most that a board draws, NVIDIA's data sheets of the SXM boards (A100 80GB, H100, H200).
CHIPS = {
  'a100': dataclasses.replace(ChipSpec.a100(), dollars_per_hour=1.30, watts=400),
  'h100': dataclasses.replace(ChipSpec.h100(), dollars_per_hour=3.00, watts=700),
  'h200': dataclasses.replace(ChipSpec.h200(), dollars_per_hour=4.00, watts=700),
}


def get_config(
  split: str = '1P2D',
  prefill: Literal['a100', 'h100', 'h200'] = 'h100',
  decode: Literal['a100', 'h100', 'h200'] = 'a100',
  requests_per_s: float = 12.0,
  num_requests: int = 300,
) -> ServingConfig:
  """The run.

  Args:
    split: Workers of either role, each of eight chips, such as '1P2D'.
    prefill: The chip of those that prefill.
    decode: The chip of those that decode.
    requests_per_s: Poisson arrivals.
    num_requests: The number of them.
  """
  num_prefill, num_decode = parse_split(split)
  pages = {'tp': 8, 'max_sequences': 128, 'max_chunks': 32}
  return ServingConfig(
    model=ModelSpec.llama3_70b(),
    workers=(
      prefill_pool(num_prefill, chip=CHIPS[prefill], page_size=128, max_step_tokens=4096, **pages)
      + decode_pool(num_decode, chip=CHIPS[decode], page_size=32, max_step_tokens=512, **pages)
    ),
    policy=Disaggregated(max_prefill_tokens=4096),
    workload=Poisson(
      requests_per_s=requests_per_s,
      num_requests=num_requests,
      prompt=Lognormal(1020, 0.8, high=8192),
      output=Lognormal(129, 0.9, high=1024),
    ),
    dtype='bfloat16',
    max_context=16_384,
    cost=Roofline(CHIPS[prefill], LinkSpec(25e9, 0.001, 'one 200 Gb/s port a chip, one way')),
    slo=SLO(ttft_ms=1000, tpot_ms=60),
  )
