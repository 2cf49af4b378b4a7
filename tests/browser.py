"""Headless Chromium on a leash: the DevTools protocol over two pipes, so that tests need no driver."""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):  # where a browser looks for its pipes
  os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')

_PATIENCE_S = 60


def find() -> str | None:
  """The browser's command, if there is one here."""
  return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
  """One page of a headless browser; everything that its console says above `info` is kept in `complaints`."""

  def __init__(self, command: str):
    self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    to_browser, self._writer = os.pipe()
    self._reader, from_browser = os.pipe()
    arguments = [
      command, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars',
      '--no-first-run', '--disable-extensions', '--disable-background-networking', '--disable-component-update',
      '--disable-sync', '--disable-quic', '--remote-debugging-pipe',
      f'--user-data-dir={self._folder.name}', 'about:blank',
    ]  # fmt: skip
    self._process = subprocess.Popen(
      [sys.executable, '-c', _LAUNCH, str(to_browser), str(from_browser), *arguments],
      pass_fds=(to_browser, from_browser),
      start_new_session=True,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    self._rest = b''
    self._calls = 0
    self._events: list[str] = []
    self.complaints: list[str] = []
    targets = self._call('Target.getTargets')['targetInfos']
    page = next(target['targetId'] for target in targets if target['type'] == 'page')
    self._session: str | None = self._call('Target.attachToTarget', targetId=page, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log'):
      self._call(f'{domain}.enable')

  def __enter__(self) -> 'Browser':
    return self

  def __exit__(self, *error: object) -> None:
    self._process.terminate()
    try:
      self._process.wait(20)
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._process.pid, signal.SIGKILL)  # its helpers may live on for a moment, and write
    os.close(self._writer)
    os.close(self._reader)
    self._folder.cleanup()

  def open(self, path: pathlib.Path, *, dark: bool, width: int, height: int = 900) -> None:
    """Load a file in a theme and a window, and wait until it is loaded."""
    self._call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    self._call('Emulation.setEmulatedMedia', features=[scheme])
    self._events.clear()
    self._call('Page.navigate', url=path.resolve().as_uri())
    while 'Page.loadEventFired' not in self._events:
      self._receive()

  def evaluate(self, expression: str) -> Any:
    """The value of a JavaScript expression; promises are waited for."""
    answer = self._call('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
    assert 'exceptionDetails' not in answer, answer['exceptionDetails']
    return answer['result'].get('value')

  def screenshot(self, path: pathlib.Path) -> None:
    """Write the whole page as a PNG."""
    answer = self._call('Page.captureScreenshot', captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(answer['data']))

  def _call(self, method: str, **params: Any) -> dict[str, Any]:
    self._calls += 1
    message: dict[str, Any] = {'id': self._calls, 'method': method, 'params': params}
    if getattr(self, '_session', None):
      message['sessionId'] = self._session
    os.write(self._writer, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._receive()
      if answer.get('id') == self._calls:
        assert 'error' not in answer, answer['error']
        return answer['result']

  def _receive(self) -> dict[str, Any]:
    while b'\0' not in self._rest:
      assert select.select([self._reader], [], [], _PATIENCE_S)[0], f'the browser was silent for {_PATIENCE_S} s'
      data = os.read(self._reader, 1 << 20)
      assert data, 'the browser has ended'
      self._rest += data
    text, _, self._rest = self._rest.partition(b'\0')
    message = json.loads(text)
    params = message.get('params', {})
    match message.get('method'):
      case None:
        return message
      case 'Runtime.consoleAPICalled' if params['type'] in ('error', 'warning', 'assert'):
        self.complaints.append(' '.join(str(arg.get('value', arg.get('description'))) for arg in params['args']))
      case 'Runtime.exceptionThrown':
        self.complaints.append(str(params['exceptionDetails']))
      case 'Log.entryAdded' if params['entry']['level'] in ('error', 'warning'):
        self.complaints.append(params['entry']['text'])
    self._events.append(message['method'])
    return message
