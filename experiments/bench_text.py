r"""The cost of a token on its way to text, at the beginning of an answer and far into it.

python -m experiments.bench_text
python -m experiments.bench_text --bar=1.5 --json=text.json

One answer of 6,000 tokens is streamed token by token, and what tokens 1 to 60 cost stands beside the last 60 of them
and the mean of all: three kinds of vocabulary, each with the inputs that are worst for it, with and without stop
strings. Medians of several answers, in turn with those of the other cases. It needs no model and takes seconds.
"""

import itertools
import statistics
import sys
import time

from absl import app, flags
from rich.console import Console
from rich.table import Table

from experiments.rows import row, save_rows
from experiments.text_cases import EARLY, LATE, Case, cases
from pdjax.engine.detokenize import Detokenizer, TextStream

_REPEATS = flags.DEFINE_integer('repeats', 15, 'Answers of each case, of which the median counts.', lower_bound=1)
_BAR = flags.DEFINE_float('bar', None, 'Exit with 1 if a late token costs more than so many early ones.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'Write rows of name, value, unit to this file.')


def token_seconds(case: Case, detokenizer: Detokenizer) -> tuple[float, float, float]:
  """Seconds of a token among the first `EARLY`, among as many up to `LATE`, and of all: one answer."""
  spent: list[float] = []
  for parts in ((EARLY,), (EARLY, LATE - EARLY, LATE)):  # a short one first, lest early tokens pay for a cold cache
    stream = TextStream(detokenizer, case.stop)
    marks = [time.perf_counter()]
    for begin, end in itertools.pairwise((0, *parts)):
      for token in case.tokens[begin:end]:
        stream.take((token,))
      marks.append(time.perf_counter())
    spent = [after - before for before, after in itertools.pairwise(marks)]
  return spent[0] / EARLY, spent[-1] / EARLY, sum(spent) / LATE


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}; options begin with --.')
  ready = [(case, Detokenizer(case.tokenizer)) for case in cases()]
  for case, detokenizer in ready:  # what is kept for each token of a vocabulary is made once, by its first answer
    token_seconds(case, detokenizer)
  runs = [[token_seconds(*one) for one in ready] for _ in range(_REPEATS.value)]
  table = Table(title='a token on its way to text, in µs', box=None)
  for column in ('vocabulary', 'answer', 'stop', f'at {EARLY}', f'at {LATE:,}', 'mean', 'ratio'):
    table.add_column(column, justify='left' if column in ('vocabulary', 'answer', 'stop') else 'right', no_wrap=True)
  rows, ratios = [], {}
  for (case, _), answers in zip(ready, zip(*runs, strict=True), strict=True):
    early, late, mean = (1e6 * statistics.median(some) for some in zip(*answers, strict=True))
    ratios[case.name] = max(late, mean) / early
    figures = (f'{value:.2f}' for value in (early, late, mean, ratios[case.name]))
    table.add_row(case.vocabulary, case.answer, 'yes' if case.stop else '', *figures)
    rows.append(row(f'{case.name}, a token at {EARLY}', early, 'us'))
    rows.append(row(f'{case.name}, a token at {LATE}', late, 'us'))
    rows.append(row(f'{case.name}, late over early', ratios[case.name], 'ratio'))
  Console().print(table)
  save_rows(_JSON.value, rows)
  worst = max(ratios, key=ratios.__getitem__)
  print(f'The highest ratio is {ratios[worst]:.2f}: {worst}.')
  if _BAR.value is not None and ratios[worst] > _BAR.value:
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
