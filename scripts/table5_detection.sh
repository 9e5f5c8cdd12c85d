#!/usr/bin/env bash
# Table 5: object detection on PASCAL VOC 07+12 by ViTDet's Faster R-CNN on ImageNet-1K's ViT-S/16, pre-trained without
# and with SAR (25 epochs, 512 px). There is no SAR loss in fine-tuning, and the last block is the pre-training's.
#
#   bash scripts/table5_detection.sh --data /data        # trains Table 4's two rows first, or takes them if finished
#   bash scripts/table5_detection.sh --data /data --ckpt-base vit.pth --ckpt-sar sar.pth        # from weights you have
#     with --ckpt-options "--checkpoint-key ema" for their averaged weights
#   bash scripts/table5_detection.sh --dry-run        # the commands and the number of images
#   bash scripts/table5_detection.sh --smoke        # the same, tiny, on scanned digits
#
# In --data, VOCdevkit has VOC2007 and VOC2012; test of 2007 unpacks into VOC2007, too.
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as in Table 7: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB to pre-train, and 4 GPUs with 2 images each to detect; anything else needs only a
#   total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Nearly all are those of Table 4's two runs; an image of detection is about 30 times the work of one.
# Expected, mAP on test of 2007: 77.1, with SAR 79.2. The report has VOC 2007's AP by 11 points at an IoU of 0.5.
# Options: bash scripts/table5_detection.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table5 "$@"
