"""Is a model or data set on the hub, answered within seconds.

The hub client retries an unreachable host for about a minute before it gives up, per file. One request with a
deadline tells whether trying is worth it.
"""


def hub_problem(repository: str, timeout_s: float = 5.0) -> str | None:
    """Why `repository` cannot be fetched from the model hub right now, in one line, or None when it can.

    HF_HUB_OFFLINE is respected: it is then a problem like any other.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repository, timeout=timeout_s)
    except Exception as error:  # the HTTP library below the hub client, and so its errors, differ by version
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None
