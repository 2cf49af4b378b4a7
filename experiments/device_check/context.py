"""The context of a part of the check: the platform, its sizes, its figures, and the ceilings found before."""

import dataclasses
import functools
import json
import pathlib

from experiments.device_check.bounds import Ceilings, hand_over, measure_ceilings
from experiments.device_check.figures import Figures
from experiments.device_check.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class Context:
  """For one part.

  Attributes:
    platform: 'gpu', 'tpu' or 'cpu'.
    sizes: Shapes, and how long things are timed.
    figures: Takes what is found.
    folder: Of the result, and of the cache of programs.
    toy: Whether sizes are toys.
    seed: Of random inputs that are other ones each time, or None to draw that too.
  """

  platform: str
  sizes: Sizes
  figures: Figures
  folder: pathlib.Path
  toy: bool = False
  seed: int | None = None

  @property
  def cache(self) -> str:
    """The folder of compiled programs."""
    return str(self.folder / 'cache')

  @functools.cached_property
  def ceilings(self) -> Ceilings:
    """Those in the result, if a part has measured them, or else measured now: then they are rows of this part."""
    file = self.folder / 'result.json'
    try:
      parts = json.loads(file.read_text(encoding='utf-8'))['parts']
      rows = {row['name']: row['value'] for part in reversed(parts) for row in part['rows']}
      return Ceilings.of_rows(rows)
    except (OSError, ValueError, KeyError, TypeError):
      found = measure_ceilings(self.sizes)
      hand_over(self.figures, found)
      return found
