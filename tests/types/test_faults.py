"""The answers to faults that a config may give."""

import pytest

from pdjax.overrides import apply_overrides
from pdjax.types import FaultSpec, TransferSpec
from tests.tiny import config


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'transfer': 'again'}, "faults.transfer is 'again', expected one of 'retry', 'recompute', 'fail'"),
    ({'corruption': 'ignore'}, "faults.corruption is 'ignore', expected one of 'retry', 'recompute', 'fail'"),
    ({'worker': 'retry'}, "faults.worker is 'retry', expected one of 'recompute', 'fail'"),
    ({'max_attempts': 0}, 'faults.max_attempts is 0, expected at least 1'),
    ({'backoff_s': -1.0}, 'faults.backoff_s is -1.0, expected 0 or more seconds'),
    ({'backoff_s': float('nan')}, 'faults.backoff_s is nan'),
    ({'backoff_s': float('inf')}, 'faults.backoff_s is inf'),
    ({'patience_s': float('nan')}, 'faults.patience_s is nan'),
    ({'patience_s': 0.0}, 'faults.patience_s is 0.0, expected more than 0 seconds'),
  ],
)
def test_what_makes_no_sense_is_refused_with_what_would(fields, words):
  with pytest.raises(ValueError, match=words):
    FaultSpec(**fields)


def test_a_deadline_is_a_time_to_come():
  with pytest.raises(ValueError, match=r'deadline_s is 0\.0, expected more than 0 seconds'):
    TransferSpec(deadline_s=0.0)


def test_faults_are_set_from_the_command_line():
  changed = apply_overrides(config(), ['faults.transfer=fail', 'faults.patience_s=inf', 'transfer.checksums=true'])
  assert changed.faults == FaultSpec(transfer='fail', patience_s=float('inf')) and changed.transfer.checksums
