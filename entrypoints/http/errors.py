"""What went wrong, as HTTP says it: a status and a body in OpenAI's shape or LoRAX's."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from loraplex.engine.core_client import EngineDeadError
from loraplex.engine.errors import RequestError

logger = logging.getLogger(__name__)

# The house's messages for a bad value begin with the field: "top_p=2 is not allowed: ...".
FIELD = re.compile(r"([a-z_]+(?:\.[a-z_]+)?)(?:\[[^\]]*\])?=")


@dataclass
class ApiError(Exception):
    """A refusal by the server itself."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    """Seconds, for the header of this name."""

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {
            "message": self.message,
            "type": self._type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


class LoraxError(ApiError):
    """One in LoRAX's shape."""

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.message, "error_type": self.code}


class IncompleteGeneration(RuntimeError):
    """A generation ended before it was finished."""


def to_api_error(error: Exception) -> ApiError:
    """The error as the client gets to see it; one that nobody foresaw is logged. So this is for
    answers: `status_of` tells the rest."""
    foreseen = _foreseen(error)
    if foreseen is not None:
        return foreseen
    logger.error("A request failed.", exc_info=error)
    return ApiError(500, "internal error; the server's log says more", code="internal_error")


def status_of(error: Exception) -> int:
    """Of the answer that the client gets."""
    foreseen = _foreseen(error)
    return 500 if foreseen is None else foreseen.status


def _foreseen(error: Exception) -> ApiError | None:
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _from_validation(error)
        case HTTPException(__cause__=UnicodeDecodeError()):
            return ApiError(400, "the body is no JSON: it is not in UTF-8")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case EngineDeadError():
            return ApiError(503, str(error), code="engine_dead")
        case IncompleteGeneration():
            return ApiError(500, str(error), code="incomplete_generation")
        case RequestError():
            api_error = _from_value_error(error, error.status)
            api_error.retry_after = error.retry_after
            return api_error
        case ValueError():
            return _from_value_error(error, 400)
    return None


def to_lorax_error(error: Exception) -> LoraxError:
    """The error as LoRAX's clients know it: what an adapter or the engine fails with is a failed
    generation, a mistake in the request a failed validation."""
    if isinstance(error, LoraxError):
        return error
    api_error = to_api_error(error)
    message, retry_after = api_error.message, api_error.retry_after
    status, kind, prefix = api_error.status, "generation", "Request failed during generation: "
    if status == 429 or retry_after is not None:
        status, kind, prefix = 429, "overloaded", "Model is overloaded: "
    elif isinstance(error, IncompleteGeneration):
        kind, prefix = "incomplete_generation", "Incomplete generation: "
    elif isinstance(error, RequestError) or api_error.code == "model_not_found":
        status = 424 if status < 500 else status
    elif status in (400, 422):
        status, kind, prefix = 422, "validation", "Input validation error: "
    elif status < 500:
        kind, prefix = api_error.code or "refused", ""
    return LoraxError(status, prefix + message, code=kind, retry_after=retry_after)


def _from_value_error(error: ValueError, status: int) -> ApiError:
    message = str(error)
    match = FIELD.match(message)
    field = match[1] if match else None
    if "max_model_len" in message:
        return ApiError(status, message, field or "prompt", "context_length_exceeded")
    return ApiError(status, message, field)


def _from_validation(error: RequestValidationError) -> ApiError:
    """The first of the body's faults."""
    fault = error.errors()[0]
    context = fault.get("ctx", {})
    location = list(fault["loc"])[1:]
    if "field" in context:
        location.append(context["field"])
    param = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in location).lstrip(".")
    match fault["type"]:
        case "missing" if not location:
            return ApiError(400, "the body is missing: it must be a JSON object")
        case "model_attributes_type" if not location:
            hint = " (its Content-Type must be application/json)" * isinstance(error.body, bytes)
            return ApiError(400, f"the body is no JSON object{hint}")
        case "json_invalid":
            return ApiError(400, f"the body is no JSON: {context.get('error', fault['msg'])}")
        case "extra_forbidden":
            return ApiError(
                400, f"{param!r} is not a field that this server knows", param, "unknown_field"
            )
        case "missing":
            return ApiError(400, f"the field {param!r} is missing", param)
    message = str(context["error"]) if "error" in context else fault["msg"]
    return ApiError(400, f"{param}: {message}" if param else message, param or None)
