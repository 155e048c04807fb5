"""The user's own reward: a Python function or an HTTP service, called once for a whole step with a deadline.

Both kinds get three lists of equal length, `prompts` (rendered text), `responses` (text) and `complete`
(ended by itself, not by the length limit), and answer with one finite number per response:

    def short(prompts: list[str], responses: list[str], complete: list[bool]) -> list[float]: ...

    POST {"prompts": [...], "responses": [...], "complete": [...]}  ->  200 {"rewards": [...]}

A demonstration never comes here.
"""

import json
import math
import os
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from discriminator.reward_config import RewardConfig
from discriminator.user_function import UserFunctionError, load_user_function

TAKES = "three lists (prompts, responses, complete) that returns one number per response"
UserReward = Callable[[list[str], list[str], list[bool]], Sequence[float]]


class UserRewardError(RuntimeError):
    """The user's reward failed, was late, or answered something else than a number per response; the message
    names it."""


def load_user_reward(config: RewardConfig) -> UserReward | None:
    """The configured function or a caller of the configured URL; None when there is none.

    Raises:
        UserRewardError: it cannot be loaded (`discriminator.user_function`).
    """
    spec = config.user_reward
    if not spec:
        return None
    if spec.startswith(("http://", "https://")):
        token = os.environ.get(config.user_token, "")
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
        except (TypeError, ValueError):
            raise UserRewardError(f"user_reward {name}: reward {row} is {item!r}, not a number") from None
        if not math.isfinite(value):
            raise UserRewardError(f"user_reward {name}: reward {row} is {value}")
        out.append(value)
    return out


def _post(url: str, body: dict[str, Any], token: str, timeout_s: float) -> Sequence[float]:
    """One JSON request; `timeout_s` bounds each wait on the socket, the caller bounds the whole."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            raw = response.read()
    except urllib.error.HTTPError as error:
        detail = error.read(500).decode(errors="replace").strip()
        raise ValueError(f"HTTP {error.code} {error.reason}: {detail}") from None
    except urllib.error.URLError as error:
        raise ConnectionError(f"cannot be reached: {error.reason}") from None
    answer = json.loads(raw)
    if not isinstance(answer, dict) or "rewards" not in answer:
        raise ValueError('the answer is not a JSON object with a list "rewards"')
    return answer["rewards"]
