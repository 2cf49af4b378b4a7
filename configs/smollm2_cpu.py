r"""SmolLM2-135M-Instruct on virtual CPU devices, prefill and decode on meshes of their own.

Twelve questions come at random times; every answer is made of a prompt computed on one mesh and tokens decoded on
another. Any prompt up to the model's context of 8,192 tokens is served, in chunks.

python -m experiments.run --config=configs/smollm2_cpu.py --workdir=runs/demo
python -m experiments.run --config=configs/smollm2_cpu.py:split=2P1D,decode_tp=3
python -m experiments.run --config=configs/smollm2_cpu.py --prompt="What is the capital of France?"
"""

from pdjax.config import ServingConfig
from pdjax.policies import Disaggregated
from pdjax.types import SLO, SamplingParams, decode_pool, parse_split, prefill_pool
from pdjax.workload import Poisson

QUESTIONS = (
  'What is the capital of France?',
  'List three primary colours.',
  'Why is the sky blue?',
  'Name the largest planet in the solar system.',
  'What is 12 times 12?',
  'Who wrote Romeo and Juliet?',
  'What do bees make?',
  'How many days are in a leap year?',
  'What is the boiling point of water?',
  'Explain in one sentence what a computer does.',
  'What is the opposite of hot?',
  'Give me a short tip for sleeping well.',
)


def get_config(
  split: str = '1P1D',
  prefill_tp: int = 1,
  decode_tp: int = 1,
  page_size: int = 16,
  pool_tokens: int = 16_384,
  requests_per_s: float = 1.0,
) -> ServingConfig:
  """The run.

  Args:
    split: Workers of either role, such as '2P1D'.
    prefill_tp: Devices of each prefill worker: 1, 3 or 9 for this model.
    decode_tp: Devices of each decode worker.
    page_size: Tokens per KV page.
    pool_tokens: Tokens that each worker has pages for; one needs 46 kB in float32.
    requests_per_s: The rate at which questions come.
  """
  num_prefill, num_decode = parse_split(split)
  num_pages = pool_tokens // max(page_size, 1)
  return ServingConfig(
    checkpoint='smollm2',
    workers=prefill_pool(num_prefill, tp=prefill_tp, num_pages=num_pages)
    + decode_pool(num_decode, tp=decode_tp, num_pages=num_pages),
    policy=Disaggregated(),
    workload=Poisson(
      requests_per_s=requests_per_s,
      num_requests=len(QUESTIONS),
      prompts=QUESTIONS,
      sampling=SamplingParams(max_tokens=48),
    ),
    page_size=page_size,
    slo=SLO(ttft_ms=1000, tpot_ms=200),
    platform='cpu',
  )
