"""The base classes of all tasks: `Task`, which the loop trains, and `Evaluator`, which measures its model."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from losses import Localiser
from schedules import LearningRate, Position, drloc_weight_schedule, sar_weight_schedule
from tasks.scores import Scores
from utils import Processes
from weights import load_weights


class Evaluator:
    """Measures a model on a whole data set, with the same result for any number of processes.

    ``update`` is called for every batch of this process, without gradients and under the run's autocast. Processes may
    have different numbers of batches. ``compute`` is called once by all processes.

    Attributes:
        scores: after ``compute``, what a classifier says of each image; None if that is not recorded.
    """

    scores: Scores | None = None

    def update(self, model: nn.Module, batch: Any) -> None:
        """Add one batch, which is on the model's device."""
        raise NotImplementedError

    def compute(self, processes: Processes) -> dict[str, float]:
        """The results over all processes, by name; all must be finite."""
        raise NotImplementedError


class Task(nn.Module):
    """The model and the other trained modules: the module that DistributedDataParallel and ``torch.compile`` wrap.

    The program builds a task by ``Class(args, dataset, device)``. ``dataset`` is the result of `data`: the training
    images, or the validation images for ``--eval``. A class passes its model to ``Task.__init__(args, model, device)``.

    `data`, `forward`, `losses` and `evaluator` define a task; the other members have defaults. A task does not compute
    the spatial entropy or the other regularisers: `engine.regularisers` adds them for every task whose outputs hold
    ``similarity`` (and ``positions``, ``distances``), as those of `run_model` do. Maps of several resolutions are a
    list.

    Attributes:
        model: the model that is evaluated and exported.
        localiser: DRLoc's MLP; None if its weight is 0.
        repeats: number of consecutive views of each image in an epoch (repeated augmentation).
        reported: the entry of `weight_names` whose result picks best.pth.
    """

    options: Any = None
    """The module in ``options/`` of one of this program's tasks; None for a task that defines these methods itself."""
    metric: ClassVar[str]
    """Name of the evaluator's result that picks best.pth and that the report shows; higher is better."""
    main_loss: ClassVar[str] = "the task's loss"
    """The task's loss in words, for the banner."""
    weight_names: ClassVar[tuple[str, str]] = ("model", "ema")
    """The names of `model` and `averaged` in checkpoints and results."""
    reference_batch: ClassVar[int | None] = 512
    """The total batch that ``--lr`` refers to; it is scaled linearly to others. None: ``--lr`` is not scaled."""
    head_classes: Sequence[str] = ()
    """Names of the head's classes; given weights whose head has others lose it. Empty: any head that fits is kept."""
    prediction: ClassVar[str] = ""
    """The kind of what `predict` returns, see there: "boxes", "pixels" or "names"; empty if nothing is predicted."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, device: torch.device):
        super().__init__()
        self.model = model
        width = cast(int, model.num_features)
        self.localiser = Localiser(width).to(device) if args.drloc_weight > 0 else None
        self.repeats, self.reported = 1, self.weight_names[0]
        self.clip_grad = args.clip_grad
        self.needs_similarity = args.sar_weight > 0
        self.learning_rate = LearningRate(
            peak=self.peak_learning_rate(args),
            shape=args.sched,
            epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            warmup_start=args.warmup_lr,
            minimum=args.min_lr,
            on_updates=args.sched_on_updates,
        )
        self.sar_schedule, self.sar_weight, self.drloc_weight = args.sar_schedule, args.sar_weight, args.drloc_weight

    @property
    def averaged(self) -> nn.Module | None:
        """The model's exponential moving average, teacher or momentum encoder; None without one.

        A class keeps it in a tuple, so that it is not a submodule: then the optimiser, ``train()`` and
        DistributedDataParallel ignore it.
        """
        return None

    @property
    def compiled_part(self) -> nn.Module | None:
        """The module that ``--compile`` compiles; None for all of the training step's network."""
        return None

    # ------------------------------------------------------------------------------------------ command line

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add the task's own options, and set its defaults of shared options, such as its official protocol."""
        if cls.options is not None:
            cls.options.add(parser)

    @classmethod
    def check(cls, args: argparse.Namespace) -> None:
        """Refuse arguments that cannot work, before anything is built.

        Raises:
            UserError: one line that names the option and what to change.
        """
        if cls.options is not None:
            cls.options.check(args)

    @classmethod
    def against_accumulation(cls, args: argparse.Namespace) -> str:
        """Why an update must not be split into micro-batches, in words; empty if it may."""
        return getattr(cls.options, "against_accumulation", lambda args: "")(args)

    @classmethod
    def peak_learning_rate(cls, args: argparse.Namespace) -> float:
        """``--lr``, scaled by the total batch."""
        if args.unscale_lr or cls.reference_batch is None:
            return args.lr
        return args.lr * args.total_batch / cls.reference_batch

    @classmethod
    def data(cls, args: argparse.Namespace, split: str, processes: Processes) -> Any:
        """The data set of a split ("train" or "val"), whose items are dicts; called by all processes.

        `datasets.build_split` reads it with all shared options. The index of an item is a `samplers.Draw`. Random
        numbers of an item depend on (seed, epoch, position) alone. None for "val": nothing is evaluated.

        Raises:
            UserError: files are missing or not as expected.
        """
        raise NotImplementedError

    @classmethod
    def relabel(cls, dataset: Any, classes: Sequence[str]) -> list[str]:
        """Number the labels of images to evaluate as a checkpoint's classes; returns lines to log.

        Default: nothing, for a task whose model has no classes.

        Raises:
            UserError: the images have other classes.
        """
        return []

    @classmethod
    def evaluation_transform(cls, args: argparse.Namespace) -> Callable[..., Any]:
        """The transform of evaluation, for tasks with a `prediction`: of an image alone, uint8 ``(3, h, w)``.

        The result is an item as `predict` takes it once it is normalised, or its ``images`` alone, ``(3, h, w)``.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------- a micro-batch

    def schedule(self, position: Position) -> dict[str, float]:
        """All scheduled values at a position, by name; a pure function, whose values are logged.

        ``lr`` and, if given, ``weight_decay`` are set in the optimiser. ``<term>_weight`` is the weight of a loss term
        (1 if not given), ``sar_weight`` that of the loss of the similarity maps.
        """
        epoch, epochs = position.exact_epoch, position.epochs
        schedule = {
            "lr": self.learning_rate.at(position),
            "sar_weight": sar_weight_schedule(self.sar_schedule, self.sar_weight, epoch, epochs),
        }
        if self.localiser is not None:
            schedule["drloc_weight"] = drloc_weight_schedule(self.drloc_weight, epoch, epochs)
        return schedule

    def prepare(self, batch: Any) -> Any:
        """Change a micro-batch on its device before `forward`, as Mixup does; the generators are seeded for it."""
        return batch

    def forward(self, batch: Any) -> dict[str, Any]:
        """All computation that needs gradients; returns the inputs of `losses` and of the regularisers, by name."""
        raise NotImplementedError

    def losses(self, outputs: dict[str, Any], batch: Any) -> dict[str, Tensor]:
        """The task's own loss terms by name: scalars, each an unweighted mean over images."""
        raise NotImplementedError

    def measures(self, outputs: dict[str, Any], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further scalars of a micro-batch to log, by name, which are not part of the loss; called without gradients.

        Args:
            outputs: of `forward`.
            terms: all terms of the loss, unweighted.
        """
        return {}

    def warning(self, means: Mapping[str, float]) -> str:
        """What is wrong with the means since the last logging step, in words; empty if nothing is."""
        return ""

    def notes(self) -> dict[str, str]:
        """Further lines of the banner, by their headings."""
        return {}

    def run_model(self, images: Tensor, pairs: Tensor | None = None) -> dict[str, Tensor]:
        """The model's ``logits (B, classes)``, and the inputs of the regularisers.

        Args:
            images: ``(B, 3, height, width)``.
            pairs: for DRLoc, uniform in [0, 1), ``(B, m, 2, 2)``: row and column of both patches of each pair, as a
                fraction of the grid.

        Returns:
            ``logits``; ``similarity (B, H, h, w)`` if its loss has a weight; with ``pairs``, also ``positions`` and
            ``distances`` of `losses.Localiser`.
        """
        localiser, with_pairs = self.localiser, self.localiser is not None and pairs is not None
        if not (self.needs_similarity or with_pairs):
            return {"logits": self.model(images)}
        values = self.model(images, return_similarity=self.needs_similarity, return_tokens=with_pairs)
        names = ["logits", *["similarity"] * self.needs_similarity, *["tokens"] * with_pairs]
        outputs = dict(zip(names, values, strict=True))
        if localiser is not None and pairs is not None:
            tokens = outputs.pop("tokens")
            h, w = tokens.shape[2:]
            outputs["positions"] = torch.stack([pairs[..., 0] * h, pairs[..., 1] * w], dim=-1).long()
            outputs["distances"] = localiser(tokens, outputs["positions"])
        return outputs

    # ---------------------------------------------------------------------------------------------- an update

    def parameter_groups(self, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
        """The optimiser's parameter groups. Default: no weight decay for biases, norms, tokens and positions (timm's).

        A group's learning rate is multiplied by its ``lr_scale``, if it has one. A scheduled weight decay is set in the
        groups with ``decays=True``; without that key, in the groups whose weight decay is above 0.
        """
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        without = {f"model.{name}" for name in names}
        return param_groups_weight_decay(self, args.weight_decay, no_weight_decay_list=without)

    def begin_update(self, schedule: Mapping[str, float]) -> None:
        """Called before the first micro-batch of an update."""

    def finish_gradients(self, schedule: Mapping[str, float]) -> None:
        """Called with the accumulated, unscaled gradients. Default: clip their global norm."""
        if self.clip_grad:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip_grad)

    def end_update(self, schedule: Mapping[str, float]) -> None:
        """Called after the optimiser has updated the weights: the place to update `averaged`."""

    # --------------------------------------------------------------------------------- checkpoints, evaluation

    def other_modules(self) -> dict[str, nn.Module]:
        """All modules with a state other than `model` and `averaged`, by their keys in a checkpoint."""
        return {"localiser": self.localiser} if self.localiser is not None else {}

    def start_from(self, path: str, key: str | None) -> list[str]:
        """Initialise the model with given weights, and `averaged` with a copy; see `weights.load_weights`.

        Returns:
            One line for each adaptation, to be logged.

        Raises:
            UserError: the weights cannot be used.
        """
        notes = load_weights(self.model, path, key, classes=self.head_classes)
        if self.averaged is not None:
            self.averaged.load_state_dict(self.model.state_dict())
        return notes

    def evaluated(self) -> dict[str, nn.Module]:
        """The models to evaluate, by the prefix of the names of their results."""
        averaged = {} if self.averaged is None else {f"test_{self.weight_names[1]}": self.averaged}
        return {"test": self.model} | averaged

    def load(self, checkpoint: Mapping, key: str | None) -> list[str]:
        """Load the weights of a checkpoint to evaluate them; nothing of the model may be missing, such as a classifier.

        Args, results and errors are those of `weights.load_weights`.
        """
        return load_weights(self.model, checkpoint, key, strict_head=True)

    @property
    def exported(self) -> nn.Module:
        """The module whose weights ``--export`` writes."""
        return self.model

    def evaluator(self) -> Evaluator:
        """A new evaluator, for one pass over the validation images."""
        raise NotImplementedError

    def predict(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The prediction for one image, by the kind of `prediction`; the model is in evaluation mode.

        Args:
            item: of the evaluation, on the model's device, whose ``images (1, 3, h, w)`` are normalised.

        Returns:
            For "boxes", ``boxes (N, 4)`` in px of the original image, ``labels (N,)`` and ``scores (N,)``. For
            "pixels", ``classes`` of the original image's ``(height, width)``. For "names", ``probabilities (K,)``.
        """
        raise NotImplementedError

    def truth(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What is true for an item of the evaluation, as `predict` returns it but for ``scores``.

        TensorBoard gets pictures of truth and prediction of the tasks that define it.
        """
        raise NotImplementedError

    @classmethod
    def describe(cls, results: Mapping[str, float]) -> str:
        """The results of an evaluation in one line, for the terminal."""
        return "* " + " ".join(f"{name} {value:.4g}" for name, value in results.items())
