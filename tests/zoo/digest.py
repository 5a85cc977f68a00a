"""What an adapted model is, in a few words that another process can compare: its code, its adapters, its logits."""

from __future__ import annotations

import hashlib

import torch

from cadapt.adapted import AdaptedModel
from cadapt.hashing import hash_tensors
from tests.zoo.livened import wake


@torch.no_grad()
def digest_of(model: AdaptedModel, images: torch.Tensor) -> dict[str, str]:
    """Digests of a fresh adapted model's graph and initial adapters, and of its logits in eval mode once they wake.

    Its adapters are awake afterwards, and the model is in eval mode.
    """
    code = model.graph.python_code("self").src
    initial = hash_tensors(model.adapters.state_dict().items())
    wake(model.adapters)
    logits = model.eval()(images)
    return {
        "code": hashlib.sha256(code.encode()).hexdigest()[:16],
        "adapters": initial[:16],
        "logits": hash_tensors([("logits", logits)])[:16],
    }
