"""Federated averaging in pfl 0.6, run by an interpreter that has pfl: ``python pfl_federation.py FILE ...``.

FILE is an .npz archive: the clients' examples and labels (`x` (N, n, 1, 28, 28), `y` (N, n)) and the initial
weights under ``weights/<name>``. Every line on standard input runs one round, answered with one line of JSON:
its wall and CPU seconds.
"""

import argparse
import json
import sys
import time
from collections import OrderedDict
from importlib import metadata

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn.functional import cross_entropy


class Network(nn.Sequential):
    """The registered model "cnn" of fedaudit: the weights are loaded by name, which checks it."""

    def __init__(self) -> None:
        layers: dict[str, nn.Module] = {}
        channels = 1
        for number, outputs in enumerate((16, 32, 64), 1):
            layers[f"conv{number}"] = nn.Conv2d(channels, outputs, 3, padding=1)
            layers[f"norm{number}"] = nn.GroupNorm(4, outputs)
            layers[f"act{number}"] = nn.ReLU()
            layers[f"pool{number}"] = nn.AvgPool2d(2) if number < 3 else nn.AdaptiveAvgPool2d(4)
            channels = outputs
        layers |= {"flatten1": nn.Flatten(), "fc1": nn.Linear(channels * 16, 10)}
        super().__init__(OrderedDict(layers))

    def loss(self, x, y):  # type: ignore[no-untyped-def]
        """Mean cross-entropy, as pfl wants it."""
        return cross_entropy(self(x), y)

    def metrics(self, x, y):  # type: ignore[no-untyped-def]
        """Never asked for: evaluation is off."""
        return {}


class OnRequest(TrainingProcessCallback):
    """Says what a round took, then waits for the next request; the end of standard input ends training."""

    def __init__(self) -> None:
        self.wait()

    def wait(self) -> bool:
        """Whether another round is wanted; the clock starts when it is."""
        wanted = bool(sys.stdin.readline())
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return wanted

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # type: ignore[no-untyped-def]
        """Answer and wait."""
        took = [time.perf_counter() - self.wall, time.process_time() - self.cpu]
        print(json.dumps(took), flush=True)
        return not self.wait(), Metrics()


def main() -> None:
    """Read the federation, then run rounds on request."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--cohort", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with np.load(options.file) as archive:
        arrays = dict(archive)
    network = Network()
    weights = {
        name.removeprefix("weights/"): torch.from_numpy(a) for name, a in arrays.items() if "/" in name
    }
    network.load_state_dict(weights, strict=True)
    network.train()
    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    users = [
        PyTorchTensorDataset((torch.from_numpy(x), torch.from_numpy(y)), user_id=str(user))
        for user, (x, y) in enumerate(zip(arrays["x"], arrays["y"], strict=True))
    ]
    sampler = get_user_sampler("random", list(range(len(users))))
    training = FederatedDataset(users.__getitem__, sampler)
    print(json.dumps({"pfl": metadata.version("pfl"), "torch": torch.__version__}), flush=True)
    FederatedAveraging().run(
        backend=SimulatedBackend(training_data=training, val_data=training),
        model=model,
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=10**9,
            evaluation_frequency=10**9,
            train_cohort_size=options.cohort,
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=options.lr, local_batch_size=options.batch_size
        ),
        callbacks=[OnRequest()],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main()
