"""What a gateway counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .frames import SplitFrame

# Upper bounds of the histograms' buckets.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class GatewayMetrics:
    """One gateway's metrics, in a registry of their own; all names begin with backdrop_."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("backdrop_requests", "Chat requests by status", ["status"], registry=registry)
        self.in_flight = Gauge("backdrop_requests_in_flight", "Requests in progress", registry=registry)
        self.waiting = Gauge(
            "backdrop_requests_waiting", "Requests that wait for another to end", registry=registry
        )
        self.first_token = Histogram(
            "backdrop_first_token_seconds",
            "From the request to the first event of its answer, or all of it where it is not streamed",
            buckets=SECONDS,
            registry=registry,
        )
        self.split = Histogram(
            "backdrop_split_seconds",
            "Decoding, splitting and matching a request's images",
            buckets=SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "backdrop_images", "Images by what became of their background", ["background"], registry=registry
        )
        self.patches = Counter(
            "backdrop_patches", "Patches, reused from a reference or fresh", ["kind"], registry=registry
        )
        self.prompt_tokens = Counter(
            "backdrop_prompt_tokens",
            "Prompt tokens, cached by the engine or computed",
            ["kind"],
            registry=registry,
        )
        self.retries = Counter("backdrop_retries", "Requests sent to another replica", registry=registry)
        self.replica_errors = Counter(
            "backdrop_replica_errors", "Failures by replica", ["replica"], registry=registry
        )
        self.replica_up = Gauge(
            "backdrop_replica_up", "1 where a replica takes requests", ["replica"], registry=registry
        )

    def count_usage(self, usage: dict | None) -> None:
        """Counts the prompt tokens of an answer's `usage`, as the engine reports it."""
        if not usage:
            return
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.prompt_tokens.labels("cached").inc(cached)
        self.prompt_tokens.labels("computed").inc(max(0, usage.get("prompt_tokens", 0) - cached))

    def count_frames(self, frames: list[SplitFrame]) -> None:
        """Counts images and their patches."""
        for frame in frames:
            self.images.labels("known" if frame.reused else "new").inc()
            self.patches.labels("reused").inc(frame.reused)
            self.patches.labels("fresh").inc(frame.total - frame.reused)
