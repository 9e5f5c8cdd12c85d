#!/usr/bin/env bash
# Table 9: ImageNet-100, 100 epochs: SAR on T2T-ViT-14, PVT-Small and CvT-13, each by its own authors'
# protocol, beside ViT-S/16.
# Where the paper's text and an official code differ, the code's recipe is taken; the text's is
# recipes/*_in1k_paper.args.
#
#   bash scripts/table9_imagenet100_hybrids.sh --data /data
#   bash scripts/table9_imagenet100_hybrids.sh --dry-run        # the commands and the number of images
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
# Expected, top-1:
#   ViT-S/16 74.22, with SAR 76.72; T2T-ViT-14 82.42, 83.96; PVT-Small 76.57, 77.78; CvT-13 83.38, 85.2.
# Options: bash scripts/table9_imagenet100_hybrids.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table9 "$@"
