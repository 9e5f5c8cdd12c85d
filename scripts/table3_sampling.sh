#!/usr/bin/env bash
# Table 3: a share of ImageNet-100's training images (100 epochs). The paper draws the images of a share at random;
# here they are drawn class by class, and smaller shares lie inside larger ones.
#
#   bash scripts/table3_sampling.sh --data /data
#   bash scripts/table3_sampling.sh --dry-run        # the commands and the number of images
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
# Expected, top-1 on 0.25, 0.50, 0.75 and all of the images:
#   ViT-S/16 21.66, 29.86, 35.62, 74.22; with SAR 29.06, 38.02, 46.12, 76.72.
# Options: bash scripts/table3_sampling.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table3 "$@"
