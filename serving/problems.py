"""What a client is told when a request cannot be served: a status and one line, in the API's own form."""


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP's.
        message: names the thing, the value found, the value wanted.
        code: a word for programs.
        retry_after: seconds, where trying again later makes sense.
    """

    def __init__(self, status: int, message: str, code: str, retry_after: float | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after

    def body(self) -> dict:
        """As the chat completions API writes errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": None}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers
