"""Figures for Prometheus, on a port of their own."""

from __future__ import annotations

import functools
import socket
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from coordinator.core.model import ENDED, Event, JobPhase, Presence, Record, Refused, Reply, Standing, State

STOP_POLL_S = 0.05
"""How soon the metrics server notices that it shall stop; prometheus_client's own takes half a second."""
_FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Scrapes are not news."""


class Metrics:
    """An observer of the loop that counts, and a collector that looks at the state when it is asked."""

    def __init__(
        self, state: Callable[[], State], sessions: Callable[[], int], log_lines_dropped: Callable[[], int]
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StateCollector(state, sessions, log_lines_dropped))
        self.events = Counter("muster_events", "Events decided.", ["kind"], registry=self.registry)
        self.records = Counter("muster_records", "Records kept or applied.", ["kind"], registry=self.registry)
        self.refusals = Counter("muster_refusals", "Requests refused.", ["reason"], registry=self.registry)
        self.blob_bytes = Counter(
            "muster_blob_bytes", "Bytes of blobs moved.", ["direction"], registry=self.registry
        )
        self.uploads_over_quota = Counter(
            "muster_uploads_over_quota",
            "Uploads refused for what their sender has not reported.",
            registry=self.registry,
        )
        self.unreported_bytes = Gauge(
            "muster_unreported_bytes",
            "Bytes of blobs that agents sent and no checkpoint has.",
            registry=self.registry,
        )
        self.commit_s = Histogram(
            "muster_journal_commit_seconds",
            "Time of a journal commit.",
            buckets=_FAST,
            registry=self.registry,
        )
        self.decision_s = Histogram(
            "muster_decision_seconds",
            "From the arrival of an event to its release.",
            buckets=_FAST,
            registry=self.registry,
        )
        self._server: WSGIServer | None = None
        self._thread: Thread | None = None

        # Looking a label up takes longer than counting.
        self._of_record = functools.cache(self.records.labels)
        self._of_event = functools.cache(self.events.labels)

    def committed(self, record: Record) -> None:
        self._of_record(type(record).__name__).inc()

    def decided(self, event: Event, reply: Reply, waited_s: float) -> None:
        self._of_event(type(event).__name__).inc()
        self.decision_s.observe(waited_s)
        if isinstance(reply, Refused):
            self.refusals.labels(reply.refusal.name).inc()

    def wrote(self, entries: int, seconds: float) -> None:
        self.commit_s.observe(seconds)

    def serve(self, host: str, port: int) -> int:
        """Serve /metrics; returns the port.  Raise OSError if it is taken."""
        kind = _ServerV6 if ":" in host else _Server
        self._server = make_server(host, port, make_wsgi_app(self.registry), kind, _QuietHandler)
        self._thread = Thread(
            target=self._server.serve_forever, args=(STOP_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()
        return int(self._server.server_port)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _StateCollector(Collector):
    """Runs in the metrics server's thread: agents and jobs are frozen values, so a copy of the list of
    them is all the care that is needed."""

    def __init__(
        self, state: Callable[[], State], sessions: Callable[[], int], log_lines_dropped: Callable[[], int]
    ) -> None:
        self._state = state
        self._sessions = sessions
        self._log_lines_dropped = log_lines_dropped

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # nothing to look at before the loop has started

    def collect(self) -> Iterator[GaugeMetricFamily]:
        state = self._state()
        agents = list(state.agents.values())
        jobs = list(state.jobs.values())

        yield GaugeMetricFamily("muster_sessions", "Open sessions.", value=self._sessions())
        yield GaugeMetricFamily(
            "muster_log_lines_dropped",
            "Lines of workers' output lost for want of room.",
            value=self._log_lines_dropped(),
        )
        presence = GaugeMetricFamily("muster_agents", "Agents by presence.", labels=["presence"])
        present = Tally(agent.presence for agent in agents)
        for one in Presence:
            presence.add_metric([one.value], present[one])
        yield presence
        standing = GaugeMetricFamily("muster_agents_standing", "Agents by standing.", labels=["standing"])
        standings = Tally(agent.standing for agent in agents)
        for which in Standing:
            standing.add_metric([which.value], standings[which])
        yield standing
        phases = GaugeMetricFamily("muster_jobs", "Jobs by phase.", labels=["phase"])
        phased = Tally(job.phase for job in jobs)
        for phase in JobPhase:
            phases.add_metric([phase.value], phased[phase])
        yield phases

        labels = ["job", "name"]
        step = GaugeMetricFamily("muster_job_committed_step", "Newest committed step.", labels=labels)
        world = GaugeMetricFamily("muster_job_world_size", "Workers in the newest generation.", labels=labels)
        generation = GaugeMetricFamily(
            "muster_job_generation", "Number of the newest generation.", labels=labels
        )
        speed = GaugeMetricFamily("muster_job_tokens_per_second", "As its agents report.", labels=labels)
        failures = GaugeMetricFamily(
            "muster_job_failures", "Failures that count against max_failures.", labels=labels
        )
        for job in jobs:
            if job.phase in ENDED:
                continue
            key = [job.job_id, job.spec.name]
            step.add_metric(key, job.committed_step)
            world.add_metric(key, job.generation.world_size if job.generation else 0)
            generation.add_metric(key, job.generation_count)
            speed.add_metric(key, sum(agent.tokens_per_s for agent in agents if agent.job_id == job.job_id))
            failures.add_metric(key, job.failures)
        yield from (step, world, generation, speed, failures)
