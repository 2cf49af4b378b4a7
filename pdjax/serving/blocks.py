"""Blocks: a name for pages, wherever they are."""

import dataclasses

import numpy as np

Made = tuple[str, ...]  # the way in which blocks are made


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Blocks:
  """The whole blocks at the beginning of a sequence, by which pages are named wherever they are.

  `ClusterView.blocks` answers it, and `Transfer` takes it.

  Attributes:
    request: The request whose sequence it is.
    tokens: The tokens of them.
    number: The position of that request in the order of arrival.
    salt: The tenant, or whatever else keeps blocks apart.
  """

  request: str
  tokens: int
  number: int = dataclasses.field(repr=False)
  _content: np.ndarray = dataclasses.field(repr=False)  # token ids, or what stands for them
  salt: str = dataclasses.field(repr=False)
  _unit: Made = dataclasses.field(repr=False)  # what the ids stand for, if they are no tokens
  _keys: dict[Made, bytes] = dataclasses.field(default_factory=dict, repr=False)
