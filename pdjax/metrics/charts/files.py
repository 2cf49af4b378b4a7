"""Charts as they leave the program: a picture for a notebook, an SVG or PNG file, and JSON for the page."""

import dataclasses
import os
import pathlib
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from pdjax.metrics.charts.style import without_config
from pdjax.metrics.colours import DARK, LIGHT
from pdjax.types.json_text import json_text

_PNG_SCALE = 2
_PNG_HEAD = b'\x89PNG\r\n\x1a\n'


@dataclasses.dataclass(frozen=True)
class Picture:
  """A chart as a PNG that a notebook shows by itself: what is in it, its size as shown, and twice as many pixels."""

  title: str
  width: int
  height: int
  png: bytes = dataclasses.field(repr=False)

  def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
    return self.png, {'width': self.width, 'height': self.height, 'alt': self.title}


def picture(chart: Any) -> Picture:
  """A chart drawn here and now, without a browser: for notebooks that are read where no script runs."""
  import vl_convert

  spec = {'padding': 8} | chart.to_dict(validate=False)
  png = vl_convert.vegalite_to_png(spec, scale=_PNG_SCALE)
  width, height = struct.unpack('>II', png[16:24])  # where every PNG says it
  return Picture('; '.join(_titles(spec)), width // _PNG_SCALE, height // _PNG_SCALE, _deflate(png))


def _titles(spec: Mapping[str, Any]) -> Iterable[str]:
  title = spec.get('title')
  if title:
    yield title['text'] if isinstance(title, Mapping) else title
  for part in spec.get('concat', spec.get('vconcat', ())):
    yield from _titles(part)


def _deflate(png: bytes) -> bytes:
  """The same PNG at a third of the length: its renderer compresses in a hurry."""
  chunks: list[tuple[bytes, bytes]] = []
  at = len(_PNG_HEAD)
  while at < len(png):
    length, kind = struct.unpack('>I4s', png[at : at + 8])
    chunks.append((kind, png[at + 8 : at + 8 + length]))
    at += length + 12  # length, kind and checksum
  pixels = zlib.decompress(b''.join(body for kind, body in chunks if kind == b'IDAT'))
  chunks = [chunk for chunk in chunks if chunk[0] != b'IDAT']
  chunks.insert(-1, (b'IDAT', zlib.compress(pixels, 9)))
  return _PNG_HEAD + b''.join(
    struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body)) for kind, body in chunks
  )


def save(chart: Any, path: str | os.PathLike) -> pathlib.Path:
  """Write a chart as `.svg` or `.png`, without a browser; an SVG follows its reader's light or dark theme.

  Raises:
    ValueError: if the path has another ending.
  """
  import vl_convert

  path = pathlib.Path(path)
  spec = chart.to_dict(validate=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  match path.suffix:
    case '.svg':
      path.write_text(_follow_theme(vl_convert.vegalite_to_svg(spec)), encoding='utf-8')
    case '.png':
      path.write_bytes(_deflate(vl_convert.vegalite_to_png(spec, scale=_PNG_SCALE)))
    case _:
      raise ValueError(f'a chart cannot be written to {str(path)!r}; end the name in .svg or .png.')
  return path


def _follow_theme(svg: str) -> str:
  """Give each colour of the light page its dark counterpart where the reader prefers dark."""
  rules = ''.join(
    f'[{paint}="{LIGHT[name]}"]{{{paint}:{DARK[name]}}}' for name in LIGHT for paint in ('fill', 'stroke')
  )
  return re.sub('(<svg[^>]*>)', rf'\1<style>@media (prefers-color-scheme: dark){{{rules}}}</style>', svg, count=1)


def page_spec(chart: Any) -> str:
  """A chart as JSON for the page, which gives it width, theme, title and legend."""
  spec = without_config(chart).to_dict(validate=False)
  spec['width'] = 'container'
  spec['autosize'] = {'type': 'fit-x', 'contains': 'padding'}
  spec.pop('title', None)
  for layer in spec.get('layer', ()):
    for channel in ('color', 'stroke', 'strokeDash'):
      layer.get('encoding', {}).get(channel, {}).update(legend=None)
  return json_text(spec, separators=(',', ':'))
