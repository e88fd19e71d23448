"""The error that a client gets when its request cannot be served: a status and one line, in the API's own form."""


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status code.
        message: one line that names the thing, the value found, the value wanted.
        code: a word that programs can compare.
        retry_after: seconds after which the same request may succeed; None: trying again makes no sense.
    """

    def __init__(self, status: int, message: str, code: str, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after

    def body(self) -> dict:
        """The JSON object, as the chat completions API writes errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": None}}

    def headers(self) -> dict[str, str]:
        """The HTTP headers that belong to the status."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers
