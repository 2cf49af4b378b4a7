"""The winners at each rate, in words made of contests."""

import math
from collections.abc import Iterator, Mapping, Sequence

from pdjax.comparison.contest import Case, Contest
from pdjax.metrics.wording import listed, per_second, plain

Contests = Mapping[float, Mapping[str, Sequence[Contest]]]  # by rate and split, each in the same order


def at_one_rate(ours: Case, theirs: Case, results: Sequence[Contest]) -> str:
  """The winner of each figure at one rate, and the figures without a clear difference, in sentences."""
  split, devices = ours.system.division, ours.system.devices
  place = f'on the same {devices} device{"" if devices == 1 else "s"}, '
  start = place[0].upper() + place[1:] if math.isinf(ours.rate) else f'At {per_second(ours.rate)}, {place}'
  completed = [case.outcomes.completed for case in (ours, theirs)]
  both = int((completed[0] & completed[1]).sum())
  if not any(seen.any() for seen in completed):
    return f'{start}neither {split} nor the best colocated system completed a request.'
  if not any(one.judged for one in results):
    return f'{start}{len(completed[0]):,} requests are too few to tell {split} and the best colocated system apart.'
  wins = [str(one) for one in results if one.winner == split]
  losses = [str(one) for one in results if one.winner not in (split, None)]
  even = [one.figure for one in results if one.winner is None and one.judged]
  more = f' No clear difference in {listed(even)}.' if even and (wins or losses) else ''
  for name, seen in zip((split, 'the best colocated system'), completed, strict=True):
    if not seen.any():
      more += f' {name[0].upper()}{name[1:]} completed no request, so its latencies are unknown.'
  if all(seen.any() for seen in completed) and (completed[0] != completed[1]).any():
    more += f' Latencies are those of the {both:,} requests that both completed.'
  if not wins and not losses:
    said = f'{split} and the best colocated system are alike: no figure differs by more than chance and 1 %'
  elif wins and losses:
    said = f'{split} wins on {listed(wins)}, and the best colocated system on {listed(losses)}'
  elif wins:
    said = f'{split} wins on {listed(wins)}; the best colocated system wins on nothing'
  else:
    said = f'the best colocated system wins on {listed(losses)}; {split} wins on nothing'
  return f'{start}{said}.{more}'


def over_rates(contests: Contests) -> Iterator[str]:
  """For each figure, the rates at which each split or the baseline is ahead; nothing of a single rate."""
  if len(contests) == 1:
    return
  even = []
  for index, figure in _figures(contests):
    parts = []
    for split in next(iter(contests.values())):
      winners = {rate: by_split[split][index].winner for rate, by_split in contests.items()}
      for leads, said in ((True, f'{split} is ahead'), (False, f'colocated is ahead of {split}')):
        rates = [rate for rate, winner in winners.items() if winner and (winner == split) is leads]
        if rates:
          parts.append(f'{said}{at_rates(rates, len(contests))}')
    if parts:
      yield f'{figure[0].upper()}{figure[1:]}: {"; ".join(parts)}.'
    else:
      even.append(figure)
  yield 'At other rates no difference is clear' + (f', and at no rate in {listed(even)}.' if even else '.')


def at_rates(rates: Sequence[float], of: int) -> str:
  """The rates in words: ' at 4 and 12 req/s', or ' at every rate' if there are `of`; empty if a run has no rate."""
  if math.isinf(rates[0]):
    return ''
  return ' at every rate' if len(rates) == of > 1 else f' at {listed([plain(rate) for rate in rates])} req/s'


def standings(contests: Contests) -> Iterator[list[str]]:
  """The same as the rows of a table: a figure, then the split ahead at each rate."""
  for index, figure in _figures(contests):
    row = [figure]
    for by_split in contests.values():
      winners = {split: results[index].winner for split, results in by_split.items()}
      ahead = [split for split, winner in winners.items() if winner == split]
      beaten = all(winner not in (split, None) for split, winner in winners.items())
      row.append(', '.join(ahead) or ('colocated' if beaten else '–'))
    yield row


def _figures(contests: Contests) -> list[tuple[int, str]]:
  """The figures that were judged anywhere, each with its number among the contests."""
  every = [results for by_split in contests.values() for results in by_split.values()]
  names = [one.figure for one in every[0]]
  return [(index, name) for index, name in enumerate(names) if any(results[index].judged for results in every)]
