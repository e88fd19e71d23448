"""Which tenant a request belongs to, and the cache salt that keeps tenants apart in the engine's caches."""

import hashlib
import hmac
import secrets

from .settings import GatewaySettings


def hash_key(key: str) -> str:
    """The SHA-256 of an API key, in hexadecimal: what a settings file holds in its place."""
    return hashlib.sha256(key.encode()).hexdigest()


class Tenants:
    """Recognises tenants by their API keys.

    Args:
        settings: their `keys` and `secret`.
    """

    def __init__(self, settings: GatewaySettings):
        self._keys = settings.keys
        self._secret = (settings.secret or secrets.token_hex(32)).encode()

    def of(self, authorization: str | None) -> str | None:
        """The tenant of an Authorization header; None where it holds no valid key.

        Without keys in the settings everybody is the tenant "default".
        """
        if not self._keys:
            return "default"
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return None
        digest = hash_key(key.strip())
        found = None
        for (
            known,
            tenant,
        ) in self._keys.items():  # all keys are compared, so that the time taken reveals nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def cache_salt(self, tenant: str) -> str:
        """32 hexadecimal digits that cannot be computed without the secret.

        They salt the tenant's entries in the engine's prefix cache, are the prefix of its items' uuids in the encoder
        cache, and name its references in the matcher.
        """
        return hmac.new(self._secret, tenant.encode(), hashlib.sha256).hexdigest()[:32]
