r"""Run a config on the engine or the simulator and print its report.

python -m experiments.run --config=configs/smollm2_cpu.py --workdir=runs/demo
python -m experiments.run --config=configs/smollm2_cpu.py --set=policy.decode_steps=1 --goodput "ttft:500 tpot:50"
python -m experiments.run --config=configs/smollm2_cpu.py --policy=my.py:Mine
python -m experiments.run --config=configs/smollm2_cpu.py --prompt="What is the capital of France?"
python -m experiments.run --config=configs/smollm2_cpu.py --requests=requests.jsonl --workdir=out
python -m experiments.run --resume=out
python -m experiments.run --config=configs/smollm2_ray.py --ray_address=10.0.0.1:6379
python -m experiments.run --config=configs/llama3_8b_simulated.py --backend=simulator
python -m experiments.run --config=configs/llama3_8b_simulated.py --backend=simulator --trace=conversation.jsonl \
    --set=prefix_cache.block_tokens=16
python -m experiments.run --config=configs/llama3_8b_simulated.py --backend=simulator --workdir=out \
    --compare --rates=8,16,24,32 --splits=2P1D,1P2D --budgets=128,256,512

With --workdir a run leaves `report.html`, one page to open in a browser, `trace.json` for ui.perfetto.dev,
`report.json`, `metrics.prom` and `events.jsonl`. --log=summary leaves out `events.jsonl`, --log=off the report's files
as well; answers are written all the same. Events of fewer than 20,000 requests stay in memory, of more only their
summary, and with more than 200,000 steps and transfers there is no `trace.json`. With --compare the same workload also
runs colocated on the same devices, either side with several sizes of a step, and the page and `compare.json` say who
wins where; `pdjax/comparison/` says how. What an earlier run left in the folder is moved to one beside it, `out.1` or
the next number; nothing is overwritten.

With --trace, a recorded trace is replayed (`pdjax/workload/traces.py` names the formats), `--set=workload.rate=2` twice
as fast; a prefix cache finds what its prompts share, by their ids of blocks, on either backend.

With --requests, each line of the file is served and `requests.jsonl` in the work directory says what became of it, in
the same order; `pdjax/workload/requests_file.py` documents both formats. Without, it has the requests of the workload
as they arrived (a simulated workload has no answers). A line that cannot be served keeps no other from it.

Answers outlive the run: `answers.jsonl` grows as requests end, at most a second behind (`pdjax/answers.py`), and after
a signal, an error or a full disk `requests.jsonl` and the report are made of what there is. --resume=DIR goes on with
the run in a folder: it serves what has no answer of `stop` or `length` there, the first of it at once and the others
in their spacing, and then `requests.jsonl` has all. The command's options are known from `run.json`; they may be given
anew, but another config is refused with the difference. The file of requests may have got other lines: a line is
answered if its id, its prompt, its seed and its sampling are those of an answer. What the earlier part left, its log
and report, is in `before-1`.

The exit code is 0 if all requests were served, 3 if some were, 1 if none was, if the options are wrong or a result
could not be written, and after SIGINT, SIGTERM and SIGHUP 130, 143 and 129. A second signal ends the command at once.
"""

import sys

if __name__ == '__main__':  # until all the rest is there, which takes a second
  sys.excepthook = lambda kind, error, trace: (
    print('stopped by SIGINT: nothing was served', file=sys.stderr)
    if kind is KeyboardInterrupt
    else sys.__excepthook__(kind, error, trace)
  )

import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import signal
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from absl import app, flags, logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.load_config import load_config, load_policy
from experiments.stop_signals import StopSignals
from pdjax import comparison, launch
from pdjax.answers import Answers
from pdjax.config import KEEP_NO_PROGRAMS, ServingConfig
from pdjax.metrics import charts, print_report
from pdjax.metrics.run_log import LogName
from pdjax.opened_model import OpenedModel, open_model
from pdjax.overrides import apply_overrides
from pdjax.recording import RunResult
from pdjax.run_folder import (
  ANSWERS,
  BASELINE,
  CASES,
  EVENTS,
  FILES,
  REQUESTS,
  TRACEBACK,
  RunFolder,
  open_folder,
  read_run,
)
from pdjax.serving import StuckError
from pdjax.serving.checks import PolicyError
from pdjax.serving.events import Delivered, Event, Finished, WorkerBack, WorkerLost
from pdjax.types import SLO, Completion, DeviceError, RayCluster, Request, SamplingParams
from pdjax.workload import Given, Refused, Row, TraceWorkload, outcomes, read_rows

FLAGS = flags.FLAGS
_SHOWN = 12  # answers, and refused lines, that are printed
T = TypeVar('T')

_CONFIG = flags.DEFINE_string('config', None, 'The config file, with arguments of its get_config behind a colon.')
_POLICY = flags.DEFINE_string('policy', None, "A policy of your own instead of the config's, FILE.py:NAME.")
_SET = flags.DEFINE_multi_string('set', [], 'Overrides of the config, each field.of.config=value.')
_BACKEND = flags.DEFINE_enum('backend', 'engine', ['engine', 'simulator'], 'What carries the orders out.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder for answers, report.html, report.json, trace.json, events.jsonl.'
)
_RESUME = flags.DEFINE_string('resume', None, 'Go on with the run in this work directory: serve what is not answered.')
_PROMPT = flags.DEFINE_string('prompt', None, 'Serve this prompt instead of the workload, and print the answer.')
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 128, 'Most tokens of the answer to --prompt.')
_REQUESTS = flags.DEFINE_string('requests', None, 'Serve this file of requests instead of the workload.')
_TRACE = flags.DEFINE_string('trace', None, 'Replay this recorded trace instead of the workload.')
_GOODPUT = flags.DEFINE_string(
  'goodput', None, 'Latency limits in ms that goodput is counted against, "ttft:500 tpot:50".'
)
_LOG = flags.DEFINE_enum(
  'log',
  'full',
  ['full', 'summary', 'off'],
  'What --workdir gets: events and report, the report alone, or only answers.',
)
_CALIBRATE = flags.DEFINE_bool(
  'calibrate', False, 'Measure this machine before simulating, instead of trusting the config.'
)
_COMPARE = flags.DEFINE_bool('compare', False, 'Also run the colocated baseline on the same devices and workload.')
_RATES = flags.DEFINE_list('rates', None, 'With --compare: requests per second to try, "1,2,4".')
_SPLITS = flags.DEFINE_list('splits', None, 'With --compare: splits to try instead of the config\'s, "2P1D,1P2D".')
_BUDGETS = flags.DEFINE_list('budgets', None, 'With --compare: most tokens of a step to try, "256,512".')
_FIGURE = flags.DEFINE_string('figure', None, 'Also draw the run as one picture: a file that ends in .svg or .png.')
_RAY_ADDRESS = flags.DEFINE_string(
  'ray_address', None, 'Run every worker in a process of its own on this Ray cluster, host:port or auto.'
)
_CACHE = flags.DEFINE_string('compilation_cache', None, 'Folder that keeps compiled programs from run to run.')


# What `run.json` keeps of the command, for --resume.
_KEPT = (
  'config', 'policy', 'set', 'backend', 'requests', 'trace', 'prompt', 'max_tokens', 'goodput', 'calibrate',
  'ray_address', 'compilation_cache', 'log',
)  # fmt: skip
_PATHS = ('config', 'policy', 'requests', 'trace', 'compilation_cache')
_EXPECTED = (OSError, PolicyError, StuckError, DeviceError)  # their messages say all, as those of a ValueError at first


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='replace')  # a terminal that lacks a character of an answer must not end the run
  with StopSignals() as signals:
    try:
      code = _run(_Screen(highlight=False), signals)
    except BaseException as error:  # before anything was served
      code = _tell_end(error, signals, '')
    _flush()
    if code:
      sys.exit(code)


def _run(console: Console, signals: StopSignals) -> int:
  """Do what the flags ask for; the exit code, which tells whether everyone was served."""
  if _RESUME.value is not None:
    _take_up_flags(_RESUME.value)
  config = _config()
  opened = open_model(config)
  if _COMPARE.value:
    return _compare(config, opened, console, signals)
  rows = None
  if _REQUESTS.value is not None:
    rows = _read(opened, _REQUESTS.value, config.seed)
    if _WORKDIR.value is None:
      raise ValueError('--requests writes its answers into the work directory; give one with --workdir.')
    config = dataclasses.replace(config, workload=Given(_requests(rows)))
  elif _PROMPT.value is not None:
    sampling = SamplingParams(max_tokens=_MAX_TOKENS.value)
    prompt = opened.make_request('prompt', _PROMPT.value, sampling)
    config = dataclasses.replace(config, workload=Given((prompt,)))
  with _folder(config, rows, console) as folder:
    return _Run(config, opened, folder, rows, console, signals).serve()


def _requests(rows: Sequence[Row]) -> tuple[Request, ...]:
  return tuple(row.asked for row in rows if isinstance(row.asked, Request))


class _Run:
  """Serves a config's workload; whatever ends that, its answers are written and its end is told in a line."""

  def __init__(
    self,
    config: ServingConfig,
    opened: OpenedModel,
    folder: RunFolder | None,
    rows: list[Row] | None,
    console: Console,
    signals: StopSignals,
  ):
    self._config = config
    self._opened = opened
    self._folder = folder
    self._rows = rows
    self._console = console
    self._signals = signals
    on_engine = _BACKEND.value == 'engine'
    path = None if folder is None or not (on_engine or rows is not None) else folder.path / ANSWERS
    earlier = None if folder is None else folder.answered
    self._answers = Answers(on_engine and opened.tokenizer is not None, path, earlier, closed=self._write)
    self._leaves_answers = self._leaves_requests = path is not None
    self._goes_on = False  # whether there is a run in the folder that this one goes on with

  def serve(self) -> int:
    """Serve what is not answered yet; the exit code."""
    result, error = None, None
    try:
      if self._is_left():
        result = self._launch()
    except BaseException as raised:  # told once what was answered is written
      error = raised
    self._signals.hold()
    if error is not None:
      self._signals.note(error)
    if error is not None and not self._answers.began and self._signals.received is None:
      self._leaves_requests = self._goes_on  # otherwise there is nothing to tell but the error
    self._answers.close()
    ends = self._outcomes()
    if error is not None:
      is_refused = self._folder is not None and self._folder.resumed and not self._goes_on
      told = '' if is_refused else self._told(ends)
      code = _tell_end(error, self._signals, told, self._folder, self._answers.began)
      return 3 if code == 1 and any(map(_is_served, ends)) else code
    self._show(ends, result)
    if self._signals.received is not None:  # while this was written and shown
      _tell_stop(self._signals.received, self._told(ends))
    if self._answers.unwritten or (result is not None and result.unwritten):
      return self._signals.exit_code or 1
    return self._signals.exit_code or _exit_code(map(_is_served, ends))

  def _is_left(self) -> bool:
    """Whether anything is to be served.

    Raises:
      ValueError: if a run goes on with a file of requests of which no line was answered, though others were.
    """
    assert self._config.workload is not None
    if self._folder is None or not self._folder.resumed:
      return self._rows is None or self._config.workload.num_requests > 0
    self._answers.expect(self._opened.known_requests(self._config))
    arrivals = self._answers.left(self._opened.arrivals(self._config))
    if self._rows is not None and self._answers.has_earlier and not self._answers.num_earlier:
      raise ValueError(
        f'no answer in {self._folder.path} is to what is asked now (a line without an id has that of its row); give '
        'the requests that the run began with, or begin a new run in another workdir.'
      )
    self._goes_on = True
    self._tell_changes()
    if arrivals.closed:
      self._console.print(f'Nothing is left: {self._folder.path} has the answers to all requests.', markup=False)
      if missing := [name for name in ('report.json', 'report.html') if not (self._folder.path / name).is_file()]:
        why = f'{EVENTS} has what they are made of' if (self._folder.path / EVENTS).is_file() else 'it had no events'
        self._console.print(f'The run ended before it had written {" and ".join(missing)}; {why}.', markup=False)
      return False
    return True

  def _tell_changes(self) -> None:
    """Say what of a file of requests is another than when the run began, and keep which it is now."""
    assert self._folder is not None
    requests = _of_requests(self._rows)
    now = {'command': _command(), 'requests': requests}
    if requests is None or all(self._folder.run.get(name) == value for name, value in now.items()):
      return
    if self._folder.run.get('requests') != requests:
      self._console.print(
        f'{_REQUESTS.value} is not what it was when the run in {self._folder.path} began: lines that have an answer '
        'there keep it, all others are served.',
        markup=False,
      )
    self._folder.keep(now)
    if self._answers.num_unasked:
      noun = 'answer' if self._answers.num_unasked == 1 else 'answers'
      self._console.print(
        f'{self._answers.num_unasked} {noun} in {ANSWERS} are to lines that are not asked any more.', markup=False
      )

  def _launch(self) -> RunResult:
    """Run on the backend that the flags choose."""
    with Follow(self._console, self._config, self._answers.num_earlier) as follow:
      if _BACKEND.value == 'engine':
        return launch.run(
          self._config, workdir=self._folder, say=self._console.print, watch=follow, opened=self._opened,
          notes=self._notes(), answers=self._answers, over=self._signals.hold, log=_log(),
        )  # fmt: skip
      return launch.simulate(
        self._config, workdir=self._folder, watch=follow, calibrate=_CALIBRATE.value, opened=self._opened,
        notes=self._notes(), answers=self._answers, over=self._signals.hold, log=_log(),
      )  # fmt: skip

  def _notes(self) -> list[str]:
    if self._rows is None:
      return []
    num_refused = sum(isinstance(row.asked, Refused) for row in self._rows)
    return [f'{num_refused} of {len(self._rows)} lines were refused as they were read.'] if num_refused else []

  def _outcomes(self) -> Sequence[Completion | Refused]:
    """The outcome of everyone, in the order of the file or of arrival."""
    return self._answers.everyone if self._rows is None else outcomes(self._rows, self._answers.everyone)

  def _write(self, everyone: Sequence[Completion]) -> str | None:
    """Make `requests.jsonl` as soon as no more answers come; why it cannot be made, if so."""
    if self._folder is None or not self._leaves_requests:
      return None
    problem = self._folder.write_requests(self._outcomes())
    if problem is not None:
      _say_error(f'error: {problem}')
    return problem

  def _told(self, ends: Sequence[Completion | Refused]) -> str:
    """The sentence behind the cause of an early end."""
    assert self._config.workload is not None
    num_served, num_asked = sum(map(_is_served, ends)), len(ends)
    if self._rows is None:  # those that had not come yet have no end
      num_asked = max(num_asked, self._config.workload.num_requests)
    noun = 'samples' if any(isinstance(one, Completion) and one.request.sample_of for one in ends) else 'requests'
    told = f'{num_served} of {num_asked} {noun} were served' if num_served else 'nothing was served'
    if self._folder is None or not self._leaves_answers or num_served == num_asked:
      return told
    return f'{told}, --resume={self._folder.path} goes on'

  def _show(self, ends: Sequence[Completion | Refused], result: RunResult | None) -> None:
    """Print answers, refusals and figures."""
    _show_answers(self._console, (one for one in ends if isinstance(one, Completion)), _PROMPT.value is not None)
    refused = [] if self._rows is None else [one for one in ends if isinstance(one, Refused)]
    for one in refused[:_SHOWN]:
      self._console.print(f'{one.id} was refused: {one.error}', markup=False)
    if len(refused) > _SHOWN:
      left = len(refused) - _SHOWN
      self._console.print(f'and {left} more lines were refused; {REQUESTS} has all of them.', markup=False)
    if result is not None:
      if _PROMPT.value is None:
        print_report(result.report, self._console)
      _draw(result, self._console)
    _show_workdir(self._console)


def _folder(
  config: ServingConfig, rows: list[Row] | None, console: Console
) -> contextlib.AbstractContextManager[RunFolder | None]:
  """The work directory, if there is to be one, ready to be written into."""
  if _WORKDIR.value is None:
    return contextlib.nullcontext()
  more: dict[str, Any] = {'command': _command()}
  if _FIGURE.value is not None:
    figure, workdir = (pathlib.Path(os.path.abspath(one)) for one in (_FIGURE.value, _WORKDIR.value))
    if figure.is_relative_to(workdir):
      more['more_files'] = [figure.relative_to(workdir).as_posix()]
  serves = "the config's workload"
  if _REQUESTS.value is not None and rows is not None:
    asked = pathlib.Path(_REQUESTS.value)
    if asked.name in FILES and asked.parent.resolve() == pathlib.Path(_WORKDIR.value).resolve():
      raise ValueError(
        f'the requests file {str(asked)!r} is where the run is to write; rename it or give another --workdir.'
      )
    if _RESUME.value is None and (about := _of_requests(rows)) is not None:
      more['requests'] = about
    serves = 'a file of requests'
  elif _COMPARE.value:
    serves, more['more_files'] = 'a comparison', [BASELINE]
  elif _PROMPT.value is not None:
    serves = f'the prompt {_PROMPT.value!r}'
  folder = open_folder(
    _WORKDIR.value, config, _BACKEND.value, resume=_RESUME.value is not None, serves=serves, more=more,
    say=lambda line: console.print(line, markup=False, soft_wrap=True),
  )  # fmt: skip
  return contextlib.closing(folder)


def _of_requests(rows: list[Row] | None) -> dict[str, Any] | None:
  """The entry of `run.json` for a file of requests; a pipe has none, as nothing is left of it to look at."""
  if rows is None or _REQUESTS.value is None or not pathlib.Path(_REQUESTS.value).is_file():
    return None
  return {'sha256': hashlib.sha256(pathlib.Path(_REQUESTS.value).read_bytes()).hexdigest(), 'num_lines': len(rows)}


def _command() -> dict[str, Any]:
  """The entry of `run.json` for the command."""
  return {name: _kept(name) for name in _KEPT}


def _kept(name: str) -> Any:
  """The value of a flag in `run.json`: paths from the root, as the run may go on from another folder."""
  value = FLAGS[name].value
  if name not in _PATHS or value is None or value == KEEP_NO_PROGRAMS or '://' in value:
    return value
  path, colon, arguments = value.partition('.py:')
  return f'{os.path.abspath(path)}{colon}{arguments}'


def _take_up_flags(folder: str) -> None:
  """Give every flag that the command leaves out the value that it had when the run in a folder began."""
  if _WORKDIR.value is not None and os.path.abspath(_WORKDIR.value) != os.path.abspath(folder):
    raise ValueError(
      f'--resume={folder} goes on in that folder, and --workdir={_WORKDIR.value} is another; leave it out.'
    )
  if _COMPARE.value:
    raise ValueError('--resume goes on with a single run; begin a comparison again.')
  run = read_run(folder)
  command = run.get('command') or {}
  serves = run.get('serves')
  if serves == 'a comparison':
    raise ValueError(f'the run in {folder!r} is a comparison, which does not go on; begin it again.')
  if serves == 'what is submitted':
    raise ValueError(f'the run in {folder!r} was a session, which does not go on; begin another one.')
  if not command:
    raise ValueError(
      f'the run in {folder!r} was begun from Python; go on with pdjax.run(config, workdir={folder!r}, resume=True).'
    )
  if FLAGS['prompt'].present and command.get('requests') is not None:
    raise ValueError(f'the run in {folder!r} serves a file of requests; leave --prompt out.')
  for name in _KEPT:
    if not FLAGS[name].present and command.get(name) is not None:
      FLAGS[name].value = command[name]
  FLAGS['workdir'].value = folder
  if _BACKEND.value == 'simulator' and _REQUESTS.value is None:
    raise ValueError(f'the run in {folder!r} was a simulation without a file of requests, which leaves no answers.')


def _tell_end(
  error: BaseException, signals: StopSignals, more: str, folder: RunFolder | None = None, serving: bool = False
) -> int:
  """Say in one line what ended the command early; the exit code."""
  signals.note(error)
  if signals.received is not None or isinstance(error, KeyboardInterrupt):
    stopped_by = signals.received or signal.SIGINT
    _tell_stop(stopped_by, more)
    return 128 + stopped_by
  if isinstance(error, SystemExit) and not serving:
    raise error
  text = ' '.join(str(error).split('\n')).strip()
  if not isinstance(error, _EXPECTED if serving else (ValueError, *_EXPECTED)):
    text = f'{type(error).__name__}: {text}{_place(error, folder)}'
  _say_error(f'error: {text}{more and f" ({more})"}')
  return 1


def _tell_stop(stopped_by: signal.Signals, more: str) -> None:
  _say_error(f'stopped by {stopped_by.name}{more and f": {more}"}')


def _say_error(line: str) -> None:
  """Print a line to stderr; where that is a file on a full disk, there is nobody to tell."""
  with contextlib.suppress(OSError):
    print(line, file=sys.stderr, flush=True)


def _place(error: BaseException, folder: RunFolder | None) -> str:
  """The line that raised an unforeseen error, such as one of a policy, and where to read more."""
  lines = ''.join(traceback.format_exception(error))
  logging.debug('%s', lines)
  frame = traceback.extract_tb(error.__traceback__)[-1]
  more = '--verbosity=1 shows the traceback'
  if folder is not None:
    with contextlib.suppress(OSError):
      (folder.path / TRACEBACK).write_text(lines, encoding='utf-8')
      more = f'{folder.path / TRACEBACK} has the traceback'
  return f' ({frame.filename}, line {frame.lineno}; {more})'


def _is_served(one: Completion | Refused) -> bool:
  return isinstance(one, Completion) and one.served


def _exit_code(served: Iterable[bool]) -> int:
  """0 if all were served, 3 if some were, and 1 if none was."""
  served = list(served)
  return 0 if all(served) else 3 if any(served) else 1


def _compare(config: ServingConfig, opened: OpenedModel, console: Console, signals: StopSignals) -> int:
  """Run the config and the colocated baseline, and say who wins where; the exit code."""
  rates = None if _RATES.value is None else _numbers('rates', _RATES.value, float)
  budgets = None if _BUDGETS.value is None else _numbers('budgets', _BUDGETS.value, int)
  with _folder(config, None, console) as folder:
    path = None if folder is None else folder.path
    try:
      compared = comparison.compare(
        config,
        backend='engine' if _BACKEND.value == 'engine' else 'simulator',
        rates=rates,
        splits=_SPLITS.value,
        budgets=budgets,
        workdir=path,
        say=lambda line: console.print(line, markup=False, soft_wrap=True),
        calibrate=_CALIBRATE.value,
        opened=opened,
        over=signals.hold,
        log='full' if _LOG.value == 'full' else 'summary',
      )
    except BaseException as error:
      ended = None if path is None or not (path / CASES).is_file() else path / CASES
      return _tell_end(error, signals, f'{ended} has the cases that had ended' if ended else '', folder)
    console.print()
    comparison.print_comparison(compared, console)
    _show_workdir(console)
    code = _exit_code(served for case in compared.cases for served in case.outcomes.completed)
    return signals.exit_code or (1 if compared.unwritten else code)


def _numbers(flag: str, texts: list[str], kind: Callable[[str], T]) -> list[T]:
  try:
    return [kind(text) for text in texts]
  except ValueError:
    raise ValueError(f'--{flag}={",".join(texts)} is not a list of numbers; write e.g. --{flag}=1,2,4.') from None


def _show_workdir(console: Console) -> None:
  if _WORKDIR.value is not None:
    names = sorted(path.name for path in pathlib.Path(_WORKDIR.value).iterdir())
    console.print(f'\nIn {_WORKDIR.value}: {", ".join(names)}', markup=False)


def _log() -> LogName:
  return 'full' if _LOG.value == 'full' else 'summary' if _LOG.value == 'summary' else 'off'


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
  if _COMPARE.value and _LOG.value == 'off':
    raise ValueError('--log=off leaves answers alone, and --compare has none; use --log=summary.')
  if FLAGS['log'].present and _WORKDIR.value is None:
    raise ValueError(f'--log={_LOG.value} says what --workdir gets, and there is none; give --workdir too.')
  for flag in ('rates', 'splits', 'budgets'):
    if FLAGS[flag].value is not None and not _COMPARE.value:
      raise ValueError(f'--{flag} goes with --compare; a single run takes it from the config.')
  if _FIGURE.value is not None and (_COMPARE.value or pathlib.Path(_FIGURE.value).suffix not in ('.svg', '.png')):
    raise ValueError(f'--figure={_FIGURE.value} wants a single run, and a name that ends in .svg or .png.')
  if _TRACE.value is not None and (_PROMPT.value is not None or _REQUESTS.value is not None):
    raise ValueError('--trace replaces the workload, as --prompt and --requests do; give one of them.')
  config = load_config(_CONFIG.value)
  if _TRACE.value is not None:
    config = dataclasses.replace(config, workload=TraceWorkload(path=_TRACE.value))
  if _POLICY.value is not None:
    config = dataclasses.replace(config, policy=load_policy(_POLICY.value))
  config = apply_overrides(config, _SET.value)
  if _GOODPUT.value is not None:
    config = dataclasses.replace(config, slo=SLO.parse(_GOODPUT.value))
  if _RAY_ADDRESS.value is not None:
    processes = dataclasses.replace(config.processes or RayCluster(), address=_RAY_ADDRESS.value)
    config = dataclasses.replace(config, processes=processes)
  if _CACHE.value is not None:
    config = dataclasses.replace(config, compilation_cache=_CACHE.value)
  return config


def _read(opened: OpenedModel, path: str, seed: int) -> list[Row]:
  if not pathlib.Path(path).exists() or pathlib.Path(path).is_dir():
    raise ValueError(f'requests file {path!r} is not a file; give one with a JSON object a line.')
  tokenizer = opened.tokenizer
  rows = read_rows(
    path,
    encode=None if tokenizer is None else tokenizer.encode,
    encode_chat=None if tokenizer is None else tokenizer.apply_chat_template,
    vocab_size=opened.model.vocab_size,
    seed=seed,
    chat_end_ids=() if tokenizer is None else opened.chat_end_ids,
  )
  if not rows:
    raise ValueError(f'requests file {path!r} has no requests, expected a JSON object a line, e.g. {{"prompt": "Hi"}}.')
  return rows


def _draw(result: RunResult, console: Console) -> None:
  if _FIGURE.value is not None:
    console.print(f'\n{charts.save(charts.overview(result.report), _FIGURE.value)} is drawn', markup=False)


def _show_answers(console: Console, completions: Iterable[Completion], only_text: bool = False) -> None:
  for completion in itertools.islice(completions, None if only_text else _SHOWN):
    if completion.error:
      console.print(f'{completion.request.id} {completion.finish_reason}: {completion.error}', markup=False)
    elif completion.text is not None:
      name = '' if only_text else f'{completion.request.id}: '
      console.print(f'{name}{completion.text.strip()}', markup=False)


class _Screen(Console):
  """A console whose reader may be gone, or its disk full: a run goes on without being seen."""

  def print(self, *args: Any, **kwargs: Any) -> None:
    with contextlib.suppress(OSError):
      super().print(*args, **kwargs)

  def on_broken_pipe(self) -> None:
    self.quiet = True


def _flush() -> None:
  """Have what was printed on its way; where that cannot be, let Python not try again as it ends."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Follow:
  """Shows how many requests have ended and how many tokens came, while the run goes on."""

  def __init__(self, console: Console, config: ServingConfig, already: int = 0):
    total = config.workload.num_requests if config.workload is not None else None
    columns = (TextColumn('serving'), BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[tokens]} tokens'))
    self._progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    self._task = self._progress.add_task('serving', total=total, tokens=0, start=False, completed=already)
    self._console = console
    self._tokens = 0
    self._begun = False

  def __enter__(self) -> 'Follow':
    return self

  def __exit__(self, *error: object) -> None:
    with contextlib.suppress(OSError):
      self._progress.stop()

  def __call__(self, event: Event) -> None:
    if not self._begun:
      self._begun = True
      with contextlib.suppress(OSError):
        self._progress.start()
      self._progress.start_task(self._task)
    match event:
      case Delivered():
        self._tokens += event.num_tokens
        self._progress.update(self._task, tokens=self._tokens)
      case Finished():
        self._progress.advance(self._task)
      case WorkerLost(worker, _, error, returning):
        then = 'another process takes its place' if returning else 'it serves nobody until it is back'
        self._console.print(f'{worker} is lost ({error}); {then}', markup=False, soft_wrap=True)
      case WorkerBack(worker):
        self._console.print(f'{worker} is back', markup=False)


if __name__ == '__main__':
  app.run(main)
