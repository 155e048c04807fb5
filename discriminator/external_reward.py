"""The user's own reward: a Python function or an HTTP service, called once for a whole step with a deadline.

Both kinds get three lists of equal length, `prompts` (rendered text), `responses` (text) and `complete`
(ended by itself, not by the length limit), and answer with one finite number per response:

    def short(prompts: list[str], responses: list[str], complete: list[bool]) -> list[float]: ...

    POST {"prompts": [...], "responses": [...], "complete": [...]}  ->  200 {"rewards": [...]}

A demonstration never comes here. Texts and token go to the configured host and to no other: redirects are
errors, and a token is sent by https or to this machine only.
"""

import ipaddress
import json
import math
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from discriminator.reward_config import RewardConfig
from discriminator.user_function import UserFunctionError, load_user_function

TAKES = "three lists (prompts, responses, complete) that returns one number per response"
UserReward = Callable[[list[str], list[str], list[bool]], Sequence[float]]

ANSWER_BYTES = 2**16
"""Most bytes of a service's answer, beside `REWARD_BYTES` for each response."""
REWARD_BYTES = 64


class UserRewardError(RuntimeError):
    """The user's reward failed, was late, or answered something else than a number per response; the message
    names it."""


def load_user_reward(config: RewardConfig) -> UserReward | None:
    """The configured function or a caller of the configured URL; None when there is none.

    Raises:
        UserRewardError: it cannot be loaded (`discriminator.user_function`), or the URL is not one that a
            token may go to.
    """
    spec = config.user_reward
    if not spec:
        return None
    if spec.startswith(("http://", "https://")):
        token = os.environ.get(config.user_token, "")
        _check_url(spec, token, config.user_token)
        return lambda prompts, responses, complete: _post(
            spec,
            {"prompts": prompts, "responses": responses, "complete": complete},
            token,
            config.user_timeout_s,
        )
    try:
        return load_user_function("user_reward", spec, 3, TAKES)
    except UserFunctionError as error:
        raise UserRewardError(str(error)) from error


def call_user_reward(
    function: UserReward,
    prompts: Sequence[str],
    responses: Sequence[str],
    complete: Sequence[bool],
    *,
    name: str,
    timeout_s: float,
) -> list[float]:
    """One reward per response, within the deadline. Blocking: an event loop calls it in a thread.

    The call runs in a daemon thread of its own, because neither a Python function nor a server that trickles
    can be interrupted; one that is late is left behind, and its answer thrown away.

    Args:
        function: from `load_user_reward`.
        prompts, responses, complete: of equal length.
        name: what errors call it (`user_reward`).
        timeout_s: for the whole call.

    Raises:
        UserRewardError: it raised, was late, or answered with other than one finite number per response.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(function(list(prompts), list(responses), list(complete)))
        except Exception as error:  # handed to the caller below, whatever it is
            answers.put(UserRewardError(f"user_reward {name}: {type(error).__name__}: {error}"))

    threading.Thread(target=work, name="user reward", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise UserRewardError(
            f"user_reward {name} gave no answer for {len(responses)} responses within {timeout_s:g} s "
            "(reward.user_timeout_s)"
        ) from None
    if isinstance(answer, UserRewardError):
        raise answer
    return _checked(answer, len(responses), name)


def _checked(answer: Any, count: int, name: str) -> list[float]:
    if isinstance(answer, str | bytes | dict) or not hasattr(answer, "__len__"):
        raise UserRewardError(f"user_reward {name} gave {type(answer).__name__}, not a list of numbers")
    if len(answer) != count:
        raise UserRewardError(f"user_reward {name} gave {len(answer)} rewards for {count} responses")
    out = []
    for row, item in enumerate(answer):
        try:
            value = float(item)
        except (TypeError, ValueError, OverflowError):
            shown = repr(item)[:80]
            raise UserRewardError(f"user_reward {name}: reward {row} is {shown}, not a number") from None
        if not math.isfinite(value):
            raise UserRewardError(f"user_reward {name}: reward {row} is {value}")
        out.append(value)
    return out


def _check_url(url: str, token: str, variable: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - parsing it is the check
    except ValueError as error:
        raise UserRewardError(f"user_reward is not a URL: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise UserRewardError(f"user_reward has credentials in its URL; put a token into {variable} instead")
    if token and parts.scheme == "http" and not _loopback(parts.hostname or ""):
        raise UserRewardError(
            f"user_reward {url} would get the token of {variable} in plain text; "
            "use https, or unset the variable"
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Answers that lead elsewhere are errors: urllib would take the token along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, body: dict[str, Any], token: str, timeout_s: float) -> Sequence[float]:
    """One JSON request; `timeout_s` bounds each wait on the socket, the caller bounds the whole."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers, method="POST")
    direct = [urllib.request.ProxyHandler({})] if _loopback(urlsplit(url).hostname or "") else []
    most = ANSWER_BYTES + REWARD_BYTES * len(body["responses"])
    try:
        opener = urllib.request.build_opener(_SameHost, *direct)
        with opener.open(request, timeout=timeout_s) as response:
            raw = response.read(most + 1)
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400:
            raise ValueError(f"HTTP {error.code}: redirects are not followed; name the final URL") from None
        detail = error.read(500).decode(errors="replace").strip()
        raise ValueError(f"HTTP {error.code} {error.reason}: {detail}") from None
    except urllib.error.URLError as error:
        raise ConnectionError(f"cannot be reached: {error.reason}") from None
    if len(raw) > most:
        raise ValueError(f"the answer is longer than {most} bytes")
    answer = json.loads(raw)
    if not isinstance(answer, dict) or "rewards" not in answer:
        raise ValueError('the answer is not a JSON object with a list "rewards"')
    return answer["rewards"]
