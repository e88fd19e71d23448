"""Which tenant a request belongs to, and the cache salt that keeps tenants apart in the engine's caches."""

import hashlib
import hmac
import secrets
from collections import Counter

from .settings import GatewaySettings

DEFAULT = "default"  # the only tenant where there are no keys
EVERYBODY = "*"


def hash_key(key: str) -> str:
    """The SHA-256 of an API key, in hexadecimal: what a settings file holds in its place."""
    return hashlib.sha256(key.encode()).hexdigest()


class Tenants:
    """Recognises tenants, and keepers of the gateway, by their API keys; counts what each tenant asked.

    Args:
        settings: `keys`, `admin_keys` and `secret`.
    """

    def __init__(self, settings: GatewaySettings):
        self._keys, self._admin_keys = settings.keys, settings.admin_keys
        self._secret = (settings.secret or secrets.token_hex(32)).encode()
        self._figures: dict[str, Counter[str]] = {}

    def of(self, authorization: str | None) -> str | None:
        """The tenant of an Authorization header; None where it holds no valid key.

        Without keys in the settings everybody is the tenant "default".
        """
        return _owner(self._keys, authorization) if self._keys else DEFAULT

    def keeper(self, authorization: str | None) -> str | None:
        """Whose references a key of `/admin` is for: a tenant's, or `EVERYBODY`'s; None: it is no such key."""
        return _owner(self._admin_keys, authorization)

    def names(self, keeper: str) -> list[str]:
        """The tenants that a keeper sees."""
        known = list(dict.fromkeys(self._keys.values())) or [DEFAULT]
        return known if keeper == EVERYBODY else [name for name in known if name == keeper]

    def count(self, tenant: str, **figures: int) -> None:
        """Adds to a tenant's figures."""
        self._figures.setdefault(tenant, Counter()).update(figures)

    def figures(self, tenant: str) -> dict[str, int]:
        """What a tenant has asked since the gateway started."""
        return dict(self._figures.get(tenant, ()))

    def cache_salt(self, tenant: str) -> str:
        """32 hexadecimal digits that cannot be computed without the secret.

        They salt the tenant's entries in the engine's prefix cache, are the prefix of its items' uuids in the encoder
        cache, and name its references in the matcher.
        """
        return hmac.new(self._secret, tenant.encode(), hashlib.sha256).hexdigest()[:32]


def _owner(keys: dict[str, str], authorization: str | None) -> str | None:
    """Whose key an Authorization header holds; None: no known one."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        return None
    digest = hash_key(key.strip())
    found = None
    for known, owner in keys.items():  # all keys are compared, so that the time taken reveals nothing
        if hmac.compare_digest(known, digest):
            found = owner
    return found
