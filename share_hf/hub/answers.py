"""Answers of the Hub: wait while it limits the rate, and distinguish them from answers of others on the way."""

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

# Retries, and longest wait if the Hub states none, as in huggingface_hub's `http_backoff` for uploads and listings.
_RETRIES = 5
_LONGEST_BACKOFF = 8.0  # seconds
# Most limits apply for five minutes. That on commits applies for an hour: a push that hits it is completed later.
_LONGEST_WAIT = 600.0  # seconds


class HubAnswerError(OSError):
    """An answer that the Hub does not give, such as the web page of a proxy or a network's sign-in page."""


def answer_to(request: Callable[[], Answer]) -> Answer:
    """Return the answer to a request that `huggingface_hub` itself sends only once, waiting out rate limits.

    Args:
        request: Function that sends the request. It may be called again, because a Hub that refuses a request for its
            rate has not carried it out.

    Raises:
        HubAnswerError: If something other than the Hub answers.
        HfHubHTTPError: If the Hub refuses the request, or a rate limit lasts too long.
    """
    for attempt in range(_RETRIES + 1):
        try:
            return request()
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            # If a download could not begin, the Hub's answer is the cause.
            refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
            if attempt == _RETRIES or not isinstance(refusal, HfHubHTTPError):
                raise
            if refusal.response.status_code != HTTPStatus.TOO_MANY_REQUESTS:
                raise
            seconds = _seconds_to_wait(refusal.response.headers, attempt)
            if seconds > _LONGEST_WAIT:
                raise
            logger.warning("The Hub limits the rate of requests; the next one is sent in %.0f s.", seconds)
            time.sleep(seconds)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise HubAnswerError(
                f"the Hub's answer cannot be understood ({type(error).__name__}: {error}), expected JSON: a proxy or "
                "the sign-in page of a network may have answered in its place"
            ) from error
    raise AssertionError("unreachable")


def _seconds_to_wait(headers: Mapping[str, str], attempt: int) -> float:
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0  # because the seconds are rounded
    told = headers.get("Retry-After", "").strip()
    return float(told) if told.isdigit() else min(_LONGEST_BACKOFF, 2.0**attempt)
