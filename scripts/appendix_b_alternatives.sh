#!/usr/bin/env bash
# Appendix B and section 4.3: other similarities and another loss in SAR's place (ImageNet-100, 100 epochs).
#
#   bash scripts/appendix_b_alternatives.sh --data /data
#   bash scripts/appendix_b_alternatives.sh --dry-run        # the commands and the number of images
#
# Hardware: the paper's is 8 x V100 32 GB; anything else needs only a total batch that its processes divide.
# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.
# Expected, top-1: 76.72 with the scaled dot product (Eq. 4), 76.25 with the cosine (Eq. 15). The paper has words
#   for the others: total variation (Eq. 14) is far below; after the softmax, the maps collapse to one token
#   and entropy 0.
# Options: bash scripts/appendix_b_alternatives.sh --help.
exec bash "$(dirname "$0")/run_table.sh" appendix_b "$@"
