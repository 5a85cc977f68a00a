"""A layer that is used at two places takes no adapter up, whether it is called, traced through or read."""

import torch
from timm.layers import LayerNorm2d
from torch import nn

import cadapt
from cadapt.merging import merge
from tests.models import enliven, randomise


class Twice(nn.Module):
    """A norm that is traced through, and a linear layer whose weight is read, both used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = LayerNorm2d(8)
        self.mix, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        x = (x + self.norm(self.conv(x))).mean((2, 3))
        for _ in range(2):
            x = nn.functional.linear(x, self.mix.weight, self.mix.bias).relu()
        return self.fc(x)


def test_layers_used_twice_keep_their_adapters() -> None:
    model = cadapt.insert(randomise(Twice()).eval(), "ssf", img_size=16)
    enliven(model.adapters, scale=0.3)
    merged, report = merge(model.eval())
    assert report.verified
    reasons = {row.site: row.reason for row in report.sites}
    assert [site for site, reason in reasons.items() if not reason] == ["stem", "conv"]
    assert all("used 2 times" in reason for site, reason in reasons.items() if site not in ("stem", "conv"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(merged(images), model(images), rtol=1e-5, atol=1e-5)
