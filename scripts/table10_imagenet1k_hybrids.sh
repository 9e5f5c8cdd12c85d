#!/usr/bin/env bash
# Table 10: ImageNet-1K, 300 epochs: SAR on T2T-ViT-14, PVT-Small and CvT-13, each by its own authors'
# protocol, beside ViT-S/16.
# Where the paper's text and an official code differ, the code's recipe is taken; the text's is
# recipes/*_in1k_paper.args.
#
#   bash scripts/table10_imagenet1k_hybrids.sh --data /data
#   bash scripts/table10_imagenet1k_hybrids.sh --dry-run        # the commands and the number of images
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
# Expected, top-1:
#   ViT-S/16 79.8, with SAR 80.7; T2T-ViT-14 81.5, 81.9; PVT-Small 79.8, 79.84; CvT-13 81.6, 81.8 (without SAR: quoted).
# Options: bash scripts/table10_imagenet1k_hybrids.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table10 "$@"
