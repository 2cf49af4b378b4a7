"""Reads the structure of GGUF files: the gguf package's reader, quicker, and with errors that say where."""

from typing import Any

import gguf
import numpy as np

# Of an array: the largest vocabularies have a quarter, and a damaged length would lead through gigabytes of weights.
_MOST_VALUES = 2_000_000


class Reader(gguf.GGUFReader):
  """The gguf package's reader on a plain array: slicing a `np.memmap` costs it seconds on a large vocabulary."""

  @property  # type: ignore[override]
  def data(self) -> np.ndarray:
    return self._bytes

  @data.setter
  def data(self, mapped: np.ndarray):
    self._bytes = np.asarray(mapped)  # still the mapped file, without the subclass

  def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
    found = super()._get(offset, dtype, count, override_order)
    if len(found) < count:  # the package would take a slice past the end for what it asked for, and go on
      raise ValueError(f'byte {offset} should begin {count} values, but the file ends before the last')
    return found

  def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list]:
    if raw_type != gguf.GGUFValueType.ARRAY:
      return super()._get_field_parts(orig_offs, raw_type)
    parts = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
    kind, length = gguf.GGUFValueType(parts[0][0]), int(parts[1][0])
    if length > _MOST_VALUES:
      raise ValueError(f'byte {orig_offs} should begin an array of {length} values, more than any vocabulary has')
    end = orig_offs + 12
    if kind == gguf.GGUFValueType.STRING:
      for _ in range(length):
        parts += self._get_str(end)
        end += 8 + len(parts[-1])
      places = list(range(3, len(parts), 2))
    else:  # numbers all at once: the package makes an array of each
      parts.append(self._get(end, self.gguf_scalar_to_np[kind], length))
      end += parts[-1].nbytes
      places = [2]
    return end - orig_offs, parts, places, [gguf.GGUFValueType.ARRAY, kind]

  def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
    tensors: dict[str, gguf.ReaderTensor] = {}
    for field in fields:  # one at a time, so that an error can say which it is
      try:
        super()._build_tensors(start_offs, [field])
      except Exception as error:  # an unknown type, an odd shape, an end too early: each raises another
        raise ValueError(f'tensor {field.name!r}: {error}') from error
      if field.name in tensors:
        raise ValueError(f'tensor {field.name!r} is there twice')
      tensors[field.name] = self.tensors[0]
    self.tensors = list(tensors.values())
