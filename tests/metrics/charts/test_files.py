"""Charts as files and as pictures in a notebook, against what the renderer drew."""

import struct
import zlib

import pytest
import vl_convert

from pdjax.metrics import charts, colours


def test_a_picture_follows_the_theme_of_its_reader(few_requests, tmp_path):
  svg = charts.save(charts.overview(few_requests), tmp_path / 'run.svg').read_text()
  assert 'prefers-color-scheme: dark' in svg
  assert f'fill="{colours.LIGHT["ink"]}"' in svg and f'fill:{colours.DARK["ink"]}' in svg
  assert all(svg.count(f'"{colours.PHASES[kind]}"') for kind in ('prefill', 'decode', 'transfer'))
  assert charts.save(charts.account(few_requests), tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
  with pytest.raises(ValueError, match=r'end the name in \.svg or \.png'):
    charts.save(charts.account(few_requests), tmp_path / 'a.pdf')


def _pixels(png):
  """Size and filtered bytes of a PNG."""
  at, data = 8, b''
  while at < len(png):
    length, kind = struct.unpack('>I4s', png[at : at + 8])
    body = png[at + 8 : at + 8 + length]
    assert zlib.crc32(kind + body) == struct.unpack('>I', png[at + 8 + length : at + 12 + length])[0]
    data += body if kind == b'IDAT' else b''
    at += 12 + length
  return png[16:24], zlib.decompress(data)


def test_a_picture_for_a_notebook_is_what_the_renderer_drew_and_half_as_long(few_requests):
  chart = charts.gantt(few_requests, zoom=False)
  picture = charts.picture(chart)
  drawn = vl_convert.vegalite_to_png(chart.to_dict() | {'padding': 8}, scale=2)
  assert _pixels(picture.png) == _pixels(drawn)
  assert len(picture.png) < len(drawn) / 2
  png, shown = picture._repr_png_()
  assert png == picture.png
  assert struct.pack('>II', 2 * shown['width'], 2 * shown['height']) == png[16:24]
  assert shown['alt'] == picture.title == 'What each worker did'
