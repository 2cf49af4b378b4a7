r"""Converts a checkpoint of any format into one that restores straight into any sharding.

python -m experiments.convert --checkpoint=smollm2 --out=smollm2-orbax --dtype=bfloat16
python -m experiments.run --config=configs/cpu.py:checkpoint=smollm2-orbax --requests=FILE.jsonl --workdir=out

The folder holds the weights as Orbax writes them, the model's shape and a checksum of each weight in pdjax.json, and
the tokenizer. This machine's memory must hold all weights once.
"""

import sys

from absl import app, flags

from pdjax.model.checkpoint import open_checkpoint, save_orbax

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, "A GGUF file, a folder with safetensors, 'smollm2', or a hub id.", required=True
)
_OUT = flags.DEFINE_string('out', None, 'The folder to write, new or empty.', required=True)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16', 'float16'], 'Type of the weights; by default what the checkpoint says.'
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  try:
    checkpoint = save_orbax(open_checkpoint(_CHECKPOINT.value), _OUT.value, _DTYPE.value)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  spec = checkpoint.spec
  print(
    f'{_OUT.value}: {spec.name}, {spec.num_params / 1e6:,.1f} million parameters in {checkpoint.dtype.name}, '
    f'{"with" if checkpoint.tokenizer() else "without"} a tokenizer.'
  )


if __name__ == '__main__':
  app.run(main)
