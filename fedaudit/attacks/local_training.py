"""What a client would send for given inputs: its local SGD steps as a differentiable function of them."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedaudit.attacks.attacked_model import flat
from fedaudit.types import Loss

Imagined = Callable[[Tensor, Tensor], Tensor]


def epoch_batches(num_examples: int, batch_size: int, steps: int) -> list[list[int]]:
    """Batch sizes of each local epoch, as plain mini-batch training without replacement uses them.

    The last batch of an epoch may be smaller; the last epoch may be cut off.

    Raises:
        ValueError: if a number is not positive.

    >>> epoch_batches(5, 2, 4)
    [[2, 2, 1], [2]]
    """
    if min(num_examples, batch_size, steps) < 1:
        raise ValueError(
            f"examples, batch size and steps must be positive, got {num_examples}, {batch_size} and "
            f"{steps}: state what the client used"
        )
    per_epoch = math.ceil(num_examples / batch_size)
    sizes = [min(batch_size, num_examples - start) for start in range(0, num_examples, batch_size)]
    epochs = [list(sizes) for _ in range(steps // per_epoch)]
    if steps % per_epoch:
        epochs.append(sizes[: steps % per_epoch])
    return epochs


def imagined_update(
    model: nn.Module,
    loss: Loss,
    names: Sequence[str],
    batches: Sequence[slice],
    lr: float,
    *,
    vectorisable: bool = True,
) -> Imagined:
    """The function (x, y) -> mean gradient along plain SGD (P,), which is (theta_0 - theta_T) / (lr T).

    Step t takes the gradient of the mean loss on x[batches[t]] at theta_t and moves to
    theta_t - lr * gradient. With one batch it is the gradient at theta_0. The result can be differentiated
    with respect to x (N, *input_shape) and to soft labels y.

    Source: unrolled as in Geiping et al. 2020, arXiv 2003.14053, section 6, and Dimitrov et al. 2022,
    arXiv 2206.12395.

    Args:
        model: at theta_0, in the mode to attack; all its trainable parameters move. Not changed.
        loss: SUM-reduced.
        names: parameters that are compared, in the order of the result.
        batches: which examples each step uses.
        lr: local learning rate.
        vectorisable: use `torch.func.grad`, which `torch.func.vmap` understands; otherwise plain autograd,
            which takes any module.
    """
    known = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(batches) == 1:
        trained = [name for name in trained if name in set(names)]
    start = {name: known[name] for name in trained}
    fixed = {name: value for name, value in known.items() if name not in start}

    def mean_loss(parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(model, {**fixed, **parameters}, (x,))
        return loss(outputs, y) / len(x)

    def plain(parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        leaves = {name: p if p.requires_grad else p.requires_grad_() for name, p in parameters.items()}
        slopes = torch.autograd.grad(
            mean_loss(leaves, x, y), list(leaves.values()), create_graph=True, materialize_grads=True
        )
        return dict(zip(leaves, slopes, strict=True))

    gradient = grad(mean_loss) if vectorisable else plain

    def update(x: Tensor, y: Tensor) -> Tensor:
        parameters = dict(start) if vectorisable else {n: p.clone() for n, p in start.items()}
        total: dict[str, Tensor] = {}
        for t, batch in enumerate(batches):
            slopes = gradient(parameters, x[batch], y[batch])
            total = {n: total[n] + slopes[n] for n in names} if t else {n: slopes[n] for n in names}
            if t + 1 < len(batches):
                parameters = {name: p - lr * slopes[name] for name, p in parameters.items()}
        path = flat([total[name] for name in names])
        return path / len(batches) if len(batches) > 1 else path

    return update
