"""A comparison on the engine: one deployment serves every rate and budget in turn."""

import dataclasses

import pytest

from pdjax.comparison import System, running
from pdjax.deployment import Deployment
from pdjax.engine.build import Built
from pdjax.engine.engine import Engine
from pdjax.opened_model import OpenedModel
from pdjax.policies import Colocated, Disaggregated
from pdjax.reporting import describe
from pdjax.workload import Given
from tests.tiny import requests


@pytest.mark.parametrize(
  ('cluster', 'policies'),
  [
    ('one_and_one', (Disaggregated(max_prefill_tokens=16), Disaggregated(max_prefill_tokens=7))),
    ('colocated_pair', (Colocated(token_budget=16), Colocated(token_budget=8))),
  ],
)
def test_a_cluster_is_deployed_once_and_every_run_starts_afresh(cluster, policies, request, monkeypatch):
  cluster = request.getfixturevalue(cluster)
  deployed = []

  def deploy(config, opened, backend, say):
    engine = Engine(list(cluster.workers.values()), cluster.transports)
    deployed.append(engine)
    built = Built(
      engine,
      cluster.specs,
      cluster.transfer,
      config.definite_dtype,
      dict.fromkeys(cluster.workers, ()),
      cluster.warm_up,
    )
    return Deployment(config, opened, built)

  monkeypatch.setattr(running, 'deploy', deploy)
  systems = [
    System('2', tokens, dataclasses.replace(cluster.config, policy=policy), False, 2)
    for tokens, policy in enumerate(policies)
  ]
  workloads = [Given(requests((3, 9, 17))), Given(requests((5, 30), max_tokens=3))]
  opened = OpenedModel(cluster.model)
  runs = list(running._run_cluster(systems, workloads, 'engine', opened, lambda line: None))
  assert len(deployed) == 1
  assert [(system.name, workload) for system, workload, _, _ in runs] == [
    (system.name, workload) for workload in workloads for system in systems
  ]
  for system, workload, report, _ in runs:
    assert report.completed == workload.num_requests
    assert report.config['policy'] == describe(system.config.policy)
    assert report.account.ttft_closes_s < 1e-6 and report.account.handoff_closes_s < 1e-6
    assert all(0 <= span.began_s <= span.ended_s <= report.timeline.end_s + 1 for span in report.timeline.spans)
  tokens = [{event.request: event.tokens for event in events if hasattr(event, 'finish_reason')} for *_, events in runs]
  assert tokens[0] == tokens[1] and tokens[2] == tokens[3]
