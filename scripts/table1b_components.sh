#!/usr/bin/env bash
# Table 1(b): the parts of SAR, one by one (ImageNet-100, 100 epochs).
#
#   bash scripts/table1b_components.sh --data /data
#   bash scripts/table1b_components.sh --dry-run        # the commands and the number of images
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
# Expected, top-1:
#   A  ViT-S/16                        74.22
#   B  A without the MSA skip          74.64
#   C  B without the second LayerNorm  75.72
#   D  C without the MLP skip          73.76
#   E  A + spatial entropy             74.78
#   F  C + spatial entropy, i.e. SAR   76.72
# Options: bash scripts/table1b_components.sh --help.
exec bash "$(dirname "$0")/run_table.sh" table1b "$@"
