"""A disk that is full after so many bytes, for one file by its name."""

import pathlib


class Full:
  """A file that takes what there is room for and then nothing, as a file system does that fills up."""

  def __init__(self, file, disk: 'FullDisk'):
    self._file, self._disk = file, disk

  def write(self, data) -> int:
    taken = min(len(data), self._disk.room)
    if not taken:
      raise OSError(28, 'No space left on device')
    self._disk.room -= taken
    return self._file.write(bytes(data[:taken]))

  def truncate(self, size: int) -> int:
    self._disk.room += self._file.seek(0, 2) - size
    return self._file.truncate(size)

  def __getattr__(self, name: str):
    return getattr(self._file, name)


class FullDisk:
  """Has `pathlib.Path.open` open files of a name so that they share room for so many bytes, which may change."""

  def __init__(self, monkeypatch, name: str, room: int):
    self.room = room
    real_open = pathlib.Path.open

    def open_full(path, mode='r', *args, **kwargs):
      file = real_open(path, mode, *args, **kwargs)
      return Full(file, self) if path.name == name and mode[0] in 'wax' else file

    monkeypatch.setattr(pathlib.Path, 'open', open_full)
