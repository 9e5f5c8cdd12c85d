"""What every task has in common: `Task`, which the loop trains, and `Evaluator`, which measures its model."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from losses import Localiser
from schedules import LearningRate, Position, drloc_weight_schedule, sar_weight_schedule
from utils import Processes


class Evaluator:
    """Measures a model over a whole data set, exactly over any number of processes.

    ``update`` is called for every batch of this process, without gradients and under the run's autocast; processes may
    have different numbers of batches. ``compute`` is called once by all processes.
    """

    def update(self, model: nn.Module, batch: Any) -> None:
        """Take one batch, on the model's device, into account."""
        raise NotImplementedError

    def compute(self, processes: Processes) -> dict[str, float]:
        """The results over all processes, by name. None of them may be infinite or not a number."""
        raise NotImplementedError


class Task(nn.Module):
    """What DistributedDataParallel and ``torch.compile`` wrap: the model and all that trains beside it.

    The program makes one by ``Class(args, dataset, device)``: ``dataset`` is what `data` gave, the training images, or
    the validation images for ``--eval``. The class hands its model on to this one's ``__init__(args, model, device)``.

    A class says in `data`, `forward`, `losses` and `evaluator` what it is about; the other members have defaults. The
    spatial entropy and the other regularisers are not its business: `engine.regularisers` adds them to every task whose
    outputs hold ``similarity`` (and ``positions``, ``distances``), as those of `run_model` do.

    Attributes:
        model: what is exported, and evaluated.
        localiser: DRLoc's MLP; None where its weight is 0.
        repeats: how many times in a row the loader hands out each image (repeated augmentation).
        reported: which of `weight_names` picks best.pth.
    """

    metric: ClassVar[str]
    """The evaluator's result that picks best.pth and is the report's column; higher is better."""
    main_loss: ClassVar[str] = "the task's loss"
    """Its loss in words, for the banner."""
    weight_names: ClassVar[tuple[str, str]] = ("model", "ema")
    """What checkpoints and results call `model` and `averaged`."""
    reference_batch: ClassVar[int | None] = 512
    """The total batch that ``--lr`` is for; it is scaled linearly to others. None: taken as it stands."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, device: torch.device):
        super().__init__()
        self.model = model
        width = cast(int, model.num_features)
        self.localiser = Localiser(width).to(device) if args.drloc_weight > 0 else None
        self.repeats, self.reported = 1, self.weight_names[0]
        self.clip_grad = args.clip_grad
        self.asks_similarity = args.sar_weight > 0
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

        A class keeps it in a tuple, so that it is no submodule: the optimiser, ``train()`` and DistributedDataParallel
        have nothing to do with it.
        """
        return None

    # ------------------------------------------------------------------------------------------ command line

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add the task's own groups of options, and set its defaults of the shared ones: its official protocol."""

    @classmethod
    def check(cls, args: argparse.Namespace) -> None:
        """Refuse what cannot work, before any time is spent.

        Raises:
            UserError: one line that names the option and the mend.
        """

    @classmethod
    def peak_learning_rate(cls, args: argparse.Namespace) -> float:
        """``--lr``, scaled by the total batch."""
        if args.unscale_lr or cls.reference_batch is None:
            return args.lr
        return args.lr * args.total_batch / cls.reference_batch

    @classmethod
    def data(cls, args: argparse.Namespace, split: str, processes: Processes) -> Any:
        """The images of a split ("train" or "val"), as dicts of what a step needs; called by all processes.

        `datasets.build_split` reads it as all shared options say. An item is asked for by a ``samplers.Draw``. Whatever
        is random in it depends on (seed, epoch, position) alone.

        Raises:
            UserError: files that are not there or not as they should be.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ a step

    def schedule(self, position: Position) -> dict[str, float]:
        """All that changes in the course of a run, by name; pure, and logged.

        ``lr`` and, if given, ``weight_decay`` are set in the optimiser; ``<term>_weight`` is the weight of a term of
        the loss (1 if not given), ``sar_weight`` that of the term of the similarity maps.
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
        """What is done to a batch on its device before `forward`; random numbers are the step's own."""
        return batch

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """All that needs gradients, in one call; what `losses` and the regularisers read, by name."""
        raise NotImplementedError

    def losses(self, outputs: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """The main task's terms of the loss, by name: scalars, each an unweighted mean over images."""
        raise NotImplementedError

    def run_model(self, images: Tensor, pairs: Tensor | None = None) -> dict[str, Tensor]:
        """The model's ``logits (B, classes)``, and what the regularisers read.

        Args:
            images: ``(B, 3, height, width)``.
            pairs: for DRLoc, uniform in [0, 1), ``(B, m, 2, 2)``: row and column of both patches of each pair, as a
                share of the grid.

        Returns:
            ``logits``; ``similarity (B, H, h, w)`` where it has a weight; with ``pairs``, ``positions`` and
            ``distances`` as in `losses.Localiser`.
        """
        localiser, with_pairs = self.localiser, self.localiser is not None and pairs is not None
        if not (self.asks_similarity or with_pairs):
            return {"logits": self.model(images)}
        values = self.model(images, return_similarity=self.asks_similarity, return_tokens=with_pairs)
        names = ["logits", *["similarity"] * self.asks_similarity, *["tokens"] * with_pairs]
        outputs = dict(zip(names, values, strict=True))
        if localiser is not None and pairs is not None:
            tokens = outputs.pop("tokens")
            h, w = tokens.shape[2:]
            outputs["positions"] = torch.stack([pairs[..., 0] * h, pairs[..., 1] * w], dim=-1).long()
            outputs["distances"] = localiser(tokens, outputs["positions"])
        return outputs

    # ---------------------------------------------------------------------------------------------- an update

    def parameter_groups(self, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
        """The optimiser's groups. Default: timm's, no weight decay for biases, norms, tokens and positions.

        A group's learning rate is multiplied by its ``lr_scale``, if it has one. A scheduled weight decay is set in the
        groups whose own is above 0, or as their ``decays`` says.
        """
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        without = {f"model.{name}" for name in names}
        return param_groups_weight_decay(self, args.weight_decay, no_weight_decay_list=without)

    def begin_update(self, schedule: Mapping[str, float]) -> None:
        """Called before the first micro-batch of an update."""

    def finish_gradients(self, schedule: Mapping[str, float]) -> None:
        """Called when all gradients are there, unscaled. Default: clip their global norm."""
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip_grad)

    def end_update(self, schedule: Mapping[str, float]) -> None:
        """Called after the optimiser's step: the place to follow it with `averaged`."""

    # --------------------------------------------------------------------------------- checkpoints, evaluation

    def beside(self) -> dict[str, nn.Module]:
        """All modules with state but `model` and `averaged`, under the names that a checkpoint gives them."""
        return {"localiser": self.localiser} if self.localiser is not None else {}

    def reset_averaged(self) -> None:
        """Let `averaged` begin at the model's weights, which were just replaced (fine-tuning)."""
        if self.averaged is not None:
            self.averaged.load_state_dict(self.model.state_dict())

    def evaluated(self) -> dict[str, nn.Module]:
        """The models that are evaluated, by what the names of their results begin with."""
        averaged = {} if self.averaged is None else {f"test_{self.weight_names[1]}": self.averaged}
        return {"test": self.model} | averaged

    def evaluator(self) -> Evaluator:
        """A new evaluator, for one pass over the validation images."""
        raise NotImplementedError

    @classmethod
    def describe(cls, results: Mapping[str, float]) -> str:
        """One line of an evaluation's results, for the terminal."""
        return "* " + " ".join(f"{name} {value:.4g}" for name, value in results.items())
