"""Implementations that studies and command lines name, imported on first use."""

from typing import Any

from spaces.registry import Registry

RECOVERIES: Registry[Any] = Registry(
    "a level of recovery",
    {
        "none": "search.recovery.none:NoRecovery",
        "bn": "search.recovery.batchnorm:BatchNormRecovery",
        "finetune": "search.recovery.finetune:FinetuneRecovery",
        "elastic": "search.recovery.elastic:ElasticRecovery",
    },
)
"""Classes of `search.recovery.base.Recovery`, by the name that `[recovery] level` gives them."""

QUANTIZERS: Registry[Any] = Registry(
    "a quantizer",
    {
        "lsq": "search.recovery.quantizers.lsq:Lsq",
        "pact": "search.recovery.quantizers.pact:Pact",
        "dorefa": "search.recovery.quantizers.dorefa:DoReFa",
    },
)
"""Classes of `search.recovery.quantizers.base.Method`, by the name that `[recovery.qat] quantizer` gives them."""

SAMPLERS: Registry[Any] = Registry(
    "a sampler",
    {
        "ehvi": "search.samplers.hypervolume.sampler:ehvi",
        "tpe": "search.samplers.optuna_samplers:tpe",
        "nsga2": "search.samplers.optuna_samplers:nsga2",
        "gp": "search.samplers.optuna_samplers:gp",
        "random": "search.samplers.optuna_samplers:uniform",
    },
    aliases={"front": "ehvi"},
)
"""Factories, see `search.samplers.base.SamplerFactory`, by the name that `--sampler` gives them."""

DATA_SETS: Registry[Any] = Registry(
    "a data set",
    {
        "imagefolder": "search.loading.image_folder:image_folder",
        "cifar10": "search.loading.torchvision_datasets:cifar10",
        "cifar100": "search.loading.torchvision_datasets:cifar100",
        "fashion-mnist": "search.loading.torchvision_datasets:fashion_mnist",
        "imagenet": "search.loading.torchvision_datasets:imagenet",
    },
)
"""Functions that find the images of a data set, by the kind that `[data] source` begins with."""
