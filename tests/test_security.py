"""The claims of docs/security.md are true."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / 'docs' / 'security.md').read_text(encoding='utf-8')


def test_readme_leads_to_the_page_and_its_tests_are_there():
  assert 'docs/security.md' in (ROOT / 'README.md').read_text(encoding='utf-8')
  for path in ('tests/kv/transfer/test_cross_process.py', 'tests/controller/test_ray.py'):
    assert path in PAGE and (ROOT / path).is_file()


def _environment(tmp_path: pathlib.Path, **more: str) -> dict[str, str]:
  """The environment for Ray after pdjax has imported it; a stand-in for Ray, so that nothing starts."""
  (tmp_path / 'ray.py').write_text('')
  code = (
    'import json, os\nfrom pdjax.controller.ray_workers import import_ray, make_token\nimport_ray()\nmake_token()\n'
    'print(json.dumps({key: value for key, value in os.environ.items() if key.startswith("RAY_")}))'
  )
  clean = {key: value for key, value in os.environ.items() if not key.startswith('RAY_')}
  clean |= {'HOME': str(tmp_path), 'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}', **more}
  done = subprocess.run([sys.executable, '-c', code], env=clean, capture_output=True, text=True, check=True)
  return json.loads(done.stdout)


def test_a_cluster_of_our_own_has_a_token_that_nobody_else_knows_and_sends_no_statistics(tmp_path):
  first, second = _environment(tmp_path), _environment(tmp_path)
  assert first['RAY_USAGE_STATS_ENABLED'] == '0' and 'RAY_AUTH_MODE' not in first  # Ray's own default is a token
  assert len(first['RAY_AUTH_TOKEN']) == 64 and first['RAY_AUTH_TOKEN'] != second['RAY_AUTH_TOKEN']
  assert not (tmp_path / '.ray').exists(), 'a token was left on disk'


def test_a_token_that_is_there_is_taken(tmp_path):
  given = _environment(tmp_path, RAY_AUTH_TOKEN='a' * 64)
  assert given['RAY_AUTH_TOKEN'] == 'a' * 64
  assert 'RAY_AUTH_TOKEN' not in _environment(tmp_path, RAY_AUTH_TOKEN_PATH='/a/file')
  (tmp_path / '.ray').mkdir()
  (tmp_path / '.ray' / 'auth_token').write_text('b' * 64)
  assert 'RAY_AUTH_TOKEN' not in _environment(tmp_path)
