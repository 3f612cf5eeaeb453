"""Whole networks: the certificate of errors, and tuning."""

import pytest
import torch
from nets import calibrate, image

from resnet_fused.models import create_model
from resnet_fused.tuning import tune
from resnet_fused.verify import verify

#: The batch of test_gpu_ops.py, so that one compilation serves both.
X = image(8, 3, 224, 224)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet152"])
def test_certificate(name, dtype, device):
    x = X.float().to(device)
    model = calibrate(create_model(name).to(device), x).to(dtype)
    report = verify(model, x.to(dtype))
    assert report.ok, str(report)


def test_a_tuned_model(cache, device):
    """Each call has a choice that holds the 2x rule, is kept for later, and is what then runs."""
    x = image(2, 3, 224, 224).float().to(device)
    model = calibrate(create_model("resnet18").to(device), x).half()
    report = tune(model, x.half())
    assert all(row.choice is not None for row in report.rows), str(report)
    assert list(cache.iterdir()), "nothing was kept"
    again = tune(model, x.half())
    assert [row.choice for row in again.rows] == [row.choice for row in report.rows]
    assert all(row.tried == 0 for row in again.rows), "what is known was measured again"
    assert verify(model, x.half()).ok
