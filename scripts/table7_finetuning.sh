#!/usr/bin/env bash
# Table 7: ImageNet-1K weights fine-tuned on CIFAR-10, CIFAR-100, Flowers and Pets (224 px, 100 epochs), with SAR or
# not in pre-training and in fine-tuning. The last block stays the pre-training's (appendix E.4): with SAR in
# fine-tuning alone it is the standard one with lambda 0.01, with SAR in pre-training alone the paper's with lambda 0.
#
#   bash scripts/table7_finetuning.sh --data /data        # trains Table 4's two rows first, or takes them if finished
#   bash scripts/table7_finetuning.sh --data /data --ckpt-base vit.pth --ckpt-sar sar.pth        # from weights you have
#     with --ckpt-options "--checkpoint-key ema" for their averaged weights
#   bash scripts/table7_finetuning.sh --dry-run        # the commands and the number of images
#
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as DeiT does: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Nearly all are those of Table 4's two runs.
# Expected, top-1 on CIFAR-10, CIFAR-100, Flowers, Pets, by SAR in pre-training - in fine-tuning:
#   no-no 98.59, 88.95, 95.07, 92.21; yes-no 98.69, 89.19, 96.05, 92.7;
#   no-yes 98.72, 88.95, 95.1, 92.34; yes-yes 98.65, 89.21, 96.1, 92.7.
# Options: bash scripts/table7_finetuning.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table7 "$@"
