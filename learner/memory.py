"""How much memory a training rank holds."""


def memory_mib() -> dict[str, float]:
    """Resident memory of this process, and its CUDA peak where it uses CUDA, in MiB."""
    import psutil
    import torch

    memory = {"rss": psutil.Process().memory_info().rss / 2**20}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["cuda_peak"] = torch.cuda.max_memory_allocated() / 2**20
    return memory
