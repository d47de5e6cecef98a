"""Errors of the API."""

from typing import Any


class ApiError(Exception):
    """An error reply in OpenAI's format."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.message, self.status = message, status
        self.param, self.code = param, code

    def as_json(self) -> dict[str, Any]:
        """Return the body of the reply."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        fields = {"message": self.message, "type": kind}
        return {"error": fields | {"param": self.param, "code": self.code}}
