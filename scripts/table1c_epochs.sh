#!/usr/bin/env bash
# Table 1(c): 100 and 300 epochs (ImageNet-100).
#
#   bash scripts/table1c_epochs.sh --data /data
#   bash scripts/table1c_epochs.sh --dry-run        # the commands and the number of images
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
# Expected, top-1 after 100 and 300 epochs: ViT-S/16 74.22 and 80.82, with SAR 76.72 and 85.24.
# Options: bash scripts/table1c_epochs.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table1c "$@"
