r"""Chats with Llama 3.1 8B on TPU v5e chips that are not here: what each turn repeats is found, here or on a host.

Every prompt is the whole conversation so far. Workers keep what they have computed until others need the pages; with
`host_gb` what a turn leaves is copied to the memory of a host too, and comes back from there.

python -m experiments.run --config=configs/chats_simulated.py --backend=simulator
python -m experiments.run --config=configs/chats_simulated.py:host_gb=256 --backend=simulator
python -m experiments.run --config=configs/chats_simulated.py:cache=False --backend=simulator
python -m experiments.run --config=configs/chats_simulated.py:split=colocated,host_gb=256 --backend=simulator
"""

from pdjax.config import ServingConfig
from pdjax.cost import Roofline
from pdjax.policies import Colocated, Disaggregated, LongestPrefix
from pdjax.serving import Policy
from pdjax.types import (
  SLO,
  ChipSpec,
  HostPlace,
  LinkSpec,
  ModelSpec,
  PrefixCache,
  colocated_pool,
  decode_pool,
  parse_split,
  prefill_pool,
)
from pdjax.workload import Fixed, Lognormal, MultiTurn


def get_config(
  split: str = '2P1D', host_gb: int = 0, *, cache: bool = True, num_chats: int = 200, users: int = 60
) -> ServingConfig:
  """The run.

  Args:
    split: Workers of either role, such as '2P1D', or 'colocated' for three of both.
    host_gb: Gigabytes of a host's memory for what turns leave; 0 is none.
    cache: Whether prefixes are kept at all.
    num_chats: Conversations.
    users: Most of them at once.
  """
  sizes = {'tp': 4, 'max_sequences': 64, 'max_step_tokens': 2048, 'max_chunks': 32, 'num_pages': 3000}
  host = 'host0' if host_gb else None
  policy: Policy
  if split == 'colocated':
    workers, policy = colocated_pool(3, **sizes), Colocated(1024, placement=LongestPrefix(), returns_to=host)
  else:
    num_prefill, num_decode = parse_split(split)
    workers = prefill_pool(num_prefill, **sizes) + decode_pool(num_decode, **sizes)
    policy = Disaggregated(2048, place_prefill=LongestPrefix(), returns_to=host)
  return ServingConfig(
    model=ModelSpec.llama3_8b(),
    workers=workers,
    places=(HostPlace('host0', host_gb * 10**9),) if host_gb else (),
    policy=policy,
    workload=MultiTurn(
      num_chats=num_chats,
      turns=Fixed(8),
      prompt=Lognormal(1020, 0.8, high=4096),
      user=Lognormal(200, 0.8, high=1024),
      output=Lognormal(200, 0.8, high=1024),
      think_s=10.0,
      max_concurrency=users,
    ),
    prefix_cache=PrefixCache() if cache else None,
    page_size=64,
    dtype='bfloat16',
    max_context=16_384,
    cost=Roofline(
      ChipSpec.tpu_v5e(),
      LinkSpec(45e9, 0.001, 'jax-ml/scaling-book tpus.md, one way'),
      host_link=LinkSpec(15e9, 0.001, 'jax-ml/scaling-book tpus.md, PCIe of a chip'),
    ),
    slo=SLO(ttft_ms=2000, tpot_ms=100),
  )
