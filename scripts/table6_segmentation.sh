#!/usr/bin/env bash
# Table 6: semantic segmentation of PASCAL VOC 2012 by Semantic FPN on ImageNet-1K's ViT-S/16, pre-trained without and
# with SAR (25 epochs, 512 px). There is no SAR loss in fine-tuning, and the last block is the pre-training's.
#
#   bash scripts/table6_segmentation.sh --data /data        # trains Table 4's two rows first, or takes them if finished
#   bash scripts/table6_segmentation.sh --data /data --ckpt-base vit.pth --ckpt-sar sar.pth        # from weights you have
#     with --ckpt-options "--checkpoint-key ema" for their averaged weights
#   bash scripts/table6_segmentation.sh --dry-run        # the commands and the number of images
#   bash scripts/table6_segmentation.sh --smoke        # the same, tiny, on scanned digits
#
# Trained on VOC 2012's train and evaluated on val, whose labels are public. The paper trains on trainval and evaluates
# on the test server: docs/dense.md has the commands, which write the server's files.
# Of Table 4's runs checkpoint.pth is taken, the last epoch, as in Table 7: best.pth was chosen on the validation set.
# Hardware: the paper's is 8 x V100 32 GB to pre-train, and 4 GPUs with 2 images each to segment; anything else needs only a
#   total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
#   Nearly all are those of Table 4's two runs.
# Expected, mean IoU on the test server: 66.17, with SAR 68.68.
# Options: bash scripts/table6_segmentation.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table6 "$@"
