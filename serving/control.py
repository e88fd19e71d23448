"""What a client may say about matching, request by request: whose references, how strictly, or not at all.

By the headers `X-Backdrop-Camera`, `X-Backdrop-Match` and `X-Backdrop-Tolerance`, or, for clients that can set only the
body, by its object `backdrop` (`{"camera": ..., "match": ..., "tolerance": ...}`). A header wins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .problems import ApiError

MATCH = ("on", "strict", "off")
CAMERA_CHARACTERS = 128


@dataclass(frozen=True)
class Control:
    """How a request's images are matched; None: as the gateway is set.

    Attributes:
        camera: names references of their own, among the tenant's.
        match: "on"; "strict" reuses equal pixels only; "off" neither uses references nor leaves any.
        tolerance: largest staleness that is reused, grey levels.
    """

    camera: str | None = None
    match: str | None = None
    tolerance: float | None = None

    @property
    def matches(self) -> bool:
        """Whether references are used and left."""
        return self.match != "off"

    @property
    def limit(self) -> float | None:
        """The tolerance of this request, None for the gateway's."""
        return 0.0 if self.match == "strict" else self.tolerance

    def namespace(self, salt: str) -> str:
        """Names the references: within the tenant's, which its cache salt names, those of the camera."""
        return f"{salt}/{self.camera}" if self.camera else salt

    def over(self, other: "Control") -> "Control":
        """This, and what it leaves open as `other` has it."""
        chosen = {}
        for each in fields(self):
            value = getattr(self, each.name)
            chosen[each.name] = getattr(other, each.name) if value is None else value
        return Control(**chosen)


def read_control(given: Any, user: Any = None) -> Control:
    """The control of a request's body.

    Args:
        given: its object `backdrop`, or None.
        user: names the camera where `given` does not.

    Raises:
        ApiError: 400, names the field.
    """
    if given is not None and not isinstance(given, dict):
        raise ApiError(400, f"backdrop is a {type(given).__name__}; wanted an object", "invalid_body")
    values = {name: value for name, value in (given or {}).items() if value is not None}
    known = [each.name for each in fields(Control)]
    for name in values:
        if name not in known:
            raise ApiError(
                400, f"unknown field backdrop.{name:.80}; wanted {', '.join(known)}", "unknown_field"
            )
    if "camera" not in values and isinstance(user, str) and user:
        values["camera"] = user
    return _checked("backdrop.", values)


def header_control(headers: Mapping[str, str]) -> Control:
    """The control of a request's headers.

    Raises:
        ApiError: 400, names the header.
    """
    values: dict[str, Any] = {}
    for name in ("camera", "match", "tolerance"):
        text = headers.get(f"x-backdrop-{name}", "").strip()
        if text:
            values[name] = text
    if "tolerance" in values:
        try:
            values["tolerance"] = float(values["tolerance"])
        except ValueError:
            raise _wrong("X-Backdrop-", "tolerance", values["tolerance"], "0 to 255") from None
    if "match" in values:
        values["match"] = values["match"].lower()
    return _checked("X-Backdrop-", values)


def _checked(where: str, values: dict[str, Any]) -> Control:
    camera, match, tolerance = (values.get(name) for name in ("camera", "match", "tolerance"))
    if camera is not None and not (
        isinstance(camera, str) and 0 < len(camera) <= CAMERA_CHARACTERS and camera.isprintable()
    ):
        raise _wrong(where, "camera", camera, f"1 to {CAMERA_CHARACTERS} printable characters")
    if match is not None and match not in MATCH:
        raise _wrong(where, "match", match, ", ".join(MATCH))
    if tolerance is not None and (
        isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance <= 255
    ):
        raise _wrong(where, "tolerance", tolerance, "0 to 255")
    return Control(camera, match, tolerance)


def _wrong(where: str, name: str, value: Any, wanted: str) -> ApiError:
    shown = name.capitalize() if where.endswith("-") else name
    return ApiError(400, f"{where}{shown} is {value!r:.60}; wanted {wanted}", "invalid_value")
