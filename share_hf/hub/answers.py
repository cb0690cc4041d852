"""Answers of the hub: waited for where it limits their rate, and told from those of others on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import parse_ratelimit_headers
from transformers.utils import logging


logger = logging.get_logger(__name__)

Answer = TypeVar("Answer")

# As often, and as long without being told, as `http_backoff` of huggingface_hub waits inside of uploads and listings.
_RETRIES = 5
_LONGEST_BACKOFF = 8.0  # seconds
# Most limits hold for five minutes. That of commits holds for an hour: a push that meets it is completed later.
_LONGEST_WAIT = 600.0  # seconds


class HubAnswerError(OSError):
    """An answer that the hub does not give, such as the web page of a proxy or of a network's sign-in."""


def answer_to(request: Callable[[], Answer]) -> Answer:
    """The answer to a request that `huggingface_hub` itself sends once, waited for while the hub limits the rate.

    Args:
        request: Sends it. It may be sent again, since a hub that refuses a request for its rate has not done it.

    Raises:
        HubAnswerError: If something else than the hub answers.
        HfHubHTTPError: Whatever the hub refuses, and a rate limit that lasts too long.
    """
    for attempt in range(_RETRIES + 1):
        try:
            return request()
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            # Of a download that could not begin, what the hub said is the cause.
            refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
            if attempt == _RETRIES or not isinstance(refusal, HfHubHTTPError):
                raise
            if refusal.response.status_code != HTTPStatus.TOO_MANY_REQUESTS:
                raise
            seconds = _seconds_to_wait(refusal.response.headers, attempt)
            if seconds > _LONGEST_WAIT:
                raise
            logger.warning("The hub limits the rate of requests, the next one is sent in %.0f s.", seconds)
            time.sleep(seconds)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise HubAnswerError(
                f"the hub's answer cannot be understood ({type(error).__name__}: {error}), expected JSON: a proxy or "
                "the sign-in page of a network may have answered in its place"
            ) from error
    raise AssertionError("unreachable")


def _seconds_to_wait(headers: Mapping[str, str], attempt: int) -> float:
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0  # its seconds are rounded
    told = headers.get("Retry-After", "").strip()
    return float(told) if told.isdigit() else min(_LONGEST_BACKOFF, 2.0**attempt)
