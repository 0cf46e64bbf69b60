"""The benchmark's machinery on a fleet of three: real processes, real TLS."""

from __future__ import annotations

from bench.coordinator import Fleet, decisions, plans, restart


def test_a_small_fleet_hears_plans_decides_and_comes_back() -> None:
    with Fleet(3, server_core=0, processes=2, heartbeat_s=0.5) as fleet:
        fleet.open_sessions()
        assert fleet.total("open") == 3
        heard = plans(fleet, repeats=1)
        assert heard.n == 1
        assert heard.median is not None
        done = decisions(fleet, 0.5)[0]
        assert done.median is not None
        assert done.median > 0
        back = {row.metric: row for row in restart(fleet)}
        assert back["return_s"].median is not None
