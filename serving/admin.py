"""`/admin`: what a gateway's keeper sees and clears. Behind keys of its own; not there without one in the settings.

A key belongs to a tenant, whose references it lists, shows and forgets, or to "*", which does so for all tenants but shows
no pixels: nobody sees another tenant's pictures.

    GET    /admin/references?tenant=&camera=    DELETE the same forgets them
    GET    /admin/references/NAME/picture       DELETE /admin/references/NAME forgets one
    GET    /admin/tenants  /admin/replicas  /admin/settings
"""

from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from backdrop.processing.background_matching_backdrop import BackgroundMatcher, KnownBackground
from backdrop.processing.patch_groups_backdrop import pixel_mask

from .answers import refusal
from .problems import ApiError
from .replicas import Replicas
from .settings import GatewaySettings
from .sight import reference_name
from .tenants import EVERYBODY, Tenants

_Handler = Callable[[Request, str], Awaitable[Response]]


class Admin:
    """The handlers of `/admin`.

    Args:
        settings: of the gateway.
        tenants: recognises keys, and counts what tenants asked.
        replicas: the engines.
        matcher: gives the matcher once there is one.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        tenants: Tenants,
        replicas: Replicas,
        matcher: Callable[[], BackgroundMatcher],
    ):
        self._settings, self._tenants, self._replicas, self._matcher = settings, tenants, replicas, matcher

    def routes(self) -> list[Route]:
        """What is served; nothing without a key."""
        if not self._settings.admin_keys:
            return []
        return [
            Route("/admin/references", self._guarded(self._list), methods=["GET"]),
            Route("/admin/references", self._guarded(self._forget_all), methods=["DELETE"]),
            Route("/admin/references/{name}", self._guarded(self._forget), methods=["DELETE"]),
            Route("/admin/references/{name}/picture", self._guarded(self._picture), methods=["GET"]),
            Route("/admin/tenants", self._guarded(self._figures), methods=["GET"]),
            Route("/admin/replicas", self._guarded(self._states), methods=["GET"]),
            Route("/admin/settings", self._guarded(self._show_settings), methods=["GET"]),
        ]

    def _guarded(self, handler: _Handler) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            keeper = self._tenants.keeper(request.headers.get("authorization"))
            try:
                if keeper is None:
                    raise ApiError(401, "the Authorization header has no key of /admin", "invalid_api_key")
                return await handler(request, keeper)
            except ApiError as problem:
                return refusal(problem)

        return handle

    def _seen(self, keeper: str) -> list[tuple[str, str, KnownBackground]]:
        """Tenant, camera and reference of all that a keeper sees."""
        salts = {self._tenants.cache_salt(tenant): tenant for tenant in self._tenants.names(keeper)}
        found = []
        for known in self._matcher().known():
            salt, _, camera = known.namespace.partition("/")
            if salt in salts:
                found.append((salts[salt], camera, known))
        return found

    def _named(self, request: Request, keeper: str) -> tuple[str, KnownBackground]:
        name = request.path_params["name"]
        for tenant, _, known in self._seen(keeper):
            if reference_name(self._tenants.cache_salt(tenant), known.reference_id) == name:
                return tenant, known
        raise ApiError(404, f"there is no reference {name!r:.40}", "not_found")

    def _chosen(self, request: Request, keeper: str) -> list[tuple[str, str, KnownBackground]]:
        tenant, camera = request.query_params.get("tenant"), request.query_params.get("camera")
        return [
            each
            for each in self._seen(keeper)
            if tenant in (None, each[0]) and (camera is None or camera == each[1])
        ]

    async def _list(self, request: Request, keeper: str) -> Response:
        rows = [
            {
                "reference": reference_name(self._tenants.cache_salt(tenant), known.reference_id),
                "tenant": tenant,
                "camera": camera or None,
                "age_seconds": round(known.age, 1),
            }
            for tenant, camera, known in self._chosen(request, keeper)
        ]
        return JSONResponse({"object": "list", "data": rows})

    async def _forget_all(self, request: Request, keeper: str) -> Response:
        matcher = self._matcher()
        chosen = self._chosen(request, keeper)
        return JSONResponse({"forgotten": sum(matcher.forget(known.reference_id) for *_, known in chosen)})

    async def _forget(self, request: Request, keeper: str) -> Response:
        _, known = self._named(request, keeper)
        return JSONResponse({"forgotten": int(self._matcher().forget(known.reference_id))})

    async def _picture(self, request: Request, keeper: str) -> Response:
        tenant, known = self._named(request, keeper)
        if keeper != tenant:
            raise ApiError(403, f"pictures of {tenant} are shown to its own key only", "not_yours")
        reference = self._matcher().reference(known.reference_id)
        if reference is None:
            raise ApiError(404, "the reference was forgotten meanwhile", "not_found")
        side = reference.pixels.shape[0]
        owned = pixel_mask(reference.patch_mask, side, self._matcher().patch_size)
        buffer = BytesIO()
        Image.fromarray(np.dstack([reference.pixels, owned * np.uint8(255)])).save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    async def _figures(self, request: Request, keeper: str) -> Response:
        counts: dict[str, int] = {}
        for tenant, *_ in self._seen(keeper):
            counts[tenant] = counts.get(tenant, 0) + 1
        figures = {
            tenant: self._tenants.figures(tenant) | {"references": counts.get(tenant, 0)}
            for tenant in self._tenants.names(keeper)
        }
        return JSONResponse({"tenants": figures})

    async def _states(self, request: Request, keeper: str) -> Response:
        _everybodys(keeper)
        return JSONResponse({"replicas": self._replicas.states()})

    async def _show_settings(self, request: Request, keeper: str) -> Response:
        _everybodys(keeper)
        shown: dict[str, Any] = self._settings.model_dump(exclude={"secret", "keys", "admin_keys"})
        return JSONResponse(shown | {"tenants": self._tenants.names(keeper)})


def _everybodys(keeper: str) -> None:
    if keeper != EVERYBODY:
        raise ApiError(403, f'this needs a key of /admin that is for "{EVERYBODY}"', "not_yours")
