r"""Llama 3.1 8B on TPU v5e chips that are not here, while the load turns: long prompts, then long answers, and back.

No fixed split of four workers serves both. With `follows`, workers change their roles as queues and batches fill:
expect it to start from 2P2D, go to 3P1D, to 1P3D and back, and to keep more requests within their limits than any.

python -m experiments.run --config=configs/changing_load_simulated.py --backend=simulator
python -m experiments.run --config=configs/changing_load_simulated.py:split=3P1D,follows=False --backend=simulator
python -m experiments.changing_load
"""

import dataclasses

from pdjax.config import ServingConfig
from pdjax.cost import Roofline
from pdjax.policies import Disaggregated, FollowLoad
from pdjax.serving import Policy
from pdjax.types import SLO, ChipSpec, LinkSpec, ModelSpec, Role, decode_pool, parse_split, prefill_pool
from pdjax.workload import Lognormal, Phase, Phases, Poisson


def get_config(
  split: str = '2P2D', phase_s: float = 60.0, load: float = 1.0, seed: int = 0, *, follows: bool = True
) -> ServingConfig:
  """The run.

  Args:
    split: Workers of either role, of four chips each, as the run begins.
    phase_s: Seconds of each of three phases.
    load: Factor of the rates.
    seed: Seed of the traffic.
    follows: Whether workers change their roles.
  """
  num_prefill, num_decode = parse_split(split)
  sizes = {'tp': 4, 'max_sequences': 64, 'max_step_tokens': 2048, 'max_chunks': 32}
  workers = prefill_pool(num_prefill, **sizes) + decode_pool(num_decode, **sizes)
  fixed = Disaggregated(max_prefill_tokens=2048, moves_on=follows)
  policy: Policy = fixed
  if follows:
    either = (Role.PREFILL, Role.DECODE)
    workers = tuple(dataclasses.replace(worker, may_become=either) for worker in workers)
    policy = FollowLoad(fixed, wait_s=0.3, dwell_s=2.0)
  limits = SLO(ttft_ms=2000, tpot_ms=50)
  reads = Poisson(
    requests_per_s=18 * load, prompt=Lognormal(3000, 0.4, high=8192), output=Lognormal(30, 0.5, high=128), slo=limits
  )
  writes = Poisson(
    requests_per_s=30 * load, prompt=Lognormal(200, 0.5, high=1024), output=Lognormal(400, 0.4, high=1024), slo=limits
  )
  return ServingConfig(
    model=ModelSpec.llama3_8b(),
    workers=workers,
    policy=policy,
    workload=Phases((Phase(reads, phase_s), Phase(writes, phase_s), Phase(reads, phase_s)), seed=seed),
    page_size=64,
    dtype='bfloat16',
    max_context=16_384,
    cost=Roofline(ChipSpec.tpu_v5e(), LinkSpec(45e9, 0.001, 'jax-ml/scaling-book tpus.md, one way')),
  )
