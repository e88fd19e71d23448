"""What a gateway counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class GatewayMetrics:
    """One set of metrics in a registry of its own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("backdrop_requests", "Chat requests by status", ["status"], registry=registry)
        self.in_flight = Gauge("backdrop_requests_in_flight", "Requests in work", registry=registry)
        self.waiting = Gauge("backdrop_requests_waiting", "Requests that wait for a place", registry=registry)
        self.first_token = Histogram(
            "backdrop_first_token_seconds",
            "From the request to the first piece of an answer",
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
