"""What is counted for Prometheus, in its text format (prometheus.io/docs/instrumenting/exposition_formats)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from threading import Lock

from .queue import Engine

_SECONDS = 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0  # upper ends of the histogram's buckets
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Requests by endpoint and status, and how long they took; any thread may count."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}

    def count(self, endpoint: str, status: int, seconds: float) -> None:
        """One request that has been answered. endpoint: one of a few paths. seconds: from its first line to the answer;
        those of the histogram are of requests that were answered with 200."""
        with self._lock:
            self._requests[endpoint, status] += 1
            if status == 200:
                buckets = self._buckets.setdefault(endpoint, [0] * (len(_SECONDS) + 1))
                buckets[bisect_left(_SECONDS, seconds)] += 1
                self._seconds[endpoint] = self._seconds.get(endpoint, 0.0) + seconds

    def text(self, engine: Engine) -> str:
        """All of it, and what the engine has counted."""
        lines: list[str] = []

        def add(name: str, kind: str, words: str, value: float | None = None) -> None:
            lines.extend((f"# HELP kqprefill_{name} {words}", f"# TYPE kqprefill_{name} {kind}"))
            if value is not None:
                lines.append(f"kqprefill_{name} {value}")

        with self._lock:
            requests = sorted(self._requests.items())
            buckets = {endpoint: list(counts) for endpoint, counts in sorted(self._buckets.items())}
            sums = dict(self._seconds)
        add("requests_total", "counter", "Requests that were answered; 499: whoever asked had gone.")
        for (endpoint, status), count in requests:
            lines.append(f'kqprefill_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}')
        add("request_seconds", "histogram", "Seconds that requests took which were answered with 200.")
        for endpoint, counts in buckets.items():
            name, total = f'kqprefill_request_seconds_bucket{{endpoint="{endpoint}",le=', 0
            for end, count in zip((*map(str, _SECONDS), "+Inf"), counts):
                total += count
                lines.append(f'{name}"{end}"}} {total}')
            lines.append(f'kqprefill_request_seconds_sum{{endpoint="{endpoint}"}} {sums[endpoint]}')
            lines.append(f'kqprefill_request_seconds_count{{endpoint="{endpoint}"}} {total}')
        add("prompts_total", "counter", "Prompts that were computed.", engine.prompts)
        add("prompt_tokens_total", "counter", "Tokens of prompts that were computed.", engine.tokens)
        add("prompts_cancelled_total", "counter", "Prompts that were given up while they waited.", engine.cancelled)
        add("waiting_prompts", "gauge", "Prompts that wait.", engine.waiting_prompts)
        add("waiting_tokens", "gauge", "Tokens of prompts that wait.", engine.waiting_tokens)
        add("busy_seconds_total", "counter", "Seconds in which there was something to compute.", engine.busy_seconds)
        return "\n".join(lines) + "\n"
