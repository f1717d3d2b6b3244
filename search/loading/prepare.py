"""Loads a study's images and network, which depend on each other."""

from functools import cache

from search.config.progress import Progress, Say
from search.config.references import data_source, model_source
from search.config.study import Study, TrainingSection
from search.loading.images import Loaded, open_data
from search.loading.models import BuiltModel, build_model, find_weights, usual_preprocessing
from search.loading.network_checks import check_network
from search.loading.user_code import load


def prepare(study: Study, download: bool, progress: Progress, say: Say) -> tuple[Loaded, BuiltModel]:
    """Returns the images, preprocessed for the network, and the network, built for their classes.

    Args:
        study: names both.
        download: whether missing weights and images may be downloaded.
        progress: called with the progress of long steps.
        say: called with remarks for the user.

    Raises:
        SourceError: there is no such network, or there are no such images.
        UserCodeError: one of the user's factories fails, or the network cannot be searched.
    """
    for reference in _functions(study):
        load(reference)
    file = find_weights(study.model, download, say)
    data = open_data(study.data, download, say)
    classes = data.classes
    seed = study.training.seed if study.training else 0
    is_folder = data_source(study.data.source).kind in ("imagefolder", "imagenet")

    @cache
    def loaded() -> Loaded:
        return data.read(usual_preprocessing(study.model, is_folder), progress, say)

    built = build_model(study.model, file, classes, seed, lambda: loaded().splits.calibration.images[:2], say)
    check_network(built.network, loaded().splits.calibration.images[:2], classes, loaded().empty)
    _say_training(study, built, classes, say)
    return loaded(), built


def _functions(study: Study) -> list[str]:
    """Returns the functions of the user's that a study names."""
    sources = [study.model.source] if model_source(study.model.source).is_factory else []
    sources += [study.data.source] if data_source(study.data.source).is_factory else []
    others = [study.data.augment, study.frames.source if study.frames else None]
    return sources + [reference for reference in others if reference]


def _say_training(study: Study, built: BuiltModel, classes: int, say: Say) -> None:
    training = built.training(study.training)
    if built.fitted.renewed:
        say(
            f"The weights are for {built.fitted.had} classes, the data has {classes}: the last layer,"
            f" {built.fitted.renewed}, begins anew."
        )
    if training and built.has_weights:
        say(f"The network is trained further from its weights, on the train images, {_how(study, training)}.")
    if training is None and not built.has_weights:
        is_factory = model_source(study.model.source).is_factory
        taken = "is taken as its factory returns it" if is_factory else "is not trained, so its accuracy will be chance"
        say(f"Careful: no weights are given and there is no [training]: the network {taken}.")


def _how(study: Study, training: TrainingSection) -> str:
    text = f"{training.epochs} epochs at a rate of up to {training.learning_rate:g}"
    return text if study.training else f"{text}, as nothing is said in [training]"
