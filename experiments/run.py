r"""Run a config on the engine or the simulator and print its report.

python -m experiments.run --config=configs/smollm2_cpu.py --workdir=runs/demo
python -m experiments.run --config=configs/smollm2_cpu.py --set=policy.decode_steps=1 --goodput "ttft:500 tpot:50"
python -m experiments.run --config=configs/smollm2_cpu.py --prompt="What is the capital of France?"
python -m experiments.run --config=configs/smollm2_cpu.py --requests=requests.jsonl --workdir=out
python -m experiments.run --config=configs/smollm2_ray.py --ray_address=10.0.0.1:6379
python -m experiments.run --config=configs/llama3_8b_simulated.py --backend=simulator
python -m experiments.run --config=configs/llama3_8b_simulated.py --backend=simulator --workdir=out \
    --compare --rates=8,16,24,32 --splits=2P1D,1P2D --budgets=128,256,512

With --workdir a run leaves `report.html`, one page to open in a browser, `trace.json` for ui.perfetto.dev,
`report.json` and `events.jsonl`. With --compare the same workload also runs colocated on the same devices, either side
with several sizes of a pass, and the page and `compare.json` say who wins where; `pdjax/comparison/` says how.

With --requests, each line of the file is served and `requests.jsonl` in the work directory says what became of it, in
the same order; `pdjax/workload/requests_file.py` documents both formats. A line that cannot be served keeps no other
from it: the exit code is 0 if all were, 3 if some were, and 1 if none was.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.load_config import load_config
from pdjax import comparison, launch
from pdjax.config import ServingConfig, apply_overrides
from pdjax.metrics import charts, print_report
from pdjax.serving.checks import PolicyError
from pdjax.serving.messages import Done, Event, Finished
from pdjax.serving.state import StuckError
from pdjax.types import SLO, Completion, DeviceError, RayCluster, Request, SamplingParams
from pdjax.workload import Given, Refused, Row, outcomes, read_rows, write_completions

FLAGS = flags.FLAGS
_SHOWN = 12  # answers, and refused lines, that are printed
T = TypeVar('T')

_CONFIG = flags.DEFINE_string('config', None, 'The config file, with arguments of its get_config behind a colon.')
_SET = flags.DEFINE_multi_string('set', [], 'Overrides of the config, each field.of.config=value.')
_BACKEND = flags.DEFINE_enum('backend', 'engine', ['engine', 'simulator'], 'What carries the orders out.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for report.html, report.json, trace.json, events.jsonl.')
_PROMPT = flags.DEFINE_string('prompt', None, 'Serve this prompt instead of the workload, and print the answer.')
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 128, 'Most tokens of the answer to --prompt.')
_REQUESTS = flags.DEFINE_string('requests', None, 'Serve this file of requests instead of the workload.')
_GOODPUT = flags.DEFINE_string(
  'goodput', None, 'Latency limits in ms that goodput is counted against, "ttft:500 tpot:50".'
)
_CALIBRATE = flags.DEFINE_bool(
  'calibrate', False, 'Measure this machine before simulating, instead of trusting the config.'
)
_COMPARE = flags.DEFINE_bool('compare', False, 'Also run the colocated baseline on the same devices and workload.')
_RATES = flags.DEFINE_list('rates', None, 'With --compare: requests per second to try, "1,2,4".')
_SPLITS = flags.DEFINE_list('splits', None, 'With --compare: splits to try instead of the config\'s, "2P1D,1P2D".')
_BUDGETS = flags.DEFINE_list('budgets', None, 'With --compare: most tokens of a pass to try, "256,512".')
_FIGURE = flags.DEFINE_string('figure', None, 'Also draw the run as one picture: a file that ends in .svg or .png.')
_RAY_ADDRESS = flags.DEFINE_string(
  'ray_address', None, 'Run every worker in a process of its own on this Ray cluster, host:port or auto.'
)
_CACHE = flags.DEFINE_string('compilation_cache', None, 'Folder that keeps compiled programs from run to run.')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='replace')  # a terminal that lacks a character of an answer must not end the run
  try:
    code = _run(Console(highlight=False))
  except (ValueError, OSError, PolicyError, StuckError, DeviceError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)
  if code:
    sys.exit(code)


def _run(console: Console) -> int:
  """Do what the flags ask for; the exit code, which tells whether everyone was served."""
  config = _config()
  opened = launch.open_model(config)
  if _COMPARE.value:
    _compare(config, opened, console)
    return 0
  if _REQUESTS.value is not None:
    return _serve_file(config, opened, console)
  if _PROMPT.value is not None:
    sampling = SamplingParams(max_tokens=_MAX_TOKENS.value)
    prompt = opened.make_request('prompt', _PROMPT.value, sampling)
    config = dataclasses.replace(config, workload=Given((prompt,)))
  with Follow(console, config) as follow:
    result = _serve(config, opened, console, follow)
  _show_answers(console, result.completions, only_text=_PROMPT.value is not None)
  if _PROMPT.value is None:
    print_report(result.report, console)
  _draw(result, console)
  _show_workdir(console)
  return _exit_code(result.completions) if _PROMPT.value is not None else 0


def _serve(
  config: ServingConfig, opened: launch.OpenedModel, console: Console, watch: launch.Watch, notes: Sequence[str] = ()
) -> launch.RunResult:
  """Run the config on the backend that the flags choose."""
  if _BACKEND.value == 'engine':
    return launch.run(config, workdir=_WORKDIR.value, say=console.print, watch=watch, opened=opened, notes=notes)
  return launch.simulate(
    config, workdir=_WORKDIR.value, watch=watch, calibrate=_CALIBRATE.value, opened=opened, notes=notes
  )


def _serve_file(config: ServingConfig, opened: launch.OpenedModel, console: Console) -> int:
  """Serve the lines of a requests file; their answers are written whatever ends the run."""
  assert _REQUESTS.value is not None
  rows = _read(opened, _REQUESTS.value, config.seed)
  if _WORKDIR.value is None:
    raise ValueError('--requests writes its answers into the work directory; give one with --workdir.')
  launch.make_workdir(_WORKDIR.value)
  if not rows:
    console.print(f'{_REQUESTS.value} has no requests.', markup=False)
  requests = tuple(row.asked for row in rows if isinstance(row.asked, Request))
  num_refused = len(rows) - len(requests)
  notes = [f'{num_refused} of {len(rows)} lines were refused as they were read.'] if num_refused else []
  config = dataclasses.replace(config, workload=Given(requests))
  events: list[Event] = []
  result = None
  try:
    if requests:
      with Follow(console, config) as follow:

        def watch(event: Event) -> None:
          events.append(event)
          follow(event)

        result = _serve(config, opened, console, watch, notes)
  finally:  # also of a run that breaks down or is interrupted: what was answered is not lost
    has_text = opened.tokenizer is not None and _BACKEND.value == 'engine'
    ends = outcomes(rows, launch.complete(events, has_text) if result is None else result.completions)
    if events or not requests:
      write_completions(pathlib.Path(_WORKDIR.value) / 'requests.jsonl', ends)
  _show_answers(console, tuple(one for one in ends if isinstance(one, Completion)))
  refused = [one for one in ends if isinstance(one, Refused)]
  for one in refused[:_SHOWN]:
    console.print(f'{one.id} was refused: {one.error}', markup=False)
  if len(refused) > _SHOWN:
    console.print(f'and {len(refused) - _SHOWN} more lines were refused; requests.jsonl has all of them.', markup=False)
  if result is not None:
    print_report(result.report, console)
    _draw(result, console)
  _show_workdir(console)
  return _exit_code(ends)


def _exit_code(outcomes: Sequence[Completion | Refused]) -> int:
  """0 if all were served, 3 if some were, and 1 if none was."""
  served = [isinstance(one, Completion) and one.finish_reason in ('stop', 'length') for one in outcomes]
  return 0 if all(served) else 3 if any(served) else 1


def _compare(config: ServingConfig, opened: launch.OpenedModel, console: Console) -> None:
  """Run the config and the colocated baseline, and say who wins where."""
  compared = comparison.compare(
    config,
    backend='engine' if _BACKEND.value == 'engine' else 'simulator',
    rates=None if _RATES.value is None else _numbers('rates', _RATES.value, float),
    splits=_SPLITS.value,
    budgets=None if _BUDGETS.value is None else _numbers('budgets', _BUDGETS.value, int),
    workdir=_WORKDIR.value,
    say=lambda line: console.print(line, markup=False, soft_wrap=True),
    calibrate=_CALIBRATE.value,
    opened=opened,
  )
  console.print()
  comparison.print_comparison(compared, console)
  _show_workdir(console)


def _numbers(flag: str, texts: list[str], kind: Callable[[str], T]) -> list[T]:
  try:
    return [kind(text) for text in texts]
  except ValueError:
    raise ValueError(f'--{flag}={",".join(texts)} is not a list of numbers; write e.g. --{flag}=1,2,4.') from None


def _show_workdir(console: Console) -> None:
  if _WORKDIR.value is not None:
    names = sorted(path.name for path in pathlib.Path(_WORKDIR.value).iterdir())
    console.print(f'\nIn {_WORKDIR.value}: {", ".join(names)}', markup=False)


def _config() -> ServingConfig:
  """The run that the flags ask for.

  Raises:
    ValueError: if they contradict one another, or the config file, an override or a limit is wrong.
  """
  if _CONFIG.value is None:
    raise ValueError('--config is missing; give a config file, e.g. --config=configs/smollm2_cpu.py.')
  if _PROMPT.value is not None and _REQUESTS.value is not None:
    raise ValueError('--prompt and --requests are both given; give one of them.')
  if _PROMPT.value is not None and _BACKEND.value == 'simulator':
    raise ValueError('--prompt wants an answer, and the simulator gives none; use --backend=engine.')
  if _PROMPT.value is None and FLAGS['max_tokens'].present:
    raise ValueError('--max_tokens goes with --prompt; requests and workloads say it themselves.')
  if _RAY_ADDRESS.value is not None and _BACKEND.value == 'simulator':
    raise ValueError('--ray_address wants processes, and the simulator has none; use --backend=engine.')
  if _CALIBRATE.value and _BACKEND.value == 'engine':
    raise ValueError('--calibrate goes with --backend=simulator; the engine is measured anyway.')
  if _COMPARE.value and (_PROMPT.value is not None or _REQUESTS.value is not None):
    raise ValueError("--compare serves the config's workload; leave --prompt and --requests out.")
  for flag in ('rates', 'splits', 'budgets'):
    if FLAGS[flag].value is not None and not _COMPARE.value:
      raise ValueError(f'--{flag} goes with --compare; a single run takes it from the config.')
  if _FIGURE.value is not None and (_COMPARE.value or pathlib.Path(_FIGURE.value).suffix not in ('.svg', '.png')):
    raise ValueError(f'--figure={_FIGURE.value} wants a single run, and a name that ends in .svg or .png.')
  config = apply_overrides(load_config(_CONFIG.value), _SET.value)
  if _GOODPUT.value is not None:
    config = dataclasses.replace(config, slo=SLO.parse(_GOODPUT.value))
  if _RAY_ADDRESS.value is not None:
    processes = dataclasses.replace(config.processes or RayCluster(), address=_RAY_ADDRESS.value)
    config = dataclasses.replace(config, processes=processes)
  if _CACHE.value is not None:
    config = dataclasses.replace(config, compilation_cache=_CACHE.value)
  return config


def _read(opened: launch.OpenedModel, path: str, seed: int) -> list[Row]:
  if not pathlib.Path(path).exists() or pathlib.Path(path).is_dir():
    raise ValueError(f'requests file {path!r} is not a file; give one with a JSON object a line.')
  tokenizer = opened.tokenizer
  if tokenizer is None:
    return read_rows(path, vocab_size=opened.model.vocab_size, seed=seed)
  return read_rows(
    path,
    encode=tokenizer.encode,
    encode_chat=tokenizer.apply_chat_template,
    vocab_size=opened.model.vocab_size,
    seed=seed,
    chat_end_ids=opened.chat_end_ids,
  )


def _draw(result: launch.RunResult, console: Console) -> None:
  if _FIGURE.value is not None:
    console.print(f'\n{charts.save(charts.overview(result.report), _FIGURE.value)} is drawn', markup=False)


def _show_answers(console: Console, completions: tuple[Completion, ...], only_text: bool = False) -> None:
  for completion in completions[: None if only_text else _SHOWN]:
    if completion.error:
      console.print(f'{completion.request.id} {completion.finish_reason}: {completion.error}', markup=False)
    elif completion.text is not None:
      name = '' if only_text else f'{completion.request.id}: '
      console.print(f'{name}{completion.text.strip()}', markup=False)


class Follow:
  """Shows how many requests have ended and how many tokens came, while the run goes on."""

  def __init__(self, console: Console, config: ServingConfig):
    total = config.workload.num_requests if config.workload is not None else None
    columns = (TextColumn('serving'), BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[tokens]} tokens'))
    self._progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    self._task = self._progress.add_task('serving', total=total, tokens=0, start=False)
    self._tokens = 0
    self._begun = False

  def __enter__(self) -> 'Follow':
    return self

  def __exit__(self, *error: object) -> None:
    self._progress.stop()

  def __call__(self, event: Event) -> None:
    if not self._begun:
      self._begun = True
      self._progress.start()
      self._progress.start_task(self._task)
    match event:
      case Done(results=results) if results:
        self._tokens += sum(len(result.tokens) for result in results)
        self._progress.update(self._task, tokens=self._tokens)
      case Finished():
        self._progress.advance(self._task)


if __name__ == '__main__':
  app.run(main)
