r"""Any supported checkpoint, disaggregated on virtual CPU devices.

python -m experiments.run --config=configs/cpu.py:checkpoint=model.gguf --prompt="Hello"
python -m experiments.run --config=configs/cpu.py:checkpoint=folder,split=2P1D --requests=requests.jsonl --workdir=out

Without a tokenizer in the checkpoint it takes token ids alone, by `prompt_token_ids` in a requests file.
"""

from typing import Literal

from pdjax.config import ServingConfig
from pdjax.types import decode_pool, parse_split, prefill_pool
from pdjax.workload import Fixed, Poisson, Uniform


def get_config(
  checkpoint: str,
  split: str = '1P1D',
  prefill_tp: int = 1,
  decode_tp: int = 1,
  page_size: int = 16,
  dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32',
) -> ServingConfig:
  """The run; without --prompt or --requests it serves sixteen random prompts.

  Args:
    checkpoint: A GGUF file, or a folder with config.json and safetensors.
    split: Workers of either role, such as '2P1D'.
    prefill_tp: Devices of each prefill worker.
    decode_tp: Devices of each decode worker.
    page_size: Tokens per KV page.
    dtype: Of weights and pages; tokens are exact in float32, which 'auto' takes on a CPU.
  """
  num_prefill, num_decode = parse_split(split)
  return ServingConfig(
    checkpoint=checkpoint,
    workers=prefill_pool(num_prefill, tp=prefill_tp) + decode_pool(num_decode, tp=decode_tp),
    workload=Poisson(requests_per_s=2.0, num_requests=16, prompt=Uniform(8, 24), output=Fixed(8)),
    page_size=page_size,
    dtype=dtype,
    platform='cpu',
  )
