"""`optimizer.norm_in_products`: the norm that the optimizer clips by, where products leave the squares of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckptbridge.kernels.experts import ProductsConfig, weight_gradient
from ckptbridge.kernels.main_gradient import main_gradient_of
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection


class Net(nn.Module):
    """Stacked matrices, whose gradient a grouped product computes, and a vector."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.zeros(3, 8, 16, dtype=torch.bfloat16, device=device))
        self.wide = nn.Parameter(torch.zeros(300, device=device))


@pytest.mark.parametrize("wanted", [False, True])
def test_norm_of_a_step_is_that_of_all_gradients(wanted, device):
    net = Net(device)
    optimizer = Optimizer(net, OptimizerSection(norm_in_products=wanted), backend="triton")
    config = ProductsConfig(matmul="triton", weight_gradient="triton")
    main_gradient = main_gradient_of(net.stacked)
    d, x = (torch.randn(9, width, device=device).bfloat16() for width in (8, 16))
    ends_E = torch.tensor([2, 2, 9], dtype=torch.int32, device=device)
    squares = sum((d[rows].double().t() @ x[rows].double()).square().sum() for rows in (slice(2), slice(2, 9)))
    for products in (1, 2):  # the second adds to the first, whose squares then are not those of the sum
        for _ in range(products):
            weight_gradient(d, x, ends_E, net.stacked, main_gradient, config)
        assert (main_gradient.squares is not None) == (wanted and products == 1)
        main_gradient_of(net.wide).add(torch.ones(300, device=device))
        assert optimizer.step(1e-3) == pytest.approx((products**2 * squares + 300).sqrt().item(), rel=1e-6)
