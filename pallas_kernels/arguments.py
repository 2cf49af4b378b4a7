"""What every attention kernel asks of its arguments, and how one of its implementations is chosen."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Implementation = Callable[..., jax.Array | tuple[jax.Array, jax.Array]]


def check_heads(q: jax.Array, pages: jax.Array, rows: str) -> None:
  """See that queries `[rows, H, D]` can attend to pages `[P, 2, K, G, D]`.

  Raises:
    ValueError: if the shapes do not fit together.
  """
  if q.ndim != 3 or pages.ndim != 5 or pages.shape[1] != 2 or pages.shape[4] != q.shape[2]:
    raise ValueError(f'q {q.shape} and pages {pages.shape} are not [{rows}, H, D] and [P, 2, K, G, D].')
  if q.shape[1] % pages.shape[2]:
    raise ValueError(f'{pages.shape[2]} key/value heads do not divide {q.shape[1]} query heads.')


def check_window(sliding_window: int | None) -> None:
  """See that a sliding window shows each token at least itself.

  Raises:
    ValueError: if it does not.
  """
  if sliding_window is not None and sliding_window < 1:
    raise ValueError(f'sliding_window is {sliding_window}, expected at least 1 token, or None to see all.')


def check_cap(soft_cap: float | None) -> None:
  """See that a soft cap bounds scores.

  Raises:
    ValueError: if it does not.
  """
  if soft_cap is not None and not 0 < soft_cap < float('inf'):
    raise ValueError(f'soft_cap is {soft_cap}, expected a bound above 0, or None for scores without one.')


def check_sinks(sinks: jax.Array | None, query_heads: int) -> None:
  """See that there is a sink for each query head.

  Raises:
    ValueError: if there is not.
  """
  if sinks is None:
    return
  if sinks.shape != (query_heads,):
    raise ValueError(f'sinks {sinks.shape} are not [H], one for each of the {query_heads} query heads of q.')
  if not jnp.issubdtype(sinks.dtype, jnp.floating):
    raise ValueError(f'sinks are {sinks.dtype}, expected float32.')


def choose(implementations: Mapping[str, Implementation], name: str | None) -> Implementation:
  """The implementation of that name, or the fastest here.

  Raises:
    ValueError: if there is none of that name.
  """
  run = implementations.get(name or 'xla')
  if run is None:
    raise ValueError(f'implementation {name!r} is unknown; there are {", ".join(implementations)}.')
  return run
