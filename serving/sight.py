"""What a response tells about its request: which patches were reused, from which reference, and where the time went."""

import time
from dataclasses import dataclass, field
from hashlib import blake2b

from .frames import SplitFrame

NAMED = 32  # references in a header: proxies refuse headers of a few kilobytes


def reference_name(salt: str, number: int) -> str:
    """The name under which a tenant sees a reference: 12 hexadecimal digits, which tell nothing of other tenants.

    Args:
        salt: the tenant's cache salt.
        number: of the reference in the matcher, which counts those of all tenants.
    """
    return blake2b(f"{salt}\0{number}".encode(), digest_size=6).hexdigest()


@dataclass
class Sight:
    """One request's figures, for the headers of its response and the object `backdrop` of its usage.

    Attributes:
        salt: the tenant's, by which references are named.
        frames: its images, split.
        ignored: fields of the request that were left out.
        seconds: time by what it was spent on: "wait" for a slot, "images" (fetching, decoding, splitting, matching),
            "first_token" (from the request to the first token, or to the whole answer where it is not streamed).
    """

    salt: str
    frames: list[SplitFrame] = field(default_factory=list)
    ignored: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def lap(self, name: str, since: float | None = None) -> None:
        """Notes the time from `since` (`time.perf_counter()`, None: the request's beginning) until now."""
        self.seconds[name] = time.perf_counter() - (self.started if since is None else since)

    @property
    def references(self) -> list[str | None]:
        """The name of each image's reference, None where it matched none."""
        return [
            None if frame.reference is None else reference_name(self.salt, frame.reference)
            for frame in self.frames
        ]

    def patches(self) -> dict[str, int]:
        """Patches of all images: reused from references, fresh, and stale (of references, overridden by fresh ones)."""
        reused = sum(frame.reused for frame in self.frames)
        return {
            "reused": reused,
            "fresh": sum(frame.total for frame in self.frames) - reused,
            "stale": sum(frame.stale for frame in self.frames),
        }

    def usage(self) -> dict:
        """The object `backdrop` of the usage."""
        return {
            "patches": self.patches(),
            "references": self.references,
            "seconds": {name: round(seconds, 4) for name, seconds in self.seconds.items()},
        }

    def headers(self) -> dict[str, str]:
        """The response's headers; the times in the form that browsers show (`Server-Timing`)."""
        found = {
            f"X-Backdrop-Patches-{name.capitalize()}": str(count) for name, count in self.patches().items()
        }
        if self.frames:
            names = [name or "-" for name in self.references[:NAMED]]
            found["X-Backdrop-Reference"] = ",".join(names + ["..."] * (len(self.frames) > NAMED))
        if self.ignored:
            named = (name for name in self.ignored if name.isascii() and name.isprintable())
            found["X-Backdrop-Ignored"] = ",".join(named)[:200]
        found["Server-Timing"] = ", ".join(
            f"{name};dur={1000 * seconds:.1f}" for name, seconds in self.seconds.items()
        )
        return found
