"""Which layers vLLM's life cycle of an update really loaded."""

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from rollout.weight_transfer import _check_loaded
from rollout.wire import WireError


def test_a_loader_that_writes_past_the_life_cycle_is_an_error() -> None:
    """As vLLM's own for gpt-oss does: it reports the parameter, and the layer keeps its old weights."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    names = {name for name, _ in model.named_parameters()}
    record_metadata_for_reloading(model)
    before = [layer.weight.data.clone() for layer in model]
    initialize_layerwise_reload(model)
    model[0].weight.weight_loader(model[0].weight, torch.zeros(2, 2))
    model[1].weight.data.copy_(torch.zeros(2, 2))
    with pytest.raises(
        WireError, match=r"worker 3: vLLM does not reload 1 parameters of Sequential.*1\.weight"
    ):
        _check_loaded(model, names, "worker 3")
    finalize_layerwise_reload(model, None)
    assert not model[0].weight.any()
    assert torch.equal(model[1].weight, before[1])

    initialize_layerwise_reload(model)
    for layer in model:
        layer.weight.weight_loader(layer.weight, torch.ones(2, 2))
    _check_loaded(model, names, "worker 3")
    finalize_layerwise_reload(model, None)
    assert all(bool((layer.weight == 1).all()) for layer in model)
