"""The choice of a kernel's implementation and its parameters, by the caller's wish, the device and the shape."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from pallas_kernels import tuning
from pallas_kernels.devices import Device, current

_LOGGER = logging.getLogger('pallas_kernels')
_PLAIN = 'xla'  # what runs on any device, and is taken where nothing else can be
_CALLED = {'tpu': 'TPUs', 'gpu': 'GPUs', 'cpu': 'CPUs'}

Config = TypeVar('Config')


class Refused(ValueError):
  """None of the implementations that are wanted can run a problem."""


@dataclasses.dataclass(frozen=True)
class Plain:
  """An implementation that runs everywhere.

  `parameters` are arguments that it takes beside the kernel's own, by platform, unless the table has a row of its own
  for the device; on others it has its own defaults.
  """

  run: Callable[..., Any]
  parameters: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tuned(Generic[Config]):
  """An implementation for some platforms, with parameters, which may refuse a problem.

  On its `platforms` it is taken before plain XLA where nobody asks for another. `run` takes `config` and `device`
  beside the kernel's own arguments. `refusal(config, device, facts)` says why it cannot, or None, and is asked of such
  platforms alone. `rule(device, facts)` is what to take where no row of the table will do, and `shorten(config)` the
  same as a shorter program, where there is one.
  """

  run: Callable[..., Any]
  config: type[Config]
  rule: Callable[[Device, tuning.Facts], Config]
  refusal: Callable[[Config, Device, tuning.Facts], str | None]
  platforms: tuple[str, ...]
  shorten: Callable[[Config], Config] = lambda config: config


def choose(
  kernel: str,
  implementations: Mapping[str, Plain | Tuned],
  wanted: str | Sequence[str] | None,
  facts: tuning.Facts,
  device: Device | None = None,
) -> Callable[..., Any]:
  """The implementation to call.

  Args:
    kernel: Its name, for messages and for its table.
    implementations: All there are, by name.
    wanted: One of their names, which must run then; several, of which the first that can does; or None for the fastest.
    facts: The problem.
    device: To compile for; the current one if None.

  Raises:
    Refused: if none that is wanted can run, with the reason of each.
    ValueError: if a name is unknown.
  """
  device = device or current()
  left_out: frozenset[str] = frozenset()
  if wanted is None:
    own = (name for name, one in implementations.items() if isinstance(one, Tuned) and device.platform in one.platforms)
    wanted, left_out = (*own, _PLAIN), tuning.left_out()
  names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
  reasons: list[str] = []
  for name in names:
    if name not in implementations:
      raise ValueError(f'{kernel}: implementation {name!r} is unknown; there are {", ".join(implementations)}.')
    if name in left_out:
      reasons.append(f'{name}: {tuning.WITHOUT} leaves it out.')
      continue
    rows = tuple(row for row in tuning.load(kernel) if row.implementation == name)
    found = _parameters(implementations[name], rows, device, facts)
    if not isinstance(found, str):
      run, taken = found
      level = logging.INFO if len(names) > 1 else logging.DEBUG  # where there is one way there is nothing to tell
      _log(level, kernel, name, taken, device.name, tuple(facts.items()), tuple(reasons))
      return run
    reasons.append(f'{name}: {found}')
  raise Refused(f'{kernel} cannot run on {device.name} as asked for. {" ".join(reasons)}')


def _parameters(
  implementation: Plain | Tuned, rows: tuple[tuning.Row, ...], device: Device, facts: tuning.Facts
) -> tuple[Callable[..., Any], str] | str:
  """The function to call and the source of its parameters, or a reason against the implementation."""
  form = tuning.form()
  row = tuning.nearest(rows, device.name, facts, form)
  source = '' if row is None else 'of its row' if row[1] else f'of the row nearest, {dict(row[0].problem)}'
  if isinstance(implementation, Plain):
    taken = row[0].config if row is not None else implementation.parameters.get(device.platform)
    if not taken:
      return implementation.run, 'without parameters'
    said = ', '.join(f'{name}={value}' for name, value in taken.items())
    return functools.partial(implementation.run, **taken), f'{said} {source}'.rstrip()
  if device.platform not in implementation.platforms:
    made_for = ' and '.join(_CALLED.get(platform, platform) for platform in implementation.platforms)
    return f'it is for {made_for}, and this is {device.name}; on other devices take implementation=None or {_PLAIN!r}.'
  candidates = []
  preferred = ', small form' if form == 'small' else ''
  if row is not None:
    candidates.append((implementation.config(**row[0].config), source + preferred))
  config = implementation.rule(device, facts)
  candidates.append((implementation.shorten(config) if form == 'small' else config, 'by rule' + preferred))
  refusal: str | None = None
  passed_over = ''
  for config, source in candidates:
    refusal = implementation.refusal(config, device, facts)
    if refusal is None:
      run = functools.partial(implementation.run, config=config, device=device)
      return run, f'{config} {source}{passed_over}'
    passed_over += f', not {source}: {refusal}'
  assert refusal is not None
  return refusal


@functools.cache
def _log(level: int, kernel: str, name: str, taken: str, device: str, facts: tuple, reasons: tuple[str, ...]) -> None:
  """Say once what was taken for a problem, and what was not."""
  passed_over = f' (not {"; ".join(reasons)})' if reasons else ''
  problem = ', '.join(f'{name} {value}' for name, value in facts)
  _LOGGER.log(level, '%s on %s takes %s, %s, for %s%s', kernel, device, name, taken, problem, passed_over)
