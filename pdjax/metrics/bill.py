"""The chips of a cluster, and what its answers cost in dollars and energy."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from pdjax.metrics.numbers import number
from pdjax.metrics.stats import ratio
from pdjax.types.hardware import ChipSpec

_HOUR_S = 3600.0


@dataclasses.dataclass(frozen=True)
class Chips:
  """The chips of a cluster. Prices and powers are known where every chip in use has them, and never guessed.

  Attributes:
    by_worker: The name of each worker's chip, as far as it is known.
    counts: Chips in use by name, those that workers share counted once; empty if not all are known.
    dollars_per_hour: The price of all of them.
    watts: The power of all of them.
  """

  by_worker: Mapping[str, str] = dataclasses.field(default_factory=dict)
  counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
  dollars_per_hour: float | None = None
  watts: float | None = None

  @classmethod
  def of(cls, chips: Mapping[str, ChipSpec | None], devices: Mapping[str, Sequence[Hashable]]) -> 'Chips':
    """Count the chips of workers.

    Args:
      chips: The chip of each worker; None is not known.
      devices: The devices of each, of which two may name the same.
    """
    by_worker = {name: chip.name for name, chip in chips.items() if chip is not None}
    in_use: dict[Hashable, ChipSpec | None] = {device: chips[name] for name in chips for device in devices[name]}
    known = [chip for chip in in_use.values() if chip is not None]
    if not known or len(known) < len(in_use):
      return cls(by_worker)
    counts: dict[str, int] = {}
    for chip in known:
      counts[chip.name] = counts.get(chip.name, 0) + 1

    def total(of: Callable[[ChipSpec], float | None]) -> float | None:
      found = [amount for amount in map(of, known) if amount is not None]
      return sum(found) if len(found) == len(known) else None

    return cls(by_worker, counts, total(lambda chip: chip.dollars_per_hour), total(lambda chip: chip.watts))

  def label(self, worker: str) -> str:
    """The name of a worker, with that of its chip where not all workers have the same."""
    chip = self.by_worker.get(worker)
    return worker if chip is None or len(set(self.by_worker.values())) == 1 else f'{worker} ({chip})'


@dataclasses.dataclass(frozen=True)
class Bill:
  """The cost of the answers of a run. A figure is None unless every chip in use has what it takes.

  Attributes:
    chips: The chips.
    dollars_per_million_tokens: Dollars for a million delivered tokens.
    goodput_per_dollar: Requests within their limits that a dollar buys; None without limits too.
    joules_per_token: Energy of a delivered token, at the power that the chips are said to draw.
  """

  chips: Chips = Chips()
  dollars_per_million_tokens: float | None = None
  goodput_per_dollar: float | None = None
  joules_per_token: float | None = None

  @classmethod
  def of(cls, chips: Chips, tokens: int, goodput: float | None, seconds: float) -> 'Bill':
    """The bill of so many delivered tokens and so many good requests a second, after so many seconds."""
    price, watts = chips.dollars_per_hour, chips.watts
    return cls(
      chips,
      dollars_per_million_tokens=None if price is None else ratio(1e6 * price * seconds / _HOUR_S, tokens),
      goodput_per_dollar=None if price is None or goodput is None else ratio(goodput * _HOUR_S, price),
      joules_per_token=None if watts is None else ratio(watts * seconds, tokens),
    )

  def to_json(self) -> dict[str, Any]:
    """Its figures, and those of the chips."""
    return {
      'chips': self.chips.by_worker,
      'dollars_per_hour': self.chips.dollars_per_hour,
      'watts': self.chips.watts,
      'dollars_per_million_tokens': self.dollars_per_million_tokens,
      'goodput_per_dollar': self.goodput_per_dollar,
      'joules_per_token': self.joules_per_token,
    }

  def rows(self) -> Iterator[tuple[str, str]]:
    """The figures that are known, each with its name."""
    for name, count in self.chips.counts.items():
      yield f'{name} chips', f'{count:,}'
    if self.chips.dollars_per_hour is not None:
      yield 'price', f'${number(self.chips.dollars_per_hour, 2)}/h'
      if self.dollars_per_million_tokens is not None:
        yield 'price per 1M tokens', f'${number(self.dollars_per_million_tokens, 2)}'
      if self.goodput_per_dollar is not None:
        yield 'goodput per dollar', f'{number(self.goodput_per_dollar)} req'
    if self.chips.watts is not None:
      yield 'power', f'{number(self.chips.watts, 0)} W'
      if self.joules_per_token is not None:
        yield 'energy per token', f'{number(self.joules_per_token, 2)} J'

  def line(self) -> str:
    """The same but the chips in a line; empty if nothing is known."""
    skipped = len(self.chips.counts)
    return ', '.join(f'{name} {figure}' for name, figure in itertools.islice(self.rows(), skipped, None))
