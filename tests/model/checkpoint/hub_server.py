"""A stand-in for the Hugging Face hub on this machine: the few addresses that downloads of a public model ask for."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping

COMMIT = '0123456789abcdef0123456789abcdef01234567'
REVISIONS = ('main', 'v1', COMMIT)


@contextlib.contextmanager
def serve_hub(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
  """Serve files by repository and name.

  Yields:
    The address to use as HF_ENDPOINT, and the paths of all requests so far.
  """
  paths: list[str] = []

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
      path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
      paths.append(f'{self.command} {path}')
      if path.startswith('/api/models/'):
        self._api(*path.removeprefix('/api/models/').split('/', 2))
        return
      owner, name, place, _, file = path.lstrip('/').split('/', 4)
      content = repositories.get(f'{owner}/{name}', {}).get(file)
      if place == 'resolve' and content is not None:
        self._answer(200, content, {'ETag': f'"{hashlib.sha1(content).hexdigest()}"', 'X-Repo-Commit': COMMIT})
      else:
        self._answer(404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': COMMIT})

    do_HEAD = do_GET

    def _api(self, owner: str, name: str, rest: str = ''):
      files = repositories.get(f'{owner}/{name}')
      if files is None:
        self._answer(404, b'{}', {'X-Error-Code': 'RepoNotFound'})
      elif rest.startswith('revision/') and rest.removeprefix('revision/') not in REVISIONS:
        self._answer(404, b'{}', {'X-Error-Code': 'RevisionNotFound'})
      elif rest.startswith('tree/'):
        tree = [
          {'type': 'file', 'path': file, 'size': len(content), 'oid': hashlib.sha1(content).hexdigest()}
          for file, content in files.items()
        ]
        self._answer(200, json.dumps(tree).encode())
      else:
        siblings = [{'rfilename': file} for file in files]
        self._answer(200, json.dumps({'id': f'{owner}/{name}', 'sha': COMMIT, 'siblings': siblings}).encode())

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None):
      self.send_response(status)
      for key, value in {'Content-Length': str(len(content)), **(headers or {})}.items():
        self.send_header(key, value)
      self.end_headers()
      if self.command == 'GET':
        self.wfile.write(content)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}', paths
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
