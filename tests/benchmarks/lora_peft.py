"""LoRA as the package ``peft`` adds it to a timm model: one of the competitors.

Rank 8 on the convs that conv-par adapts. PEFT's second factor has as many groups as the conv, which must divide its
rank: a grouped conv gets the multiple of its groups next to 8, and where the convs are depth-wise, and every channel
would be its own rank, LoRA goes to the dense layers of the same blocks instead, as PEFT's users do.
"""

from __future__ import annotations

import importlib.util

from torch import nn

from tests.benchmarks.places import classifier_of, find_family, find_modules
from tests.benchmarks.unavailable import Unavailable

RANK = 8
# beyond this a grouped conv's smallest rank is no low rank any more
_HIGHEST_RANK = 32


def add_lora(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return PEFT's model around ``model`` with LoRA and the classifier trainable, and a note on where LoRA went.

    Raises:
        Unavailable: ``peft`` is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise Unavailable("peft is not installed: pip install -r tests/benchmarks/requirements.txt")
    import peft

    ranks, note = choose_ranks(model, name)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks, bias="none"
    )
    classifier = classifier_of(model)
    adapted = peft.get_peft_model(model, config)
    classifier.requires_grad_(True)
    return adapted, note


def choose_ranks(model: nn.Module, name: str) -> tuple[dict[str, int], str]:
    """Return the rank for each layer's path, and a note for the report where they are not 8 on the same convs."""
    family = find_family(name)
    if family.functional is not None:
        convs = find_modules(model, family.functional)
        ranks = {path: _rank(conv.groups) for path, conv in convs.items() if isinstance(conv, nn.Conv2d)}
        if max(ranks.values()) <= _HIGHEST_RANK:
            odd = sorted(set(ranks.values()) - {RANK})
            return ranks, f"rank {odd} where 8 does not divide by the conv's groups" if odd else ""
    assert family.dense is not None, name
    layers = find_modules(model, family.dense)
    why = "PEFT cannot put a low rank on convs of so many groups" if family.functional else "no functional convs"
    return dict.fromkeys(layers, RANK), f"{why}: on the blocks' dense layers"


def _rank(groups: int) -> int:
    return groups * max(1, round(RANK / groups))
