"""A task as a stranger would add it: by how many quarter turns was the image rotated? ``--task toy_task:Rotation``."""

import torch
from torch import nn

from augmentation import eval_transform
from cli import at_least
from datasets import AugmentedDataset, build_split
from tasks import Evaluator, Task
from tasks.settings import build_task_model, split_settings


class RotatedImages(AugmentedDataset):
    """Every image of a set, turned as often as its position in the epoch says."""

    def __getitem__(self, draw):
        item, turns = super().__getitem__(draw), draw.position % len(self.classes)
        return item | {"images": item["images"].rot90(turns, (1, 2)), "targets": turns}


class Rotation(Task):
    metric = "right"

    def __init__(self, args, dataset, device):
        super().__init__(args, build_task_model(args, len(dataset.classes), device), device)

    @classmethod
    def add_options(cls, parser):
        parser.add_argument("--directions", type=at_least(int, 2, 4), default=4, help="how many are told apart")

    @classmethod
    def data(cls, args, split, processes):
        images = build_split(split_settings(args), split, eval_transform(args.input_size), processes)
        rotated = RotatedImages(images.base, images.transform, args.seed, images.skip_unreadable, images.pairs)
        rotated.classes = [f"{90 * turns} degrees" for turns in range(args.directions)]
        return rotated

    def forward(self, batch):
        return self.run_model(batch["images"], batch.get("pairs"))

    def losses(self, outputs, batch):
        return {"rotation": nn.functional.cross_entropy(outputs["logits"], batch["targets"])}

    def evaluator(self):
        return Right()


class Right(Evaluator):
    """The share of directions that are told right, in percent."""

    def __init__(self):
        self.right = []

    def update(self, model, batch):
        self.right.append(model(batch["images"]).argmax(1) == batch["targets"])

    def compute(self, processes):
        right = torch.cat(self.right)
        counts = torch.stack([right.sum(), right.new_tensor(len(right), dtype=torch.int64)])
        total, count = processes.gather(counts).sum(dim=0).tolist()
        return {"right": 100 * total / count, "images": count}
