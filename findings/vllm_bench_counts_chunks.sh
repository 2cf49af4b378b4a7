#!/usr/bin/env bash
# `vllm bench serve` counts chunks where its names say tokens: ITL and the peak output token throughput.
#
# Guess: an inter-token latency is a time a token, and max_output_tokens_per_s ("Peak output token throughput") tokens.
# Instead: both are of the chunks of the stream, whatever a chunk holds. Where a server sends four tokens in a chunk
#   (speculation, several decode steps a pass, a stream interval), the mean ITL is four times the TPOT and the peak a
#   quarter of the tokens; TPOT, output_throughput and total_output_tokens divide by tokens.
# Versions: vllm 0.33.0 (its client, and its formula taken out of vllm/benchmarks/serve.py: nothing else of it is
#   installed), aiohttp 3.14.5, numpy 2.4.6, Python 3.11; 2026-11-27. vllm is a large package.
# Seen, of a first token and then five chunks of four, 40 ms apart:
#   21 tokens, 5 ITLs, mean ITL 4.0 times the mean TPOT, max_output_tokens_per_s 6
# For pdjax: reports counted tokens under these names. pdjax/metrics/report.py now counts an answer's pieces, as here.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  aiohttp==3.14.5 numpy==2.4.6 regex==2026.11.19 tqdm==4.70.1
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps vllm==0.33.0
"$folder/venv/bin/python" -I - <<'END'
import ast
import asyncio
import dataclasses
import importlib.util
import json
import pathlib
import sysconfig

import aiohttp
import numpy as np
from aiohttp import web

BENCHMARKS = pathlib.Path(sysconfig.get_path('purelib')) / 'vllm' / 'benchmarks'


def client():
  """vLLM's requests, loaded without the rest of it."""
  spec = importlib.util.spec_from_file_location('client', BENCHMARKS / 'lib' / 'endpoint_request_func.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def formula():
  """Its calculate_metrics and what that fills."""
  wanted = ('calculate_metrics', 'BenchmarkMetrics')
  source = ast.parse((BENCHMARKS / 'serve.py').read_text())
  nodes = [node for node in source.body if getattr(node, 'name', '') in wanted]
  module = ast.Module([ast.parse('from __future__ import annotations').body[0], *nodes], [])
  names = {
    'np': np, 'dataclass': dataclasses.dataclass, 'MILLISECONDS_TO_SECONDS_CONVERSION': 1000,
    'TERM_PLOTLIB_AVAILABLE': False, 'print': lambda *_: None,
  }
  exec(compile(module, 'serve.py', 'exec'), names)
  return names['calculate_metrics']


async def answer(request):
  """One token, five chunks of four, then how many there were."""
  response = web.StreamResponse()
  await response.prepare(request)
  for chunk in ('a', *['b c d e'] * 5):
    await response.write(f'data: {json.dumps({"choices": [{"text": chunk}]})}\n\n'.encode())
    await asyncio.sleep(0.04)
  usage = {'choices': [], 'usage': {'completion_tokens': 21, 'prompt_tokens': 3}}
  await response.write(f'data: {json.dumps(usage)}\n\ndata: [DONE]\n\n'.encode())
  return response


async def measure():
  app = web.Application()
  app.router.add_post('/v1/completions', answer)
  runner = web.AppRunner(app)
  await runner.setup()
  site = web.TCPSite(runner, '127.0.0.1', 0)
  await site.start()
  url = f'http://127.0.0.1:{runner.addresses[0][1]}/v1/completions'
  module = client()
  wanted = module.RequestFuncInput(prompt='x', api_url=url, prompt_len=3, output_len=21, model='m')
  async with aiohttp.ClientSession() as session:
    output = await module.async_request_openai_completions(wanted, session)
  await runner.cleanup()
  return output


output = asyncio.run(measure())
metrics, _ = formula()([None], [output], 1.0, None, [99.0], {})
times = metrics.mean_itl_ms / metrics.mean_tpot_ms
print(
  f'{metrics.total_output} tokens, {len(output.itl)} ITLs, mean ITL {times:.1f} times the mean TPOT, '
  f'max_output_tokens_per_s {metrics.max_output_tokens_per_s:.0f}'
)
assert (metrics.total_output, len(output.itl), metrics.max_output_tokens_per_s) == (21, 5, 6)
assert abs(times - 4) < 0.01
END
