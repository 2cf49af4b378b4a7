"""The second token of a prompt that is handed over, beside the bare products of the same steps.

The steps are those of `bench_handoff`: SmolLM2's shape in float32, the prompt in chunks, then one decode step. The
products are timed as the floor of `bench_cpu` is.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from experiments.device_check.context import Context
from experiments.device_check.parts import TINY
from experiments.floor import cached_s, products_s
from pdjax.model.checkpoint import open_checkpoint
from pdjax.types import ModelSpec

_OURS = 'second token, '  # what rows of `bench_handoff` begin with


def run(context: Context) -> None:
  """Run the benchmark while this process holds no device yet, then the products."""
  prompt_len, chunk, _ = context.sizes.handoff
  checkpoint = str(TINY) if context.toy else 'random'
  model = open_checkpoint(TINY).spec if context.toy else ModelSpec.smollm2_135m()
  rows = _benchmark(context, checkpoint)
  shape = f'prompt of {prompt_len:,} in chunks of {chunk:,}'
  for name, (value, unit) in rows.items():  # handed over before there is something to hold them against
    context.figures.add(f'{name}, {shape}', value, unit)
  steps = [(chunk, start + chunk) for start in range(0, prompt_len, chunk)] + [(1, prompt_len + 1)]
  bare_s = {tokens: products_s(model, tokens, 1, 7 if not context.toy else 1) for tokens in {one for one, _ in steps}}
  read_s = sum(cached_s(model, cached, context.ceilings.copy_bytes_per_s) for _, cached in steps)
  least_s = sum(bare_s[tokens] for tokens, _ in steps) + read_s
  for tokens, seconds in bare_s.items():
    context.figures.add(f'bare products of a pass over {tokens}', 1e3 * seconds, 'ms')
  for name, (value, unit) in rows.items():
    if name.startswith(_OURS):
      context.figures.add(
        f'{name}, {shape}, beside its products', value, unit,
        peer='bare products', peer_value=1e3 * least_s, floor_share=1e3 * least_s / value,
      )  # fmt: skip


def _benchmark(context: Context, checkpoint: str) -> dict[str, tuple[float, str]]:
  """Figures of `bench_handoff` with their units by name; of few ways, since compiling is what takes its time."""
  prompt_len, chunk, rounds = context.sizes.handoff
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'rows.json')
    subprocess.run(
      [
        sys.executable, '-m', 'experiments.bench_handoff', f'--platform={context.platform}',
        f'--checkpoint={checkpoint}', f'--prompt_len={prompt_len}', f'--chunk={chunk}', f'--rounds={rounds}',
        '--ways=auto', f'--compilation_cache={context.cache}', f'--json={file}',
      ],
      check=True,
    )  # fmt: skip
    return {row['name']: (row['value'], row['unit']) for row in json.loads(file.read_text(encoding='utf-8'))}
