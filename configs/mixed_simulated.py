r"""Chat and code on Llama 3.1 8B, on TPU v5e chips that are not here: short prompts beside long ones, in virtual time.

Each class has limits of its own, and the report counts by class: expect most of the prefill workers' time to go into
the long prompts of code, and chat to wait behind them for some of its first tokens. With `busy_s` the load changes: the
rate, twice the rate, and the rate again, each for so many seconds.

python -m experiments.run --config=configs/mixed_simulated.py --backend=simulator
python -m experiments.run --config=configs/mixed_simulated.py:split=colocated --backend=simulator
python -m experiments.run --config=configs/mixed_simulated.py:busy_s=60 --backend=simulator
python -m experiments.run --config=configs/mixed_simulated.py --backend=simulator --workdir=out \
    --set=workload.parts.code.share=0.5 --compare --rates=2,4,8
"""

from pdjax.config import ServingConfig
from pdjax.cost import Roofline
from pdjax.policies import Colocated, Disaggregated
from pdjax.serving import Policy
from pdjax.types import SLO, ChipSpec, LinkSpec, ModelSpec, colocated_pool, decode_pool, parse_split, prefill_pool
from pdjax.workload import Lognormal, Mix, Phase, Phases, Poisson, Share, Workload


def get_config(
  split: str = '2P1D', requests_per_s: float = 8.0, num_requests: int = 500, busy_s: float = 0.0
) -> ServingConfig:
  """The run.

  Args:
    split: Workers of either role, such as '2P1D', or 'colocated' for three of both.
    requests_per_s: Requests of both classes.
    num_requests: The number of them, unless the load changes.
    busy_s: Seconds of each of three phases, of which the second has twice the rate; 0 is one rate for all.
  """
  sizes = {'tp': 4, 'max_sequences': 64, 'max_step_tokens': 2048, 'max_chunks': 32}
  policy: Policy
  if split == 'colocated':
    workers, policy = colocated_pool(3, **sizes), Colocated(token_budget=1024)
  else:
    num_prefill, num_decode = parse_split(split)
    workers = prefill_pool(num_prefill, **sizes) + decode_pool(num_decode, **sizes)
    policy = Disaggregated(max_prefill_tokens=2048)
  chat = Poisson(
    prompt=Lognormal(320, 0.8, high=4096), output=Lognormal(160, 0.8, high=1024), slo=SLO(ttft_ms=500, tpot_ms=50)
  )
  code = Poisson(
    prompt=Lognormal(4000, 0.6, high=12_000), output=Lognormal(60, 0.8, high=512), slo=SLO(ttft_ms=4000, tpot_ms=100)
  )
  mix = Mix(
    (Share(chat, 0.7, 'chat'), Share(code, 0.3, 'code', priority=1, deadline_s=10.0)),
    requests_per_s=requests_per_s,
    num_requests=num_requests,
  )
  workload: Workload = mix
  if busy_s:
    twice = Mix(mix.parts, requests_per_s=2 * requests_per_s)
    workload = Phases((Phase(mix, busy_s), Phase(twice, busy_s), Phase(mix, busy_s)))
  return ServingConfig(
    model=ModelSpec.llama3_8b(),
    workers=workers,
    policy=policy,
    workload=workload,
    page_size=64,
    dtype='bfloat16',
    max_context=16_384,
    cost=Roofline(ChipSpec.tpu_v5e(), LinkSpec(45e9, 0.001, 'jax-ml/scaling-book tpus.md, one way')),
  )
