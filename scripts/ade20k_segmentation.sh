#!/usr/bin/env bash
# ADE20K: semantic segmentation by Semantic FPN on ImageNet-1K's PVT-Small, pre-trained without and with SAR (63 epochs,
# 512 px; Table 12 of the paper's first version). There is no SAR loss in fine-tuning.
#
#   bash scripts/ade20k_segmentation.sh --data /data        # trains Table 10's PVTs first, or takes them if finished
#   bash scripts/ade20k_segmentation.sh --data /data --ckpt-base vit.pth --ckpt-sar sar.pth        # from PVTs you have
#   bash scripts/ade20k_segmentation.sh --dry-run        # the commands and the number of images
#   bash scripts/ade20k_segmentation.sh --smoke        # the same, tiny, on scanned digits
#
# Of Table 10's runs checkpoint.pth is taken, the last epoch.
# Hardware: the paper's is 8 x V100 32 GB to pre-train, PVT's 4 GPUs with 4 images each to segment; anything else needs
#   only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Nearly all are those of Table 10's two runs.
# Expected, mean IoU: 39.8 in PVT's paper, 41.9 by PVT's released configuration, with SAR 41.1. The paper prints +0.3
#   where the difference of its values is 1.3. Compare runs of one program and one protocol.
# Options: bash scripts/ade20k_segmentation.sh --help.
exec bash "$(dirname "$0")/run_table.sh" ade20k "$@"
