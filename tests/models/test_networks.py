"""Models: shapes, seeds, initial weights, and fitness for Opacus and per-example gradients."""

import threading
import warnings

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.func import functional_call, grad, vmap

from fedaudit.errors import ConfigError
from fedaudit.models.build import build_model
from fedaudit.registry import MODELS

SPECS = {
    "logistic": (2, 5, 5),
    "mlp": (2, 5, 5),
    "mlp(hidden=6-5, activation=tanh)": (7,),
    "lenet": (2, 9, 8),
    "cnn(width=4)": (2, 9, 8),
    "cnn(width=4, activation=sigmoid)": (1, 8, 8),
    "convnet(width=4)": (2, 10, 9),
    "convnet(width=4, norm=group, activation=sigmoid)": (1, 9, 9),
    "alexnet(hidden=8)": (2, 17, 16),
    "resnet18": (1, 8, 8),
    "imprinted(base=cnn, bins=6)": (1, 8, 8),
}
each_model = pytest.mark.parametrize(("spec", "shape"), SPECS.items(), ids=SPECS.keys())


def parameters_of(model):
    return sum(p.numel() for p in model.parameters())


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_every_registered_model_is_covered_here():
    assert {spec.partition("(")[0] for spec in SPECS} == set(MODELS)


@each_model
def test_unflattened_inputs_give_one_output_per_class(spec, shape):
    assert build_model(spec, shape, 3, seed=0)(torch.rand(2, *shape)).shape == (2, 3)


@each_model
def test_opacus_accepts_the_model_and_gives_exact_per_example_gradients(spec, shape):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, *shape, generator=generator), torch.tensor([0, 2])
    model = build_model(spec, shape, 3, seed=0)
    assert ModuleValidator.validate(model, strict=False) == []
    plain = build_model(spec, shape, 3, seed=0)
    expected = []
    for i in range(2):
        loss = nn.functional.cross_entropy(plain(x[i : i + 1]), y[i : i + 1])
        expected.append(torch.autograd.grad(loss, list(plain.parameters())))

    wrapped = GradSampleModule(model, loss_reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # hooks fire although x needs no gradient
        nn.functional.cross_entropy(wrapped(x), y, reduction="sum").backward()
    for p, *per_example in zip(wrapped.parameters(), *expected, strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(per_example), rtol=1e-3, atol=1e-5)


@each_model
def test_the_model_can_be_vectorised_over_examples(spec, shape):
    model = build_model(spec, shape, 3, seed=0)
    own = dict(model.named_parameters())

    def loss(parameters, one):
        return functional_call(model, parameters, (one[None],)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(own, torch.rand(2, *shape))
    assert {name: g.shape[1:] for name, g in gradients.items()} == {n: p.shape for n, p in own.items()}


@each_model
def test_the_output_of_an_example_does_not_depend_on_the_others(spec, shape):
    model = build_model(spec, shape, 3, seed=0)
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)


@each_model
def test_the_gradient_can_be_differentiated_again(spec, shape):
    model = build_model(spec, shape, 3, seed=0)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1]))
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (second,) = torch.autograd.grad(sum(g.square().sum() for g in first), x)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


@pytest.mark.parametrize("spec", ["mlp", "lenet"])
def test_equal_seeds_give_equal_and_other_seeds_other_weights(spec):
    first = weights(build_model(spec, (1, 8, 8), 10, seed=3))
    torch.rand(5)
    assert torch.equal(first, weights(build_model(spec, (1, 8, 8), 10, seed=3)))
    assert not torch.equal(first, weights(build_model(spec, (1, 8, 8), 10, seed=4)))


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("logistic", "flatten1 fc1"),
        ("mlp(hidden=6-5)", "flatten1 fc1 act1 fc2 act2 fc3"),
        ("lenet", "conv1 act1 conv2 act2 conv3 act3 flatten1 fc1"),
        (
            "cnn(width=4)",
            "conv1 norm1 act1 pool1 conv2 norm2 act2 pool2 conv3 norm3 act3 pool3 flatten1 fc1",
        ),
    ],
)
def test_layers_are_named_by_kind_and_number_in_forward_order(spec, names):
    assert [name for name, _ in build_model(spec, (1, 8, 8), 3, seed=0).named_children()] == names.split()


def test_names_leave_the_weights_those_of_the_same_layers_without_names():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3))
    assert torch.equal(weights(build_model("mlp(hidden=6)", (1, 8, 8), 3, seed=7)), weights(plain))


@pytest.mark.parametrize("hidden", ["8", "0"], ids=["built", "refused"])
def test_building_leaves_the_global_generator_alone(hidden):
    before = torch.get_rng_state()
    try:
        build_model(f"mlp(hidden={hidden})", (4,), 2, seed=7)
    except ConfigError:
        assert hidden == "0"
    assert torch.equal(before, torch.get_rng_state())


def test_threads_that_build_at_once_get_the_weights_of_their_seed():
    seeds = list(range(6)) * 2
    built = {}

    def work(place):
        built[place] = weights(build_model("mlp(hidden=64-64)", (64,), 10, seed=seeds[place]))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(seeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, seed in enumerate(seeds):
        assert torch.equal(built[place], weights(build_model("mlp(hidden=64-64)", (64,), 10, seed=seed)))


def test_lenet_weights_and_biases_are_uniform_between_minus_and_plus_one_half():
    own = weights(build_model("lenet", (3, 32, 32), 100, seed=0)).double()
    assert own.min() >= -0.5
    assert own.max() <= 0.5
    # mean 0 with variance 1/12; the sample variance has variance (1/80 - 1/144) / n
    n = len(own)
    assert abs(own.mean()) < 5 * (1 / 12 / n) ** 0.5
    assert abs(own.var() - 1 / 12) < 5 * ((1 / 80 - 1 / 144) / n) ** 0.5


def test_lenet_for_cifar_has_the_768_features_of_the_paper():
    model = build_model("lenet", (3, 32, 32), 100, seed=0)
    assert model[-1].in_features == 768
    strides = [layer.stride[0] for layer in model if isinstance(layer, nn.Conv2d)]
    assert strides == [2, 2, 1]


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        ("logistic", (1, 8, 8), 64 * 10 + 10),
        ("mlp", (1, 8, 8), 64 * 64 + 64 + 64 * 10 + 10),
        ("mlp(hidden=64-32)", (1, 8, 8), 64 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10),
        ("cnn", (1, 28, 28), 160 + 32 + 4640 + 64 + 18496 + 128 + 10250),
    ],
)
def test_parameter_counts_are_those_of_the_layers(spec, shape, expected):
    assert parameters_of(build_model(spec, shape, 10, seed=0)) == expected


def test_the_documented_size_of_cnn_is_true():
    assert parameters_of(build_model("cnn", (1, 28, 28), 10, seed=0)) == 33_770


def test_resnet_reduces_a_small_image_eightfold_only():
    model = build_model("resnet18", (3, 32, 32), 10, seed=0)
    features = nn.Sequential(*list(model.children())[:-2])
    assert features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)


def test_resnet_reduces_a_large_image_as_in_the_paper():
    model = build_model("resnet18", (1, 96, 96), 10, seed=0)
    features = nn.Sequential(*list(model.children())[:-2])
    assert features(torch.zeros(1, 1, 96, 96)).shape == (1, 512, 3, 3)


def test_resnet_without_in_place_sums_computes_what_torchvision_does():
    from fedaudit.vision import torchvision

    ours = build_model("resnet18", (3, 96, 96), 10, seed=0)
    theirs = torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(32, c), num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("mlp(hidden=64-x)", (4,), r"mlp\(hidden=64-x\) cannot be used: hidden is one width or several"),
        ("mlp(hidden=0)", (4,), "got 0: write e.g. 64-32"),
        ("mlp(activation=gelu)", (4,), "'relu', 'sigmoid' or 'tanh'"),
        (
            "lenet",
            (64,),
            r"lenet takes images \(channels, height, width\) of at least 8x8, got shape \(64,\)",
        ),
        ("lenet", (1, 7, 9), "of at least 8x8"),
        ("cnn(width=6)", (1, 8, 8), "width must be a multiple of 4"),
        ("alexnet", (3, 15, 16), "alexnet takes images .* of at least 16x16"),
        ("alexnet(hidden=0)", (3, 16, 16), "hidden must be a positive width, got 0"),
        ("resnet18(depth=3)", (3, 32, 32), "resnet18 has no option 'depth'"),
        ("vgg", (3, 32, 32), "no model is named 'vgg': choose one of logistic, mlp, lenet"),
    ],
)
def test_a_model_that_cannot_be_built_says_what_to_change(spec, shape, message):
    with pytest.raises(ConfigError, match=message):
        build_model(spec, shape, 10, seed=0)
