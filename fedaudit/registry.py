"""The single list of parts: what `fedaudit list`, error messages, docs and contract tests read.

A part is registered by the import path of its factory, so that listing and checking names costs no
import of torch or flwr; the module is imported when the part is built.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fedaudit.errors import ConfigError
from fedaudit.spec import Spec, build, parse_spec


@dataclass(frozen=True)
class Entry:
    """A registered part: what it is in one line, and its factory or the import path of it."""

    summary: str
    target: str | Callable[..., Any]

    def load(self) -> Callable[..., Any]:
        """The factory itself."""
        if callable(self.target):
            return self.target
        module, _, name = self.target.partition(":")
        factory: Callable[..., Any] = getattr(import_module(module), name)
        return factory


class Registry:
    """Names of one kind of part, in order of registration.

    >>> colours = Registry("colour")
    >>> colours.register("red", "warm", lambda: "#f00")
    >>> colours.build(Spec("red"))
    '#f00'
    """

    def __init__(
        self, kind: str, entries: dict[str, tuple[str, str]] | None = None, *, joined_by: str = ""
    ) -> None:
        self.kind = kind
        self.joined_by = joined_by
        self._entries = {name: Entry(*entry) for name, entry in (entries or {}).items()}

    def register(self, name: str, summary: str, target: str | Callable[..., Any]) -> None:
        """Add a part of one's own.

        Raises:
            ConfigError: if the name is taken.
        """
        if name in self._entries:
            raise ConfigError(f"a {self.kind} named {name!r} exists already: choose another name")
        self._entries[name] = Entry(summary, target)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Entry:
        self.check(name)
        return self._entries[name]

    def summaries(self) -> dict[str, str]:
        """Each name and what the part is, in one line."""
        return {name: entry.summary for name, entry in self._entries.items()}

    def check(self, name: str) -> None:
        """Raise a ConfigError that lists what is allowed unless `name` is registered."""
        if name not in self._entries:
            allowed = ", ".join(self._entries)
            raise ConfigError(f"no {self.kind} is named {name!r}: choose one of {allowed}")

    def check_spec(self, spec: Spec) -> None:
        """Raise a ConfigError unless all that `spec` names is registered, and may be chained if it is."""
        if spec.then and not self.joined_by:
            raise ConfigError(
                f"a {self.kind} stands alone, got '{spec}': only defenses are chained by 'then'"
            )
        for part in spec.chain:
            self.check(part.name)

    def build(self, spec: Spec, /, **given: Any) -> Any:
        """The part that `spec` names, built with its options and with `given`; a chain of them is joined.

        Raises:
            ConfigError: if a name or an option is not allowed, or parts cannot be chained.
        """
        self.check_spec(spec)
        built = [build(part, self[part.name].load(), **given) for part in spec.chain]
        if not spec.then:
            return built[0]
        try:
            return Entry("", self.joined_by).load()(built)
        except ValueError as error:
            raise ConfigError(f"{spec} cannot be used: {error}") from error


DATASETS = Registry(
    "dataset",
    {
        "digits": (
            "handwritten digits, 1797 grey 8x8 images, 10 classes, no download",
            "fedaudit.data.embedded:digits",
        ),
        "patches": (
            "32x32 RGB patches of two photographs, 2 classes, no download",
            "fedaudit.data.embedded:patches",
        ),
        "mnist": ("MNIST through torchvision", "fedaudit.data.torchvision_sets:mnist"),
        "fashion-mnist": (
            "FashionMNIST through torchvision",
            "fedaudit.data.torchvision_sets:fashion_mnist",
        ),
        "cifar10": ("CIFAR-10 through torchvision", "fedaudit.data.torchvision_sets:cifar10"),
        "cifar100": ("CIFAR-100 through torchvision", "fedaudit.data.torchvision_sets:cifar100"),
        "celeba": (
            "CelebA faces, one attribute as label, through torchvision",
            "fedaudit.data.torchvision_sets:celeba",
        ),
        "image-folder": (
            "one sub-folder of images per class under data.root",
            "fedaudit.data.files:image_folder",
        ),
        "npz": ("arrays x and y in one .npz file at data.root", "fedaudit.data.files:npz"),
        "hub": (
            "any dataset of the Hugging Face Hub; needs fedaudit[datasets]",
            "fedaudit.data.hub:hub",
        ),
    },
)
PARTITIONERS = Registry(
    "partitioner",
    {
        "iid": ("equal shares drawn at random", "fedaudit.data.partition:iid"),
        "dirichlet": (
            "class shares drawn from Dirichlet(alpha)",
            "fedaudit.data.partition:dirichlet",
        ),
        "shards": (
            "a fixed number of label-sorted shards per client",
            "fedaudit.data.partition:shards",
        ),
        "one-class": (
            "each client holds examples of one class",
            "fedaudit.data.partition:one_class",
        ),
    },
)
MODELS = Registry(
    "model",
    {
        "logistic": ("multinomial logistic regression", "fedaudit.models.networks:logistic"),
        "mlp": ("fully connected network with one hidden layer or more", "fedaudit.models.networks:mlp"),
        "lenet": ("the sigmoid LeNet of Deep Leakage from Gradients", "fedaudit.models.networks:lenet"),
        "cnn": ("small convolutional network with GroupNorm", "fedaudit.models.networks:cnn"),
        "convnet": (
            "the 2.9M ConvNet of inversion papers, without normalisation",
            "fedaudit.models.networks:convnet",
        ),
        "alexnet": ("AlexNet-like network for 32x32 images", "fedaudit.models.networks:alexnet"),
        "resnet18": ("torchvision ResNet-18 with GroupNorm", "fedaudit.models.networks:resnet18"),
        "imprinted": (
            "ACTIVE: a model that a dishonest server imprinted, for the attack imprint",
            "fedaudit.attacks.imprinted_model:imprinted",
        ),
    },
)
ACTIVE_MODELS = frozenset({"imprinted"})
"""Models with which the server breaks the protocol; everything measured on them is labelled ACTIVE."""
MEASURES = Registry(
    "measure",
    {
        "cohort-gradient-uniqueness": (
            "how far a client's update stands out of the cohort",
            "fedaudit.measures.gradient_uniqueness:CohortGradientUniqueness",
        ),
        "example-gradient-uniqueness": (
            "how far each local example's gradient stands out of the client's others",
            "fedaudit.measures.gradient_uniqueness:ExampleGradientUniqueness",
        ),
        "mutual-information": (
            "nats a protected gradient gives about the batch it came from",
            "fedaudit.measures.mutual_information:MutualInformation",
        ),
        "update-norm": (
            "Euclidean norm of a client's update",
            "fedaudit.measures.norms:UpdateNorm",
        ),
        "update-cosine": (
            "cosine of a client's update to the mean of the cohort",
            "fedaudit.measures.norms:UpdateCosine",
        ),
        "input-curvature": (
            "how strongly the loss curves around an example, at a client's weights",
            "fedaudit.measures.input_curvature:InputCurvature",
        ),
        "gradient-sensitivity": (
            "how strongly each layer's gradient responds to a change of the input",
            "fedaudit.measures.gradient_sensitivity:GradientSensitivity",
        ),
        "subspace-distance": (
            "angle between the gradients of examples with and without a latent attribute",
            "fedaudit.measures.subspace_distance:SubspaceDistance",
        ),
        "usable-information": (
            "nats a decoder finds in each layer's gradient about the input",
            "fedaudit.measures.usable_information:UsableInformation",
        ),
        "usable-attribute-information": (
            "nats a probe finds in each layer's gradient about a latent attribute",
            "fedaudit.measures.usable_information:usable_attribute",
        ),
        "privacy-tokens": (
            "nats by which an embedded gradient tells its batch from others",
            "fedaudit.measures.privacy_tokens:PrivacyTokens",
        ),
        "membership-inference": (
            "how well a server tells a client's examples from others by its update",
            "fedaudit.inference.membership:MembershipInference",
        ),
    },
)
ATTACKS = Registry(
    "attack",
    {
        "dlg": (
            "Deep Leakage from Gradients: match the gradient by L-BFGS",
            "fedaudit.attacks.dlg:DLG",
        ),
        "inverting-gradients": (
            "Inverting Gradients: cosine distance and total variation by signed Adam",
            "fedaudit.attacks.inverting_gradients:InvertingGradients",
        ),
        "see-through-gradients": (
            "See through Gradients: layer distances and a BatchNorm prior, no group term",
            "fedaudit.attacks.see_through_gradients:SeeThroughGradients",
        ),
        "local-steps": (
            "inversion of several local SGD steps, unrolled, with an epoch-order prior",
            "fedaudit.attacks.local_steps:LocalSteps",
        ),
        "linear-layer": (
            "inputs read off the gradient of a linear first layer, exact for one example",
            "fedaudit.attacks.linear_layer:LinearLayer",
        ),
        "spear": (
            "whole batches, exactly, from a fully connected first layer with ReLU",
            "fedaudit.attacks.spear:Spear",
        ),
        "r-gap": (
            "one example of a small convolutional chain, layer by layer in closed form",
            "fedaudit.attacks.conv_layer:RGAP",
        ),
        "imprint": (
            "ACTIVE: reads a model that the server imprinted (Robbing the Fed)",
            "fedaudit.attacks.imprint:Imprint",
        ),
    },
)
DEFENSES = Registry(
    "defense",
    {
        "none": ("no defense", "fedaudit.defenses.none:NoDefense"),
        "dp-sgd": (
            "Opacus DP-SGD in the client, example-level guarantee",
            "fedaudit.defenses.dp_sgd:DPSGD",
        ),
        "leakage-adaptive": (
            "DP-SGD with noise that is constant, decays or follows measured leakage, at one total epsilon",
            "fedaudit.defenses.adaptive_noise:LeakageAdaptive",
        ),
        "gaussian": (
            "clips the update and adds Gaussian noise to all of it, client-level guarantee",
            "fedaudit.defenses.gaussian:GaussianUpdate",
        ),
        "central-dp": (
            "the server clips, averages and adds noise: client-level guarantee against all but the server",
            "fedaudit.defenses.central_dp:CentralPrivacy",
        ),
        "top-k": (
            "sends the largest coordinates of the update (per layer: gradient pruning)",
            "fedaudit.defenses.sparsify:TopK",
        ),
        "random-sparsify": (
            "sends a random set of the update's coordinates",
            "fedaudit.defenses.sparsify:RandomSparsify",
        ),
        "sign": ("sends signs times one magnitude per tensor", "fedaudit.defenses.quantize:Sign"),
        "quantize": (
            "sends k-bit coordinates, rounded at random without bias",
            "fedaudit.defenses.quantize:Quantize",
        ),
        "withhold": (
            "sends nothing of the named layers",
            "fedaudit.defenses.withhold_layers:WithholdLayers",
        ),
        "secure-aggregation": (
            "the server sees the sum of the clients' updates and no single one (simulation only)",
            "fedaudit.defenses.secure_aggregation:SecureAggregation",
        ),
        "censor": (
            "leaves out the client's most unique examples and audits those that stay again",
            "fedaudit.defenses.censor:Censor",
        ),
        "larger-batch": (
            "steps on several times as many examples",
            "fedaudit.defenses.larger_batch:LargerBatch",
        ),
    },
    joined_by="fedaudit.defenses.chain:chain",
)
WITHIN_STEPS = frozenset({"none", "dp-sgd", "leakage-adaptive", "censor", "larger-batch"})
"""Defenses of a local step: of its examples or of its release."""
SUMS_ONLY = frozenset({"secure-aggregation"})
"""Defenses that change no update and hide single ones from the server."""
AT_SERVER = frozenset({"central-dp"})
"""Defenses that protect the aggregate; the update that a server sees is as without them."""


def parts_of(defense: str) -> list[str]:
    """Names of a defense's parts, as written in its spec, without their options.

    >>> parts_of("dp-sgd(epsilon=8) then top-k(fraction=0.1)")
    ['dp-sgd', 'top-k']
    """
    return [part.partition("(")[0].strip() for part in defense.split(" then ")]


def is_repeatable(defense: str) -> bool:
    """Whether a run under this defense depends on its seed alone; noise from the operating system does not.

    >>> is_repeatable("dp-sgd(epsilon=8)"), is_repeatable("dp-sgd(secure-rng=true) then sign")
    (True, False)
    """
    return not any(part.options.get("secure-rng") is True for part in parse_spec(defense).chain)


def changes_update(defense: str) -> list[str]:
    """The parts of a defense, as written in its spec, that change the finished update.

    >>> changes_update("dp-sgd(epsilon=8) then top-k(fraction=0.1)")
    ['top-k']
    """
    elsewhere = WITHIN_STEPS | SUMS_ONLY | AT_SERVER
    return [name for name in parts_of(defense) if name in DEFENSES and name not in elsewhere]


def shows_sums_only(defense: str) -> bool:
    """Whether a defense, as written in its spec, hides single updates from the server.

    >>> shows_sums_only("dp-sgd(epsilon=8) then secure-aggregation(threshold=3)")
    True
    """
    return not SUMS_ONLY.isdisjoint(parts_of(defense))
